"""Tests AWQ: exact before packing, better after, by its definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tests.support as support
from research import tree
from research.nn.mlp import PlainMlp
from research.nn.norm import UnitRMS
from research.nn.stack import Stack
from research.quant import qtensor
from research.quant.algorithms import awq, awq_search, folding
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.formats.fp8 import FP8
from research.quant.formats.int8 import Int8
from research.quant.formats.kquants import Q4K
from research.quant.quantize import Quantize
from research.typing import UserError

FORMAT = Affine(bits=4, block=16)
SIZES = dict(width=32, hidden=48, depth=2)


@functools.cache
def _case(family):
  """Returns a model, weights whose activations have large channels, tokens."""
  # Without a window all layers are of one kind, compiled once.
  model = support.model(family, window=None, local_theta=None, **SIZES)
  params = support.params(model)

  def grown(path, w):
    if path.endswith("_norm/scale"):
      w = w.at[..., 3].add(20.0).at[..., 11].add(8.0)
    return w

  return model, tree.map_paths(grown, params), support.tokens(2, 24)


@functools.cache
def _found(family, **options):
  model, params, tokens = _case(family)
  made = awq.AWQ(format=FORMAT, steps=8, model=model, **options)
  return made.scale_and_clip(params, tokens)


def _search(steps=8, duo=True):
  return awq_search.Search(
    format=FORMAT, steps=steps, duo=duo, diagonal=False, clip=True
  )


@functools.cache
def _runner(model):
  return jax.jit(lambda p, t: model.apply({"params": p}, t)[0])


def _outputs(family, params):
  model, _, tokens = _case(family)
  return _runner(model)(params, tokens)


def _packed(params):
  def one(path, w):
    linear = path.startswith("run") and w.ndim > 2
    return qtensor.pack(w, FORMAT).dense() if linear else w

  return tree.map_paths(one, params)


def _error(got, want):
  return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


@pytest.mark.slow
def test_scales_preserve_the_model():
  """Grouped heads; Gemma's norms of 1 + w, and its outer ones; no module."""
  family = "gemma2"
  scaled, reports = _found(family, clip=False, loss="diag", duo=False)
  _, params, _ = _case(family)
  want = _outputs(family, params)
  assert _error(_outputs(family, scaled), want) < 1e-4
  q = [next(tree.layers(p))["attention"]["q"] for p in (params, scaled)]
  assert _error(*q) > 0.1
  assert all(report["qkv"]["alpha"] > 0 for report in reports)


def test_units_without_a_gate_are_not_scaled():
  """GELU stands between `up` and `down`, and no scale passes it."""
  model = support.model("llama", width=32, hidden=48, depth=1)
  mlp = PlainMlp(hidden=48, bias=False)
  blocks = tuple(b.clone(mlp=mlp) for b in model.stack.blocks)
  model = model.clone(stack=dataclasses.replace(model.stack, blocks=blocks))
  params, tokens = support.params(model), support.tokens(2, 24)
  made = awq.AWQ(
    format=FORMAT, steps=4, model=model, clip=False, loss="diag", duo=False
  )
  scaled, [report] = made.scale_and_clip(params, tokens)
  run = _runner(model)
  assert _error(run(scaled, tokens), run(params, tokens)) < 1e-4
  assert "down" not in report


@pytest.mark.slow
def test_packed_models_are_better_than_rounding_to_nearest():
  _, params, _ = _case("llama")
  scaled, reports = _found("llama")
  want = _outputs("llama", params)
  errors = [
    _error(_outputs("llama", _packed(p)), want) for p in (params, scaled)
  ]
  assert errors[1] < 0.8 * errors[0]
  for report in reports:
    for place in ("qkv", "o", "mlp", "down"):
      assert report[place]["losses"].min() <= report[place]["losses"][0]
    assert report["qkv"]["losses"].min() < 0.8 * report["qkv"]["losses"][0]
    assert report["qkv"]["alpha"] > 0


@pytest.mark.slow
def test_before_k_quants():
  """Their encoder is NumPy's; a scale is of 32 weights, a block of 256."""
  model = support.model("llama", width=256, hidden=256, head_dim=64, depth=1)
  params, tokens = support.params(model), support.tokens(2, 24)
  scale = params["run0"]["layer0"]["mlp_norm"]["scale"]
  params["run0"]["layer0"]["mlp_norm"]["scale"] = scale.at[..., 3].add(20.0)
  made = awq.AWQ(format=Q4K(), steps=4, model=model)
  scaled, (report,) = made.scale_and_clip(params, tokens)
  layer = next(tree.layers(params))["mlp"]
  assert report["mlp"]["alpha"] > 0

  @jax.jit
  def read(params):
    return model.apply({"params": params}, tokens)[0]

  def packed(params):
    return Quantize(format=Q4K(), targets=("gate", "up"))(params)

  want = read(params)
  errors = [_error(read(packed(p)), want) for p in (params, scaled)]
  assert errors[1] < 0.9 * errors[0]
  # Shares of the largest weight of the 32 behind a scale.
  size = jnp.linspace(0.5, 2, 256)
  search = dataclasses.replace(_search(steps=2), format=Q4K())
  got = search.candidates(size, [layer["up"]])[1]
  groups = abs(np.asarray(layer["up"], np.float64)).reshape(8, 32, -1)
  share = (groups / groups.max(1, keepdims=True)).reshape(256, -1).mean(1)
  s = 1 / (share + 1e-4)
  np.testing.assert_allclose(got, s / np.sqrt(s.max() * s.min()), rtol=1e-5)


@pytest.mark.slow
def test_alpha_zero_is_rounding():
  search = _search(steps=3, duo=False)
  w = jnp.asarray(np.random.default_rng(3).standard_normal((32, 5)), "float32")
  none, zero, *_ = search.candidates(jnp.arange(1.0, 33), [w])
  np.testing.assert_array_equal(none, 1)
  np.testing.assert_array_equal(zero, 1)
  want = qtensor.pack(w, FORMAT).dense()
  np.testing.assert_array_equal(search.rounded(w * zero[:, None]), want)


def test_candidates_are_those_of_the_paper():
  rng = np.random.default_rng(0)
  size = np.abs(rng.standard_normal(32)).astype(np.float32) + 0.1
  w = rng.standard_normal((32, 5)).astype(np.float32)
  plain = _search(steps=4, duo=False)
  got = plain.candidates(jnp.asarray(size), [jnp.asarray(w)])
  for row, alpha in zip(got[1:], (0, 0.25, 0.5, 0.75), strict=True):
    s = np.maximum(size.astype(np.float64) ** alpha, 1e-4)
    np.testing.assert_allclose(row, s / np.sqrt(s.max() * s.min()), rtol=1e-5)
  duo = dataclasses.replace(plain, duo=True)
  got = duo.candidates(jnp.asarray(size), [jnp.asarray(w)])
  groups = abs(w.astype(np.float64)).reshape(2, 16, 5)
  share = groups / groups.max(1, keepdims=True)
  share = share.reshape(32, 5).mean(1)
  s = size.astype(np.float64) ** 0.5 / (share**0.5 + 1e-4)
  np.testing.assert_allclose(got[3], s / np.sqrt(s.max() * s.min()), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("format", "size"),
  # All of an output has one scale; and so has the scale of a block's scales.
  [(FORMAT, 16), (Int8(), 512), (Q4K(), 256)],
  ids=lambda x: getattr(x, "name", ""),
)
@pytest.mark.sample(3)
def test_ranges_are_clipped_where_outputs_gain(format, size):
  inputs = min(2 * size, 512)
  rng = np.random.default_rng(1)
  w = rng.standard_t(2, (inputs, 6)).astype(np.float32)
  x = rng.standard_normal((1, 40, inputs)).astype(np.float32)
  flat = x[0].astype(np.float64)
  xx = jnp.asarray(flat.T @ flat / len(flat), jnp.float32)
  search = dataclasses.replace(_search(), format=format)
  got = jax.jit(functools.partial(awq_search.clip_ranges, search))(
    jnp.asarray(w), xx
  )
  # By the definition, over tokens, in NumPy.
  want = np.empty_like(w)
  for group in (slice(i, i + size) for i in range(0, inputs, size)):
    most = abs(w[group]).max(0)
    errors, cuts = [], []
    for i in range(10):
      cut = np.clip(w[group], -most * (1 - i / 20), most * (1 - i / 20))
      near = np.asarray(qtensor.pack(jnp.asarray(cut), format).dense())
      outputs = flat[:, group] @ (near - w[group])
      errors.append((outputs**2).mean(0)), cuts.append(cut)
    best = np.argmin(errors, axis=0)
    want[group] = np.stack(cuts)[best, :, range(6)].T
  np.testing.assert_allclose(got, want, rtol=1e-6)
  # In 8 bits nothing gains.
  assert np.any(want != w) == (format != Int8())


def test_scaled_units_and_values_keep_what_comes_out_of_them():
  """Biases among them: as many outputs as there are scales."""
  rng = np.random.default_rng(4)

  def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  flat = {
    "mlp/up": draw(6, 8),
    "mlp/up_bias": draw(8),
    "mlp/down": draw(8, 6),
    "attention/v": draw(6, 4),
    "attention/v_bias": draw(4),
    "attention/o": draw(8, 6),
  }
  x, s = draw(5, 6), jnp.exp(draw(8))

  def hidden(flat):
    return (x @ flat["mlp/up"] + flat["mlp/up_bias"]) @ flat["mlp/down"]

  def values(flat):
    v = x @ flat["attention/v"] + flat["attention/v_bias"]
    return (
      jnp.repeat(v.reshape(5, 2, 2), 2, 1).reshape(5, 8) @ (flat["attention/o"])
    )

  scaled = folding.scale_hidden(flat, "mlp", s)
  assert not np.allclose(scaled["mlp/up"], flat["mlp/up"])
  np.testing.assert_allclose(hidden(scaled), hidden(flat), atol=1e-5)
  scaled = folding.scale_values(flat, s[:4], heads=4, kv_heads=2)
  assert not np.allclose(scaled["attention/v"], flat["attention/v"])
  np.testing.assert_allclose(values(scaled), values(flat), atol=1e-5)


def test_scales_of_value_heads_go_with_their_queries():
  s = jnp.asarray(np.random.default_rng(2).uniform(0.5, 2, 12), jnp.float32)
  tied = folding.from_heads(s, heads=6, kv_heads=2)  # of two dimensions
  a = np.asarray(s, np.float64).reshape(2, 3, 2)
  want = np.exp(np.log(a).mean(1))
  np.testing.assert_allclose(tied, want.ravel(), rtol=1e-6)
  spread = folding.to_heads(tied, heads=6, kv_heads=2)
  want = np.repeat(want, 3, axis=0).ravel()
  np.testing.assert_allclose(spread, want, rtol=1e-6)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      dict(format=Q4K()),
      "layers/0/attention/q: Q4_K: 32 inputs are no multiple of its block",
    ),
    (dict(format=Codebook()), "attention/v: outputs share scales in nf4-b64"),
    (dict(format=FP8(share="tensor")), "outputs share scales in fp8-e4m3-ten"),
  ],
)
def test_unsupported_matrices_raise_before_calibration(options, message):
  model, params, _ = _case("llama")
  with pytest.raises(UserError, match=message):
    awq.AWQ(model=model, tokenizer=None, **options)(params)


@pytest.mark.parametrize(
  "changes",
  [
    dict(v_norm=UnitRMS()),  # a norm undoes what v is divided by
    dict(values="keys"),
    dict(kv="lent"),  # other layers' o would need the scales, too
  ],
)
def test_values_whose_scales_cannot_be_moved_are_refused(changes):
  model, params, _ = _case("llama")
  (block,) = model.stack.blocks
  block = block.clone(attention=block.attention.clone(**changes))
  model = model.clone(stack=Stack(model.stack.depth, (block,)))
  with pytest.raises(UserError, match="AWQ: layers/0: found values"):
    awq.AWQ(format=FORMAT, model=model)(params)


def test_weights_that_are_not_finite_are_named():
  model, params, _ = _case("llama")
  up = params["run0"]["layer0"]["mlp"]["up"]
  layer = params["run0"]["layer0"]
  bad = layer | {"mlp": layer["mlp"] | {"up": up.at[1, 0, 0].set(jnp.inf)}}
  with pytest.raises(UserError, match="AWQ: layers/1/mlp/up"):
    awq.AWQ(format=FORMAT, model=model)({**params, "run0": {"layer0": bad}})


def test_bad_settings_raise():
  with pytest.raises(UserError, match="no model"):
    awq.AWQ()({})
