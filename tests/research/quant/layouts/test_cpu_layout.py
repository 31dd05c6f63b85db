"""Tests the panel layout: the same numbers and the same model on CPUs."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.quantized_matmul import cpu
from research import sharding, tree, weights
from research.generation import generate
from research.lora.adapted import AdaptedTensor
from research.quant import qtensor
from research.quant.formats import ggml
from research.quant.formats.affine import Affine
from research.quant.formats.fp8 import FP8
from research.quant.formats.microscaling import Microscaling
from research.quant.layouts import cpu_layout
from research.quant.quantize import Quantize
from tests import support
from tests.research.quant.formats.test_ggml import (
  KINDS,
  SIZES,
  adapted,
  logits,
  packed_params,
  raw,
)

pytestmark = pytest.mark.filterwarnings("ignore:quantized_matmul")


def leaf(kind, axis=-2):
  return ggml.from_ggml(kind, raw(kind, 1, 24, 64), axis).squeeze()


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_keep_every_bit(kind, axis):
  w = leaf(kind, axis)
  got = cpu_layout.from_qtensor(w)
  assert (got.shape, got.dtype, got.ndim) == (w.shape, w.dtype, w.ndim)
  np.testing.assert_array_equal(jax.jit(weights.dense)(got), w.dense())
  assert got.panels.bits == (4 if kind.startswith("Q4") else 8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_floats_keep_every_bit(dtype):
  w = jnp.asarray(np.random.default_rng(0).normal(size=(24, 64)), dtype)
  for axis in (-2, -1):
    got = cpu_layout.from_array(w, axis)
    assert (got.shape, got.dtype) == (w.shape, w.dtype)
    np.testing.assert_array_equal(got.dense(), w)
  ids = jnp.array([[3, 0, 23]])
  np.testing.assert_array_equal(weights.take(got, ids), w[ids])


@pytest.mark.parametrize(
  ("eq", "axis", "shape"),
  [
    ("...d,df->...f", -2, (2, 3, 64)),
    ("...d,vd->...v", -1, (3, 64)),
    ("...f,df->...d", -2, (3, 24)),
  ],
)
def test_einsum_and_its_gradient_are_those_of_the_blocks(eq, axis, shape):
  w = leaf("Q4_1", axis)
  got = cpu_layout.from_qtensor(w)
  x = jnp.asarray(np.random.default_rng(1).normal(size=shape), np.float32)

  def both(w):
    y, pull = jax.vjp(lambda x: weights.einsum(eq, x, w), x)
    return y, pull(jnp.ones_like(y))[0]

  for a, b in zip(jax.jit(both)(got), jax.jit(both)(w), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def ordered(axis=-2, layers=(), seed=0):
  """Returns a matrix `[64, 24]` with rows permuted by act-order."""
  rng = np.random.default_rng(seed)
  w = rng.normal(size=(*layers, 64, 24)).astype(np.float32)
  order = np.argsort(rng.normal(size=(*layers, 64)), -1).astype(np.int32)
  w = qtensor.pack(jnp.asarray(w), Affine(bits=4, block=16))
  return dataclasses.replace(w, order=jnp.asarray(order), axis=axis)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.sample(2)
def test_act_order_permutes_inputs_once(axis):
  w = ordered(axis)
  assert cpu_layout.is_supported(w)
  got = cpu_layout.from_qtensor(w)
  # A zero a group becomes an offset, which is rounded once.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6)
  assert (got.shape, got.dtype) == (w.shape, w.dtype)
  close(jax.jit(weights.dense)(got), w.dense())
  ids = jnp.array([[3, 0, 20]])
  close(weights.take(got, ids), w.dense()[ids])
  stacked = cpu_layout.from_qtensor(ordered(axis, (2, 3)))
  close(stacked.dense(), ordered(axis, (2, 3)).dense())

  def both(w, eq, size):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, size)))
    x = x.astype(jnp.float32)
    y, pull = jax.vjp(lambda x: weights.einsum(eq, x, w), x)
    return y, pull(jnp.ones_like(y))[0]

  for eq, size in (
    ("...d,df->...f", w.shape[0]),
    ("...f,df->...d", w.shape[1]),
  ):
    f = jax.jit(functools.partial(both, eq=eq, size=size))
    for a, b in zip(f(got), f(w), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
def test_sharded_act_order_is_the_same():
  w = cpu_layout.from_qtensor(ordered())
  named = weights.axes(w, ("width", "heads"))
  assert named.panels.words == ("heads", "width", None)
  assert named.source == (None,)
  plan = sharding.Layout(data=2, fsdp=2, tensor=2)
  mesh = plan.mesh()
  where = plan.shardings({"mlp": {"up": w}}, mesh)["mlp"]["up"]
  x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2, 64)), np.float32)

  @jax.jit
  def both(x, w):
    y, pull = jax.vjp(lambda x: weights.einsum("...d,df->...f", x, w), x)
    return y, pull(y)[0]

  with jax.set_mesh(mesh):
    got = both(*jax.device_put((x, w), (plan.batch(mesh), where)))
  for a, b in zip(got, both(x, w), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-4)


@pytest.mark.slow
def test_a_model_in_act_order_is_the_same_in_panels():
  model = support.model(tied=True, **SIZES)
  rng = np.random.default_rng(2)
  kept = {}  # of the same inputs, the same order

  def one(path, w):
    inputs = path.rpartition("/")[0] + str(w.shape[-2])
    if inputs not in kept:
      order = np.argsort(rng.normal(size=w.shape[:-1]), -1).astype(np.int32)
      kept[inputs] = jnp.asarray(order)
    return dataclasses.replace(w, order=kept[inputs])

  params = Quantize(format=Affine(bits=4, block=16))(support.params(model))
  is_packed = lambda w: isinstance(w, qtensor.QTensor)  # noqa: E731
  params = tree.map_paths(
    lambda path, w: one(path, w) if is_packed(w) else w,
    params,
    is_leaf=weights.is_weight,
  )
  got = cpu_layout.to_panels(params)
  layer = got["run0"]["layer0"]
  assert {"q_k_v", "o"} == set(layer["attention"])
  assert {"gate_up", "down"} == set(layer["mlp"])
  tokens = support.tokens(vocab=64)
  want = logits(model, params, tokens)
  np.testing.assert_allclose(
    logits(model, got, tokens), want, atol=1e-5 * float(jnp.ptp(want))
  )
  # Of another order, a matrix stays by itself.
  of = params["run0"]["layer0"]["attention"]
  of["k"] = dataclasses.replace(of["k"], order=of["k"].order[:, ::-1])
  again = cpu_layout.to_panels(params)["run0"]["layer0"]
  assert {"q", "k", "v", "o"} == set(again["attention"])


def test_parts_are_named_after_the_axes_they_cut():
  w = cpu_layout.from_qtensor(leaf("Q4_1"))
  named = weights.axes(w, ("width", "heads"))
  assert named.panels.words == ("heads", "width", None)
  assert named.panels.scale == ("heads", "width", None)
  other = weights.axes(
    cpu_layout.from_qtensor(leaf("Q4_0", -1)), ("vocab", "width")
  )
  assert other.panels.words == ("vocab", "width", None)
  assert other.panels.offset is None


@pytest.mark.parametrize(
  "kind", [pytest.param("Q4_1", marks=pytest.mark.slow), "Q5_0"]
)
@pytest.mark.slow
def test_a_packed_model_is_the_same_in_panels(kind):
  model = support.model(tied=True, **SIZES)
  params = adapted(packed_params(model, kind))
  got = cpu_layout.to_panels(params)
  assert tree.run_length(got["run0"]) == 1
  assert isinstance(got["embed"], cpu_layout.PanelTensor)
  attention = got["run0"]["layer0"]["attention"]
  assert isinstance(attention["q"], AdaptedTensor)
  assert isinstance(attention["q"].w, cpu_layout.PanelTensor)
  tokens = support.tokens(vocab=64)
  want = logits(model, params, tokens)
  np.testing.assert_allclose(
    logits(model, got, tokens), want, atol=1e-5 * float(jnp.ptp(want))
  )
  np.testing.assert_allclose(  # of one row alone, as in decoding
    logits(model, got, tokens[:1, :1]),
    logits(model, params, tokens[:1, :1]),
    atol=1e-5 * float(jnp.ptp(want)),
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ("family", "dtype"),
  [("llama", "bfloat16"), ("qwen2", "bfloat16"), ("qwen2", "float32")],
)
@pytest.mark.sample(2)
def test_a_model_of_floats_is_the_same_in_panels(family, dtype):
  model = support.model(family, tied=False, **SIZES)
  params = jax.tree.map(lambda x: x.astype(dtype), support.params(model))
  got = cpu_layout.to_panels(params)
  names = [
    path
    for path, leaf in tree.flatten_paths(got["run0"]["layer0"])
    if leaf.dtype == jnp.uint32
  ]
  # Matrices of the same input are one; biases, if any, keep their names.
  assert names == [
    "attention/o/panels/words",
    "attention/q_k_v/panels/words",
    "mlp/down/panels/words",
    "mlp/gate_up/panels/words",
  ]
  tokens = support.tokens(vocab=64)
  # In float32 both multiply the very same numbers.
  want = logits(model, params, tokens)
  np.testing.assert_allclose(
    logits(model, got, tokens), want, atol=1e-5 * float(jnp.ptp(want))
  )


def test_for_decoding_selects_the_layout(monkeypatch):
  model = support.model(tied=True, **SIZES)
  plain, packed = support.params(model), packed_params(model)
  for available in (True, False):
    monkeypatch.setattr(cpu, "available", lambda: available)  # noqa: B023
    for params in (plain, packed):
      got = cpu_layout.for_decoding(params)
      assert isinstance(got["embed"], cpu_layout.PanelTensor) == available
      assert (got is params) != available


def test_float32_weights_of_a_bfloat16_model_are_rounded():
  plain = support.params(support.model(tied=True, **SIZES))
  up = cpu_layout.to_panels(plain, dtype="bfloat16")["run0"]["layer0"]["mlp"]
  want = plain["run0"]["layer0"]["mlp"]["down"][:1].astype(jnp.bfloat16)
  np.testing.assert_array_equal(up["down"].dense(), want)


@pytest.mark.slow
def test_text_from_panels_is_the_packed_models():
  model = support.model(tied=True, **SIZES)
  params = packed_params(model)
  prompts = [[3, 5, 7], [11]]
  want = generate.generate(model, params, prompts, 6)
  got = generate.generate(model, cpu_layout.to_panels(params), prompts, 6)
  assert got == want


LEFT = {
  "fp8-e4m3-channel": FP8(),
  "mxfp8": Microscaling(element="e4m3"),
  "mxfp6-e3m2": Microscaling(element="e3m2"),
}


@pytest.mark.parametrize("name", LEFT)
def test_unsupported_formats_are_warned_of_once(name):
  model = support.model(tied=True, **SIZES)
  params = Quantize(format=LEFT[name])(support.params(model))
  with pytest.warns(RuntimeWarning) as told:
    got = cpu_layout.to_panels(params)
  told = [w for w in told if str(w.message).startswith("panels:")]
  assert len(told) == 1 and f"multiplies {name};" in str(told[0].message)
  assert isinstance(got["run0"]["layer0"]["mlp"]["up"], qtensor.QTensor)


def test_supported_formats_raise_no_warning():
  model = support.model(tied=True, **SIZES)
  params = Quantize(format=Affine(bits=4, block=16))(support.params(model))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "quantized_matmul")
    cpu_layout.to_panels(params)
    cpu_layout.to_panels(support.params(model))


def test_outliers_raise_a_warning():
  model = support.model(tied=True, **SIZES)
  params = Quantize(format=Affine(bits=4, block=16))(support.params(model))
  up = params["run0"]["layer0"]["mlp"]["up"]
  *lead, _, outputs = up.shape
  outliers = {
    "rows": jnp.zeros((*lead, 1), jnp.int32),
    "values": jnp.zeros((*lead, 1, outputs)),
  }
  params["run0"]["layer0"]["mlp"]["up"] = dataclasses.replace(
    up, outliers=outliers
  )
  with pytest.warns(RuntimeWarning, match="int4-asym-g16 with outliers;"):
    cpu_layout.to_panels(params)


@pytest.mark.parametrize(
  ("dtype", "packed", "rows", "laid"),
  [
    ("bfloat16", False, 1024, True),
    ("float32", False, 1024, False),
    ("bfloat16", True, 1024, False),
    ("float32", False, 1, True),
    ("float32", True, 1, True),
  ],
)
def test_for_reading_uses_panels_where_that_is_faster(
  dtype, packed, rows, laid
):
  model = support.model(**SIZES).clone(dtype=dtype)
  params = jax.tree.map(lambda x: x.astype(dtype), support.params(model))
  if packed:
    params = packed_params(model)
  found = cpu_layout.for_reading(params, model, rows)
  leaves = jax.tree.leaves(
    found, is_leaf=lambda x: isinstance(x, cpu_layout.PanelTensor)
  )
  assert any(isinstance(x, cpu_layout.PanelTensor) for x in leaves) == laid
  assert (found is params) != laid
