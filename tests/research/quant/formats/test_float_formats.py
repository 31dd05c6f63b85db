"""Tests FP8, MX and NVFP4 against bytes of torchao and compressed-tensors."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from research import weights
from research.quant import methods, qtensor
from research.quant.formats.fp8 import FP8
from research.quant.formats.microscaling import Microscaling
from research.quant.formats.nvfp4 import NVFP4
from research.quant.layouts import packing
from research.typing import UserError

GOLDEN = json.loads(
  (pathlib.Path(__file__).parents[3] / "golden" / "compressed.json").read_text()
)
ELEMENTS = ["e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "int8"]
RULES = ["floor", "ceil", "rceil", "even"]
FORMATS = {
  **{f"mx {e}": Microscaling(element=e) for e in ELEMENTS},
  "mx search": Microscaling(search=1),
  "nvfp4": NVFP4(),
  "nvfp4 search": NVFP4(search=5),
  "fp8 channel": FP8(),
  "fp8 tensor": FP8(share="tensor"),
  "fp8 tile": FP8(share="tile", tile_inputs=24, tile_outputs=16),
  "fp8 e5m2": FP8(element="e5m2", scale_dtype="bfloat16"),
}


def array(found):
  dtype, shape, raw = found
  dtype = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
  return np.frombuffer(bytes.fromhex(raw), dtype).reshape(shape)


@functools.cache
def packer(format):
  return jax.jit(lambda w: qtensor.pack(w, format))


def gaussian(*shape, seed=0, std=1.0):
  w = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray((std * w).astype(np.float32))


_dense = jax.jit(weights.dense)


def decoded(w, format):
  return np.asarray(_dense(packer(format)(w)))


def error(w, format):
  """Returns the error of the decoded matrix over the deviation."""
  off = decoded(w, format) - np.asarray(w)
  return float(np.sqrt(np.mean(off**2)) / np.std(w))


def matrix(outputs, inputs):
  """Returns `[inputs, outputs]`; the rule of make_compressed.py."""
  t = np.arange(outputs * inputs, dtype=np.float64)
  x = np.sin(0.7 * t + 0.3) * (0.5 + (37 * t % 101) / 101)
  return jnp.asarray(x.astype(np.float32).reshape(outputs, inputs).T)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("element", ELEMENTS[:-1])
def test_microscaling_is_torchaos_byte_for_byte(element, rule):
  want_scale, want = (
    np.frombuffer(bytes.fromhex(x), np.uint8)
    for x in GOLDEN["microscaling"][f"{element} {rule}"]
  )
  w = jnp.asarray(array(GOLDEN["normal"])).T
  format = Microscaling(element=element, rule=rule)
  got = packer(format)(w)
  scale = np.asarray(got.parts["scale"])
  np.testing.assert_array_equal(scale.T.reshape(-1), want_scale)
  codes = packing.unpack(np.asarray(got.parts["codes"]), format.bits)
  codes = codes.reshape(w.shape).T.reshape(-1)
  if element == "e2m1":
    codes = codes[::2] | codes[1::2] << 4
  np.testing.assert_array_equal(codes, want)


def test_integers_are_scaled_by_their_rules():
  w = jnp.asarray([[1.99, 1.995, -2.0], [0.5, 1.0, 1 / 64]], jnp.float32)
  want = {"floor": [127, 127, 128], "even": [127, 128, 128]}
  for rule, scale in want.items():
    format = Microscaling(element="int8", rule=rule, block=2)
    got = packer(format)(w)
    np.testing.assert_array_equal(got.parts["scale"][0], scale)
  codes = [[127, 64, -64], [32, 32, 0]]  # 1/64 of 2 is halfway to a code: even
  np.testing.assert_array_equal(got.parts["codes"][0], codes)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.sample(5)
def test_a_matrix_decodes_alike_in_every_way(name):
  format = FORMATS[name]
  w = gaussian(3, 96, 40)
  stack = packer(format)(w)
  assert stack.shape == w.shape and stack.dtype == w.dtype
  dense = np.asarray(_dense(stack))
  one = packer(format)(w[1])
  np.testing.assert_array_equal(_dense(one), dense[1])
  np.testing.assert_array_equal(
    jax.jit(lambda q: q.normal_form().dense())(stack), dense
  )
  if name != "nvfp4 search":  # which may move the largest number
    again = decoded(jnp.asarray(dense), format)
    # A scale that is no power of two may come back an ulp away.
    np.testing.assert_allclose(again, dense, rtol=3e-7)
  if format.sliceable:
    piece = jax.jit(lambda q: q.output_slice(jnp.int32(1), 8).stored())(one)
    np.testing.assert_array_equal(piece, dense[1][:, 8:16])
  x = gaussian(5, 96, seed=1)
  got = jax.jit(lambda q, x: q.einsum("ti,io->to", x))(one, x)
  np.testing.assert_allclose(got, np.asarray(x) @ dense[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
  "format, bits",
  [
    (Microscaling(), 4.25),
    (Microscaling(element="e2m3"), 6.25),
    (Microscaling(element="e3m2"), 6.25),
    (Microscaling(element="e4m3"), 8.25),
    (Microscaling(element="int8"), 8.25),
    (NVFP4(), 4.5 + 32 / (64 * 64)),
    (FP8(), 8.5),
    (FP8(share="tensor"), 8 + 32 / 4096),
    (FP8(share="tile", tile_inputs=32, tile_outputs=32), 8 + 4 * 32 / 4096),
  ],
  ids=lambda x: getattr(x, "name", None),
)
def test_bytes_are_counted(format, bits):
  assert packer(format)(gaussian(64, 64)).bits_per_weight == bits


@pytest.mark.slow
def test_more_bits_and_searches_reduce_errors():
  w = gaussian(3, 96, 40)  # compiled for already
  by = {name: error(w, format) for name, format in FORMATS.items()}
  assert by["mx e2m3"] < by["mx e3m2"] < by["mx search"] < by["mx e2m1"]
  assert by["mx int8"] < by["mx e4m3"] < by["mx e5m2"]
  assert by["nvfp4 search"] < 0.97 * by["nvfp4"]
  assert by["fp8 channel"] < by["fp8 e5m2"]


def test_small_weights_need_the_divisor():
  w = gaussian(128, 128, std=1e-3)
  assert error(w, NVFP4()) == pytest.approx(0.0952, rel=0.03)
  assert error(w, NVFP4(divided=False)) > 0.2


def test_importance_decides_a_search():
  w = gaussian(64, 32)
  weigh = jnp.where(jnp.arange(64) % 16 == 3, 1000.0, 1.0)[:, None]
  for format in (Microscaling(search=1), NVFP4(search=5)):

    @jax.jit
    def off(importance, format=format):
      got = format.decode(format.encode(w, importance))
      return jnp.mean((got - w) ** 2 * weigh)

    assert off(weigh[:, 0]) < 0.95 * off(jnp.ones(64))


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_tiny_and_huge_numbers_stay_finite(name):
  format = FORMATS[name]
  w = np.zeros((96, 16), np.float32)
  w[:, 1], w[:, 2], w[5, 3], w[:, 4] = 1e-30, 1e38, -7.0, -1e-38
  dense = decoded(jnp.asarray(w), format)
  assert np.isfinite(dense).all()
  np.testing.assert_array_equal(dense[:, 0], 0)
  whole = isinstance(format, NVFP4) or format.name.endswith(("tensor", "24x16"))
  if not whole:
    assert dense[5, 3] == pytest.approx(-7, rel=0.15)
    np.testing.assert_allclose(dense[:, 1], 1e-30, rtol=0.25)
  np.testing.assert_allclose(dense[:, 2], 1e38, rtol=0.25)
  w[7, 5] = np.nan
  broken = decoded(jnp.asarray(w), format)
  assert np.isnan(broken[7, 5])


@pytest.mark.slow
def test_grids_are_what_encoding_uses():
  """As GPTQ uses them, group by group."""
  w = gaussian(64, 8)
  for format in (Microscaling(element="e2m3"), Microscaling(), NVFP4()):

    @jax.jit
    def by_grids(w, format=format):
      groups = w.reshape(-1, format.block, 8)
      grid = format.grid(groups)
      codes = format.codes(groups, *grid)
      return format.parts(codes, *grid), codes, grid

    got, codes, grid = by_grids(w)
    want = jax.jit(format.encode)(w)
    for name, part in want.items():
      np.testing.assert_array_equal(got[name], part)
    # Eagerly: fused with what made them, values may be an ulp away.
    values = format.values(codes, *grid).reshape(64, 8)
    np.testing.assert_array_equal(values, format.decode(want))


@pytest.mark.parametrize("name", ["nvfp4", "fp8 tile"])
def test_packing_over_a_mesh_changes_no_byte(name):
  """Scales of a whole matrix are those of all its pieces."""
  kinds = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((2, 4), ("in", "out"), axis_types=kinds)
  cut = jax.sharding.NamedSharding(mesh, jax.P("in", "out"))
  w = gaussian(96, 40)
  got = packer(FORMATS[name])(jax.device_put(w, cut))
  want = packer(FORMATS[name])(w)
  assert len(got.parts["codes"].sharding.device_set) == 8
  for part, x in want.parts.items():
    np.testing.assert_array_equal(got.parts[part], x)
  np.testing.assert_array_equal(_dense(got), _dense(want))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mx e2m1", "fp8 channel"])
@pytest.mark.sample(2)
def test_compensated_rounding_halves_the_error(name):
  """Of outputs whose inputs are alike; also of codes that include NaN."""
  format, w = FORMATS[name], gaussian(96, 8)
  x = gaussian(512, 96, seed=1) @ (0.3 * gaussian(96, 96, seed=2) + jnp.eye(96))
  seen = {"n": jnp.array([512.0]), "xx": x.T @ x}

  @jax.jit
  def parts(w):
    return methods.GPTQMethod().parts([w], seen, format, None)[0][0]

  got = dataclasses.replace(packer(format)(w), parts=parts(w))
  x, pair = np.asarray(x), (got, packer(format)(w))
  off = [np.mean((x @ (np.asarray(_dense(q)) - w)) ** 2) for q in pair]
  assert off[0] < 0.6 * off[1]


@pytest.mark.parametrize(
  "make, match",
  [
    (lambda: Microscaling(block=31), "multiple of"),
    (lambda: qtensor.pack(gaussian(40, 8), NVFP4()), "40 inputs"),
  ],
)
def test_refused(make, match):
  with pytest.raises(UserError, match=match):
    make()


def test_kernels_get_integers_or_sixteen_values():
  """Panels support 4 bits of a codebook, or integers of 8 bits."""
  for name in ("mx e2m1", "mx e2m3", "mx int8", "nvfp4"):
    plain = packer(FORMATS[name])(gaussian(96, 40)).normal_form()
    assert plain.codebook is None or len(plain.codebook) == 16
    assert plain.bits == (4 if plain.codebook else 8)
