"""Adapters over transformed bases: how they are exported, and opened again."""

import dataclasses
import functools
import pathlib
import re
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.core import artifacts, config, experiment
from research import tree, weights
from research.interop import adapters, convert, load, peft, sources
from research.io import safetensors
from research.lora import adapt, wrap
from research.lora.methods.lora import LoRA
from research.quant.activations import Inputs
from research.quant.algorithms import folding
from research.quant.algorithms.rotate import Rotate
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.formats.fp8 import FP8
from research.quant.formats.int8 import Int8
from research.quant.quantize import Quantize
from research.training.objectives.objective import NextToken
from research.typing import UserError

RUN = "runs/llada/genmd4_markov.gin"
MODELS = pathlib.Path(__file__).resolve().parents[2] / "golden" / "models"
ADAPT = adapt.Adapt(method=LoRA(rank=2))


def trained(*transforms, name="gguf_f32", packed=None, adapter=ADAPT, **fields):
  """Returns a run, what it built, and its weights with trained adapters."""
  place = MODELS / name / "model.gguf"
  run = dataclasses.replace(
    config.read(RUN).experiment,
    model=experiment.Pretrained(name=str(place), packed=packed),
    objective=NextToken(),
    transforms=(*transforms, adapter),
    trainable=wrap.TRAINABLE,
    **fields,
  )
  built = run.build()
  rng = np.random.default_rng(0)

  def moved(path, x):
    if not path.endswith("/trained/b"):
      return x
    return jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype)

  return run, built, tree.map_paths(moved, built.params)


def leave(workdir, run, built, params):
  """Writes what a finished run does, without its log."""
  workdir.mkdir(parents=True)
  (workdir / "config.gin").write_text("")
  assert artifacts._save_weights(workdir, run, built, params)


def checkpointed(run, built, params):
  """Returns the source that an interrupted run is."""
  return sources.from_training(
    built.loaded, params, {"path": "run"}, run.model.name, built.params
  )


def file_of(folder):
  """Returns all that an adapter's directory says."""
  tensors, notes = safetensors.open_with_metadata(folder / peft.WEIGHTS)
  fields = safetensors.read_json(folder / "adapter_config.json")
  return {k: np.array(x.read()) for k, x in tensors.items()}, notes, fields


def logits(model, params):
  tokens = jnp.arange(24).reshape(2, 12) % 40
  return jax.jit(
    lambda p: model.apply(
      {"params": p}, model.apply({"params": p}, tokens)[0], method="logits"
    )
  )(params)


@dataclasses.dataclass(frozen=True)
class Smooth:
  """What SmoothQuant and AWQ do: scales move from a norm to its readers."""

  model: object = None

  def with_model(self, loaded):
    return Smooth(loaded.model)

  def __call__(self, params, key):
    rng = np.random.default_rng(1)

    def layer(flat, block, where):
      for norm in folding.READERS:
        s = np.exp(0.5 * rng.standard_normal(flat[f"{norm}/scale"].shape))
        flat = folding.scale_norm(
          flat, norm, jnp.asarray(s, jnp.float32), block.norm.offset
        )
      return flat

    return folding.map_layers(layer, self.model, params)


PACKED = {
  "nf4": dict(transforms=(Quantize(format=Codebook(block=32)),)),
  "int4": dict(transforms=(Quantize(format=Affine(block=32)),)),
  "int8": dict(transforms=(Quantize(format=Int8()),)),
  "fp8": dict(transforms=(Quantize(format=FP8()),)),
  "some": dict(
    transforms=(Quantize(format=Affine(block=32), targets=("q", "mlp/up")),)
  ),
  "gguf": dict(name="gguf_q4_1", packed=True),
  "nf4 of gguf": dict(
    name="gguf_q4_1", transforms=(Quantize(format=Codebook(block=32)),)
  ),
  "plain": {},
}


@pytest.mark.parametrize("base", PACKED)
@pytest.mark.sample(4)
def test_every_checkpoint_exports_the_adapter_of_a_finished_run(base, tmp_path):
  fields = dict(PACKED[base])
  run, built, params = trained(*fields.pop("transforms", ()), **fields)
  assert artifacts._save_adapter(tmp_path / "a", run, built, params)
  want = file_of(tmp_path / "a")
  assert all(".lora_" in name for name in want[0])
  stopped = checkpointed(run, built, params)
  convert.to_peft(stopped, tmp_path / "b")
  convert.to_orbax(stopped, tmp_path / "ours")
  ours = sources.open_source(tmp_path / "ours")
  convert.to_peft(ours, tmp_path / "c")
  # A checkpoint from before it noted what was trained whole.
  convert.to_peft(dataclasses.replace(ours, whole=None), tmp_path / "d")
  for name in "bcd":
    found = file_of(tmp_path / name)
    chex.assert_trees_all_equal(found[0], want[0])
    assert found[1:] == want[1:], name
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)
    load.load_model(tmp_path / "b")


@pytest.mark.parametrize("pack", [False, True])
def test_norms_that_were_trained_besides_are_brought(pack, tmp_path):
  packing = (Quantize(format=Affine(block=32)),) if pack else ()
  run, built, params = trained(*packing)
  params = tree.map_paths(
    lambda path, x: x + 0.1 if path.endswith("mlp_norm/scale") else x, params
  )
  stopped = checkpointed(run, built, params)
  convert.to_orbax(stopped, tmp_path / "ours")
  for i, source in enumerate([stopped, sources.open_source(tmp_path / "ours")]):
    convert.to_peft(source, tmp_path / str(i))
    names = file_of(tmp_path / str(i))[0]
    whole = {name for name in names if ".lora_" not in name}
    assert {x.split(".")[-2] for x in whole} == {"post_attention_layernorm"}


CHANGED = {
  "residual": Rotate(values=False, hidden=False),
  "values": Rotate(residual=False, hidden=False),
  "smooth": Smooth(),
}


EXPORTS = (convert.to_peft, convert.to_gguf_adapter)


def sources_of(tmp_path, run, built, params):
  """Returns what an interrupted run is, and its copies in our format."""
  stopped = checkpointed(run, built, params)
  convert.to_orbax(stopped, tmp_path / "ours")
  ours = sources.open_source(tmp_path / "ours")
  # The last is of before a checkpoint noted what was trained whole.
  return stopped, ours, dataclasses.replace(ours, whole=None)


@pytest.mark.parametrize(
  "how, pack",
  [
    ("residual", True),
    ("residual", False),
    ("values", True),
    ("values", False),
    ("smooth", False),
  ],
)
@pytest.mark.sample(3)
def test_a_base_in_other_coordinates_is_exported_in_its_own(
  how, pack, tmp_path
):
  """PEFT would add the factors as they are to weights that they do not fit."""
  packing = (Quantize(format=Affine(block=32)),) if pack else ()
  run, built, params = trained(CHANGED[how], *packing)
  assert artifacts._save_adapter(tmp_path / "a", run, built, params)
  wanted = file_of(tmp_path / "a")
  for i, source in enumerate(sources_of(tmp_path, run, built, params)):
    convert.to_peft(source, tmp_path / str(i))
    assert file_of(tmp_path / str(i))[2] == wanted[2]
    found, want = file_of(tmp_path / str(i))[0], wanted[0]
    chex.assert_trees_all_close(found, want, rtol=0, atol=1e-6)
    convert.to_gguf_adapter(source, tmp_path / f"{i}.gguf")
  again = load.load_model(tmp_path / "a")
  if not pack:
    got, want = (
      logits(x.model, p)
      for x, p in ((again, again.params), (built.loaded, params))
    )
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_a_base_that_is_scaled_and_packed_is_refused(tmp_path, capsys):
  packing = Quantize(format=Affine(block=32))
  run, built, params = trained(CHANGED["smooth"], packing)
  assert not artifacts._save_adapter(tmp_path / "a", run, built, params)
  said = r"trained over weights that are not those of(.|\n)*scaled and packed"
  assert re.search(said, capsys.readouterr().err)
  for source in sources_of(tmp_path, run, built, params):
    for write in EXPORTS:
      with pytest.raises(UserError, match=said):
        write(source, tmp_path / "x")
      assert not (tmp_path / "x").exists()


OPENED = {
  "nf4": Quantize(format=Codebook(block=32)),
  "rounded inputs": Inputs(),
  "rotated": Rotate(),
}


@pytest.mark.parametrize("how", OPENED)
def test_a_run_is_opened_as_it_was_trained(how, tmp_path):
  run, built, params = trained(OPENED[how])
  folder = tmp_path / "run"
  leave(folder, run, built, params)
  want = logits(built.loaded.model, params)
  again = load.load_model(folder, packed="any")
  chex.assert_trees_all_equal(logits(again.model, again.params), want)
  again = load.load_model(folder)  # decoded: the same numbers
  assert not any(map(weights.is_packed, jax.tree.leaves(again.params)))
  np.testing.assert_allclose(
    logits(again.model, again.params), want, atol=2e-5 * np.abs(want).max()
  )
  # Its adapter can be put on other bases, such as the named one.
  assert adapters.locate(folder) == folder / "adapter"
  with pytest.raises(UserError, match="is an adapter itself"):
    (tmp_path / "b").mkdir()
    safetensors.write_json(
      tmp_path / "b" / "adapter_config.json",
      {"base_model_name_or_path": str(folder)},
    )
    load.adapter_base(tmp_path / "b")


def test_a_run_over_the_named_base_leaves_its_adapter_alone(tmp_path):
  run, built, params = trained()
  leave(tmp_path / "run", run, built, params)
  assert not (tmp_path / "run" / "model").exists()


def test_another_rounding_of_the_base_is_said(tmp_path):
  run, built, params = trained(Quantize(format=Codebook(block=32)))
  assert artifacts._save_adapter(tmp_path / "a", run, built, params)
  with pytest.warns(RuntimeWarning, match=r"rounded in another way.* by \d"):
    load.load_model(tmp_path / "a")
  over = functools.partial(
    peft.load_adapter, tmp_path / "a", model=built.loaded.model
  )
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    over(wrap.disable(params))


def test_an_adapted_checkpoint_trained_further_is_no_adapter_of_it(tmp_path):
  run, built, params = trained(Quantize(format=Codebook(block=32)))
  leave(tmp_path / "run", run, built, params)
  run = dataclasses.replace(
    run,
    model=experiment.Pretrained(name=str(tmp_path / "run")),
    transforms=(),
  )
  built = run.build()
  assert not artifacts._save_adapter(tmp_path / "a", run, built, built.params)
