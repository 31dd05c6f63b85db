"""Experts in files: both layouts, and every way in which they do not fit."""

import dataclasses
import json
import pathlib
import shutil

import chex
import numpy as np
import pytest

from research.interop import hf, parts
from research.interop.hf import config as hf_config
from research.interop.parts import Address
from research.io import safetensors
from research.nn.moe import Moe
from research.typing import UserError

MODELS = pathlib.Path(__file__).parents[3] / "golden" / "models"
FILE = "model.safetensors"


def config_of(name):
  return json.loads((MODELS / name / "config.json").read_text())


def sparse_of(**changes):
  config = config_of("qwen3_moe") | changes
  return hf_config.sizes_from_config(config)[1].sparse


def test_both_layouts_hold_the_same_model():
  one, two = (
    hf.model_from_directory(MODELS / name)[:2]
    for name in ("mixtral", "mixtral_stacked")
  )
  assert one[0] == two[0]
  chex.assert_trees_all_equal(one[1], two[1])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_every_matrix_is_where_it_belongs(name):
  """By the names of the file, each expert's three matrices, transposed."""
  model, params, _ = hf.model_from_directory(MODELS / name)
  tensors = safetensors.open_directory(MODELS / name)
  found = parts.from_params(params)
  stem, theirs = "mlp", ("gate_proj", "up_proj", "down_proj")
  if name == "mixtral":
    stem, theirs = "block_sparse_moe", ("w1", "w3", "w2")
  layers = [
    i for i, kind in enumerate(model.layer_kinds()) if isinstance(kind.mlp, Moe)
  ]
  assert layers == ([0, 1, 2] if name == "mixtral" else [1, 2, 3])
  experts = model.layer_kinds()[-1].mlp.routing.experts
  for i in layers:
    for e in range(experts):
      for ours, last in zip(("gate", "up", "down"), theirs, strict=True):
        full = f"model.layers.{i}.{stem}.experts.{e}.{last}.weight"
        part = found[Address(i, f"mlp/experts/{ours}", e)]
        np.testing.assert_array_equal(part.read(), tensors[full].read().T)


def changed(tmp_path, name, change):
  """Returns a copy of a golden directory after `change(tensors)`."""
  folder = tmp_path / "model"
  shutil.copytree(MODELS / name, folder)
  tensors = {
    k: np.array(v.read()) for k, v in safetensors.open_directory(folder).items()
  }
  change(tensors)
  safetensors.write_file(folder / FILE, tensors)
  return folder


_UP = "model.layers.1.mlp.experts.gate_up_proj"
_OLD = "model.layers.1.block_sparse_moe"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda t: t.update({_UP: t[_UP][:4]}), rf"superfluous: {_UP}"),
    (lambda t: t.update({_UP: t[_UP][:, :-1]}), rf"superfluous: {_UP}"),
    (lambda t: t.update({_UP: t[_UP][0]}), rf"superfluous: {_UP}"),
    (lambda t: t.update({_UP: t[_UP][:, :-2]}), r"has shape \[19, 36\]"),
    (lambda t: t.pop(_UP), r"10 missing: .*experts\.0\.w1\.weight"),
    (
      lambda t: t.update({_UP.replace(".1.", ".7."): t[_UP]}),
      r"superfluous: model\.layers\.7",
    ),
    (
      lambda t: t.update({f"{_OLD}.gate.weight": np.ones((5, 36), "f4")}),
      r"superfluous: model\.layers\.1\.mlp\.gate\.weight",
    ),
    (
      lambda t: t.update(
        {f"{_OLD}.experts.3.w1.weight": np.ones((20, 36), "f4")}
      ),
      rf"superfluous: {_UP}",
    ),
  ],
)
def test_stacked_experts_that_do_not_fit(tmp_path, change, message):
  folder = changed(tmp_path, "mixtral_stacked", change)
  with pytest.raises(UserError, match=message):
    hf.model_from_directory(folder)


def test_an_expert_that_is_missing(tmp_path):
  name = f"{_OLD}.experts.4.w2.weight"
  folder = changed(tmp_path, "mixtral", lambda t: t.pop(name))
  with pytest.raises(UserError, match=f"1 missing: {name}"):
    hf.model_from_directory(folder)


@pytest.mark.parametrize(
  ("changes", "dense"),
  [
    (dict(mlp_only_layers=[], decoder_sparse_step=1), ()),
    (dict(mlp_only_layers=[], decoder_sparse_step=2), (0, 2)),
    (dict(mlp_only_layers=None, decoder_sparse_step=3), (0, 1, 3)),
    (dict(mlp_only_layers=[3], decoder_sparse_step=1), (3,)),
    (dict(mlp_only_layers=[1], decoder_sparse_step=2), (0, 1, 2)),
  ],
)
def test_which_layers_are_dense(changes, dense):
  """As `Qwen3MoeDecoderLayer` of transformers decides."""
  assert sparse_of(**changes).dense == dense


def test_the_count_of_experts_has_two_names():
  assert sparse_of().routing.experts == 7
  config = config_of("qwen3_moe")
  config["num_local_experts"] = config.pop("num_experts")
  sparse = hf_config.sizes_from_config(config)[1].sparse
  assert dataclasses.replace(sparse) == sparse_of()
  with pytest.raises(UserError, match="num_experts is 7, expected the same as"):
    sparse_of(num_local_experts=8)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(num_experts=0), "num_experts is 0, expected a whole number"),
    (dict(num_experts=10**6), "num_experts is 1000000, expected at most"),
    (dict(num_experts=2048, num_hidden_layers=4096), "at most 262144 in all"),
    (dict(num_experts_per_tok=8), "expected at most 7 experts"),
    (dict(num_experts_per_tok=None), "num_experts_per_tok is None"),
    (dict(moe_intermediate_size="12"), "moe_intermediate_size is '12'"),
    (dict(norm_topk_prob=1), "norm_topk_prob is 1, expected true or false"),
    (dict(decoder_sparse_step=0), "decoder_sparse_step is 0"),
    (dict(mlp_only_layers=[4]), "expected numbers of layers below 4"),
    (dict(mlp_only_layers=[True]), "expected numbers of layers below 4"),
    (dict(mlp_only_layers=3), "expected numbers of layers below 4"),
    (dict(n_routed_experts=8), "n_routed_experts is 8"),
    (dict(model_type="qwen3"), "num_experts is 7, .*not supported"),
  ],
)
def test_configurations_that_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    sparse_of(**changes)
