"""Adapters over rotated and scaled bases, moved to the original ones.

Both models compute the same: fp32 rounding of the transforms alone remains.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tests.support as support
from research import tree
from research.lora import adapt, lora_factors, wrap
from research.lora.methods.dora import DoRA
from research.lora.methods.loha import LoHa
from research.lora.methods.lora import LoRA
from research.lora.methods.svd_init import PiSSA
from research.nn.moe.routing import Routing
from research.nn.presets import Sparse
from research.quant.algorithms import folding, rotate
from research.quant.formats.affine import Affine
from research.quant.quantize import Quantize
from research.typing import UserError

SPARSE = Sparse(routing=Routing(experts=3, active=2), hidden=24, shared=1)

MODELS = {
  "biases, tied": ("qwen2", dict(tied=True, hidden=48)),
  "grouped heads": ("llama", dict(tied=False, hidden=48)),
  "gains of 1 + w": ("gemma", dict(depth=1)),
  "experts": ("qwen3_moe", dict(depth=1, sparse=SPARSE)),
}


@functools.cache
def case(name):
  family, changes = MODELS[name]
  model = support.model(family, **changes)

  def run(params):
    hidden, _ = model.apply({"params": params}, support.tokens())
    return model.apply({"params": params}, hidden, method="logits")

  return model, support.params(model), jax.jit(run)


def rotated(model, params, seed):
  """As `Rotate` does it."""
  return rotate.Rotate(model=model)(params, jax.random.key(seed))


def learned(model, params, seed):
  """Any rotation of the residual stream, as `SpinQuant` learns it."""
  rng = np.random.default_rng(seed)
  r = np.linalg.qr(rng.standard_normal((model.width, model.width)))[0]
  r = jnp.asarray(r, jnp.float32)
  return rotate.rotate_model(model, params, r, None, True)


def scaled(model, params, seed):
  """Every scale that `SmoothQuant` and `AWQ` move."""
  rng = np.random.default_rng(seed)

  def drawn(shape):
    return jnp.asarray(np.exp(0.5 * rng.standard_normal(shape)), jnp.float32)

  def layer(flat, block, where):
    for norm in folding.READERS:
      s = drawn(flat[f"{norm}/scale"].shape)
      flat = folding.scale_norm(flat, norm, s, block.norm.offset)
    for mlp in folding.MLPS:
      if f"{mlp}/up" in flat:
        w = flat[f"{mlp}/up"]
        s = drawn((*w.shape[:-2], w.shape[-1]))
        flat = folding.scale_hidden(flat, mlp, s)
    a, v = block.attention, flat["attention/v"]
    s = drawn((*v.shape[:-2], v.shape[-1]))
    return folding.scale_values(flat, s, a.heads, a.kv_heads)

  return folding.map_layers(layer, model, params)


def both(model, params, seed):
  """Of what a layer has one of, a rotation or a scale, some of each."""
  turn = rotate.Rotate(model=model, values=False, hidden=False)
  return scaled(model, turn(params, jax.random.key(seed)), seed)


CHANGES = [rotated, learned, scaled, both]


def adapted(params, method=LoRA(rank=2, init="random"), seed=0, **fields):
  """Returns the parameters with trained adapters on all that can have them."""
  tables = "|embed|head" if "head" in params else ""
  targets = rf"layers/.*{tables}"
  fields = dict(method=method, targets=targets) | fields
  params = adapt.Adapt(**fields)(params, jax.random.key(seed))
  rng = np.random.default_rng(seed)

  def moved(path, x):
    if "/trained/" not in path:
      return x
    return x + jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype)

  return tree.map_paths(moved, params)


def error(got, want):
  return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def moved_by_rounding(run, params):
  """Returns how far half an ulp of all numbers moves a model's outputs."""
  rng = np.random.default_rng(0)

  def rounded(x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    half = 2.0**-24 * rng.uniform(-1, 1, x.shape)
    return jnp.asarray(np.asarray(x, np.float64) * (1 + half), x.dtype)

  return error(run(jax.tree.map(rounded, params)), run(params))


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.cover(1)
def test_both_models_compute_the_same(name, how, seed):
  model, params, run = case(name)
  trained = adapted(how(model, params, seed), seed=seed)
  found = lora_factors.over_original(model, trained, params)
  chex.assert_trees_all_equal(wrap.disable(found), params)
  want = run(trained)
  assert error(run(params), want) > 0.5  # of much larger adapters than usual
  e = error(run(found), want)
  assert e < 8 * moved_by_rounding(run, found)


def test_factors_over_packed_rotations_are_those_over_the_rotations():
  """What packing rounds is no part of the coordinates."""
  model, params, _ = case("grouped heads")
  turned = rotated(model, params, 0)
  packed = Quantize(format=Affine(block=8))(turned)
  want, found = (
    lora_factors.factors(lora_factors.over_original(model, adapted(p), params))
    for p in (turned, packed)
  )
  for address, f in want.items():
    for name in "ab":
      x, y = getattr(f, name), getattr(found[address], name)
      scale = 2e-7 * np.abs(x).max()
      np.testing.assert_allclose(y, x, rtol=0, atol=scale, err_msg=address)


@pytest.mark.slow
def test_methods_that_are_products_of_two_factors_keep_what_they_compute():
  model, params, run = case("biases, tied")
  method = PiSSA(rank=2, dropout=0.25)
  trained = adapted(rotated(model, params, 0), method)
  found = lora_factors.over_original(model, trained, params)
  assert error(run(found), run(trained)) < 8 * moved_by_rounding(run, found)
  leaf = found["run0"]["layer0"]["attention"]["q"]
  assert leaf.method == LoRA(rank=4, alpha=leaf.method.alpha, dropout=0.25)


@pytest.mark.parametrize("method", [DoRA(rank=2), LoHa(rank=2)])
def test_other_methods_are_refused_by_name(method):
  """A column's norm, or a product of elements, is another one elsewhere."""
  model, params, _ = case("biases, tied")
  trained = adapted(rotated(model, params, 0), method)
  with pytest.raises(UserError, match=f"adapter of {type(method).__name__}"):
    lora_factors.over_original(model, trained, params)


def other_norm(params, path):
  return tree.map_paths(
    lambda p, x: x.at[..., 0].multiply(1.01) if p.endswith(path) else x, params
  )


REFUSED = {
  "is scaled and packed": lambda model, params: Quantize(
    format=Affine(block=8)
  )(scaled(model, params, 0)),
  "k: is not that weight": lambda model, params: other_norm(
    rotated(model, params, 0), "attention_norm/scale"
  ),
  "q_bias: is not that weight": lambda model, params: other_norm(
    rotated(model, params, 0), "attention/q_bias"
  ),
  "embed: is not that weight": lambda model, params: support.params(model, 1),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_no_rotated_or_scaled_base_is_refused(said):
  model, params, _ = case("biases, tied")
  trained = adapted(REFUSED[said](model, params))
  with pytest.raises(UserError, match=said):
    lora_factors.over_original(model, trained, params)


def test_a_gain_of_zero_is_refused():
  model, params, _ = case("biases, tied")
  params = tree.map_paths(
    lambda p, x: x.at[:, 0].set(0) if p.endswith("mlp_norm/scale") else x,
    params,
  )
  trained = adapted(rotated(model, params, 0))
  with pytest.raises(UserError, match="gain of 0"):
    lora_factors.over_original(model, trained, params)
