"""PEFT's adapters on stacked experts compute here what they compute there."""

import dataclasses
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree
from research.interop import load, peft
from research.interop.peft import config as peft_config
from research.io import safetensors
from research.lora import adapt, wrap
from research.lora.methods import lora, mora, tokens
from research.typing import UserError
from tests.support_peft import MODELS, loaded, logits, relative

CASES = sorted(p.name for p in MODELS.glob("experts_lora_*"))


def thin(w):
  return dataclasses.replace(w, w=None)


def base():
  return load.load_model(MODELS / "mixtral")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.sample(2)
def test_logits_are_pefts(name):
  with warnings.catch_warnings():
    warnings.simplefilter("error", RuntimeWarning)  # every pattern has matched
    it = load.load_model(MODELS / name)
  with np.load(MODELS / name / "golden.npz") as golden:
    tokens, want = golden["tokens"], golden["logits"]
  assert relative(logits(it.model, it.params, tokens), want) < 1e-5
  assert relative(logits(it.model, wrap.merge(it.params), tokens), want) < 1e-5
  plain = base()
  assert relative(logits(plain.model, plain.params, tokens), want) > 1e-3


def test_each_stack_has_its_rank_and_alpha():
  found = wrap.adapters(loaded("experts_lora_both").params, thin)
  got = {
    path: (w.method.rank, w.method.alpha)
    for path, w in found.items()
    if "experts" in path
  }
  want = {
    f"layers/{i}/mlp/experts/{part}": (4, 12.0)
    for i in range(3)
    for part in ("gate", "up", "down")
  }
  want["layers/0/mlp/experts/down"] = (3, 12.0)
  want |= {f"layers/2/mlp/experts/{p}": (4, 5.0) for p in ("gate", "up")}
  assert got == want
  found = wrap.adapters(loaded("experts_lora_down").params, thin)
  assert set(found) == {"layers/1/mlp/experts/down"}


def changed(tmp_path, fields=None, tensors=None):
  path = shutil.copytree(MODELS / "experts_lora_down", tmp_path / "a")
  file = path / peft_config.CONFIG
  file.write_text(json.dumps(json.loads(file.read_text()) | (fields or {})))
  if tensors:
    found = safetensors.open_file(path / peft.WEIGHTS)
    found = {k: np.array(x.read()) for k, x in found.items()}
    safetensors.write_file(path / peft.WEIGHTS, tensors(found))
  return path


@pytest.mark.parametrize(
  "fields, tensors, said",
  [
    (dict(target_parameters=["w1"]), None, "parameters of experts, not 'w1'"),
    (dict(target_parameters="w1"), None, "a list of names, or null"),
    (dict(target_parameters=[3]), None, "a list of names, or null"),
    (dict(lora_dropout=0.1), None, "null beside another method, or dropout"),
    (dict(r=3), None, "expected numbers [15, 20]"),
    (
      dict(target_parameters=["experts.down_proj"]),
      None,
      "missing: base_model.model.model.layers.0.mlp",
    ),
    (None, lambda t: {k: x * np.nan for k, x in t.items()}, "not finite"),
    (None, lambda t: t | {"more": np.ones(2, "f4")}, "1 superfluous: more"),
    (
      None,
      lambda t: {k: x * ("lora_A" in k) for k, x in t.items()},
      "changes nothing",
    ),
  ],
)
def test_what_does_not_fit(tmp_path, fields, tensors, said):
  path, it = changed(tmp_path, fields, tensors), base()
  with pytest.raises(UserError) as e:
    peft.load_adapter(path, it.params, it.model)
  assert said in str(e.value) and str(path) in str(e.value)


def saved(tmp_path, params, model):
  """Returns the directory of an adapter over a base that it can be read by."""
  peft.save_adapter(tmp_path / "b", params, model, "x")
  return tmp_path / "b"


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_is_written_again(tmp_path, name):
  it = loaded(name)
  path = saved(tmp_path, it.params, it.model)
  got, want = (
    {k: x.read() for k, x in safetensors.open_file(p / peft.WEIGHTS).items()}
    for p in (path, MODELS / name)
  )
  assert set(got) == set(want)
  for key, x in want.items():
    np.testing.assert_array_equal(got[key], x)
  config = json.loads((path / peft_config.CONFIG).read_text())
  theirs = json.loads((MODELS / name / peft_config.CONFIG).read_text())
  ends = [t.split("experts.")[-1] for t in theirs["target_parameters"]]
  mine = [t.split("experts.")[-1] for t in config["target_parameters"]]
  assert sorted(mine) == sorted(ends)
  again = peft.load_adapter(path, base().params, base().model)
  same = jax.tree.map(np.array_equal, again, it.params)
  assert all(jax.tree.leaves(same))


def of_experts(targets, seed=0, **fields):
  """Returns a base with adapters of random factors on some of its layers."""
  it, rng = base(), np.random.default_rng(seed)
  params = adapt.Adapt(method=lora.LoRA(**fields), targets=targets)(
    it.params, jax.random.key(0)
  )
  return it.model, tree.map_paths(
    lambda path, x: (
      jnp.float32(rng.normal(size=x.shape)) if "/trained/" in path else x
    ),
    params,
  )


EXPERTS = ("experts/gate", "experts/up", "experts/down")


@pytest.mark.parametrize(
  "targets, ranks",
  [
    # A gate and its neighbour with an A each are one of twice the rank.
    (("attention/q", *EXPERTS), {"gate_up_proj": 6, "down_proj": 3}),
    (("experts/up",), {"gate_up_proj": 3}),
    (("experts/down",), {"down_proj": 3}),
  ],
)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.cover(1)
def test_our_own_are_read_as_the_same_update(tmp_path, targets, ranks, rslora):
  model, params = of_experts(targets, rank=3, alpha=5.0, rslora=rslora)
  path = saved(tmp_path, params, model)
  again = peft.load_adapter(path, base().params, model)
  for (address, x), (other, y) in zip(
    wrap.leaves(wrap.merge(params)), wrap.leaves(wrap.merge(again)), strict=True
  ):
    assert address == other
    np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-4)
  changed = wrap.leaves(
    jax.tree.map(np.array_equal, wrap.merge(params), base().params)
  )
  assert not all(same for path, same in changed if "experts" in path)
  found = safetensors.open_file(path / peft.WEIGHTS)
  experts = base().model.stack.blocks[0].mlp.routing.experts
  for name, rank in ranks.items():
    layer = "base_layer." * (name == "gate_up_proj" and "down_proj" in ranks)
    key = f"base_model.model.model.layers.1.mlp.experts.{layer}lora_A.weight"
    assert found[key].shape[0] == rank * experts


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.sample(2)
def test_rows_of_tokens_beside_experts_alone(tmp_path, tied):
  model, params = of_experts(EXPERTS, rank=3)
  plain = base().params
  if tied:
    model = dataclasses.replace(model, tied=True)
    for held in (params, plain):
      del held["head"]
  params = adapt.Adapt(method=tokens.Tokens(ids=(5, 9)), targets=("embed",))(
    params, jax.random.key(0)
  )
  params = tree.map_paths(
    lambda p, x: x + 0.1 if p.startswith("embed/trained") else x, params
  )
  path = saved(tmp_path, params, model)
  config = json.loads((path / peft_config.CONFIG).read_text())
  assert config["trainable_token_indices"] == {"model.embed_tokens": [5, 9]}
  assert config["target_modules"] == []
  again = peft.load_adapter(path, plain, model)
  assert {*wrap.adapters(again, thin)} == {*wrap.adapters(params, thin)}
  ids = np.array([[5, 7, 9, 3]])
  want = logits(model, params, ids)
  assert relative(logits(model, again, ids), want) < 1e-5
  assert relative(logits(model, wrap.merge(again), ids), want) < 1e-5
  assert relative(logits(model, plain, ids), want) > 1e-3


def test_dropout_beside_experts_is_warned_of(tmp_path):
  model, params = of_experts((*EXPERTS, "attention/q"), dropout=0.1)
  with pytest.warns(RuntimeWarning, match="dropout of 0.1 on layers/0/.* 12 a"):
    path = saved(tmp_path, params, model)
  config = json.loads((path / peft_config.CONFIG).read_text())
  assert config["lora_dropout"] == 0
  model, params = of_experts(EXPERTS)
  with warnings.catch_warnings():
    warnings.simplefilter("error", RuntimeWarning)
    saved(tmp_path, params, model)


def test_some_layers_are_named_in_full(tmp_path):
  it = loaded("experts_lora_down")
  path = saved(tmp_path, it.params, it.model)
  config = json.loads((path / peft_config.CONFIG).read_text())
  want = ["model.layers.1.mlp.experts.down_proj"]
  assert config["target_parameters"] == want


@pytest.mark.slow
def test_other_methods_are_not_written(tmp_path):
  it = base()
  params = adapt.Adapt(method=mora.MoRA(), targets=["experts/up"])(
    it.params, jax.random.key(0)
  )
  with pytest.raises(UserError, match="an adapter of MoRA; on stacked experts"):
    peft.save_adapter(tmp_path, params, it.model, "x")
