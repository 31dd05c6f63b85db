"""Properties of every quantization format."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import weights
from research.interop import native
from research.quant import qtensor
from research.quant.formats import all_formats, ggml
from research.quant.formats.affine import RULES, Affine
from research.quant.formats.codebook import Codebook
from research.quant.formats.fp8 import FP8
from research.quant.formats.hqq import HQQ
from research.quant.formats.int8 import Int8
from research.quant.formats.microscaling import Microscaling
from research.quant.formats.nvfp4 import NVFP4
from research.quant.layouts import cpu_layout, packing
from research.typing import UserError

INPUTS, OUTPUTS = 256, 24

ROWS = {
  **{f"int{bits}": Affine(bits=bits, block=32) for bits in range(2, 9)},
  "int4 float zero": Affine(zero="float"),
  "int4 all inputs": Affine(block=0),
  "int4 odd number of groups": Affine(block=256),
  **{f"int4 {r}": Affine(symmetric=True, rule=r) for r in RULES},
  "int8 symmetric": Affine(bits=8, symmetric=True, scale_dtype="float32"),
  "nf4": Codebook(),
  "nf4 one level": Codebook(nested=0),
  "fp4": Codebook(kind="fp4", block=32),
  "af4": Codebook(kind="af4"),
  "nf4 across rows": Codebook(block=512),
  **{f"mx {e}": Microscaling(element=e) for e in ("e2m1", "e4m3")},
  "hqq": HQQ(),
  "nvfp4": NVFP4(),
  "fp8": FP8(),
  "int8 of rows": Int8(),
  "fp8 of tiles": FP8(share="tile", tile_inputs=96, tile_outputs=16),
  **ggml.TYPES,
}
every = pytest.mark.parametrize("row", ROWS)

MOVING = {
  "int4 2amax/Q": "its largest positive number is clipped",
  "int8 symmetric": "its largest positive number is clipped",
  "hqq": "its zeros are searched for",
  **{
    row: "magnitudes are coded less their mean"
    for row in ("nf4", "fp4", "af4", "nf4 across rows")
  },
  **{
    row: "its scales are searched for, and coded by the largest"
    for row in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
  },
}
"""Formats that do not encode what they decode to as it was, and why."""


@functools.cache
def matrices():
  x = np.random.default_rng(0).standard_normal((2, INPUTS, OUTPUTS))
  return np.float32(x * np.exp(np.linspace(-1, 1, OUTPUTS)))


_packed = jax.jit(qtensor.pack, static_argnums=1)
_dense = jax.jit(qtensor.QTensor.dense)


def stack(each, row):
  """Returns a stack of two: all of one shape, so that a row compiles once."""
  format = ROWS[row]
  f = _packed if format.traceable else qtensor.pack
  found = [jax.device_get(f(jnp.asarray(w), format)) for w in each]
  return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *found)


@functools.cache
def leaf(row):
  """Returns what all the tests of a row share."""
  return stack(matrices(), row)


def one(row):
  return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[1]), leaf(row))


@functools.cache
def decoded(row):
  return np.asarray(_dense(leaf(row)))


def test_every_format_has_a_row():
  seen = {type(leaf(row).format).__name__ for row in ROWS}
  assert set(all_formats()) == seen


@pytest.mark.parametrize("sign", [1, -1])
def test_a_group_of_one_sign_has_a_grid_that_starts_at_0(sign):
  """So half a step is the most that a weight is moved."""
  rng = np.random.default_rng(3)
  w = np.float32(sign * (1 + rng.random((32, 8))))
  got = np.asarray(_packed(jnp.asarray(w), Affine(bits=4, block=32)).dense())
  most = abs(w).max(0)
  # The step, and so each of 15 of them, is rounded to float16.
  assert np.all(abs(got - w) <= most * (1 / 30 + 2.0**-10))


@every
def test_parts_match_the_layout(row):
  w = leaf(row)
  assert (w.shape, w.ndim, w.dtype) == ((2, INPUTS, OUTPUTS), 3, jnp.float32)
  sizes = {"x": INPUTS // w.format.block, "o": OUTPUTS}
  for name, letters in w.format.layout().items():
    found = w.parts[name].shape[1:]
    assert len(found) == len(letters), name
    known = [n for n, c in zip(found, letters, strict=True) if c == "o"]
    assert all(n == OUTPUTS for n in known), name
    whole = [n for n, c in zip(found, letters, strict=True) if c == "x"]
    # Two small zeros may share a byte.
    assert all(n in (sizes["x"], sizes["x"] // 2) for n in whole), name
  assert set(w.parts) == set(w.format.layout())
  total = sum(np.asarray(x).nbytes for x in w.parts.values())
  assert w.nbytes == total
  assert w.bits_per_weight == 8 * total / (2 * INPUTS * OUTPUTS)


@every
def test_decoded_numbers_are_near_the_originals(row):
  w, got = matrices(), decoded(row)
  bits = []
  jax.eval_shape(lambda w: bits.append(w.normal_form().bits), leaf(row))
  # Of a normal distribution a code more halves the error, from 2 bits' on.
  error = np.sqrt(np.mean((got - w) ** 2, -2) / np.mean(w**2, -2))
  worst = 0.6 * 2.0 ** (2 - min(bits[0], 6))
  # Ternary ones are for weights that are ternary already.
  assert error.max() < (1 if row.startswith("TQ") else worst)
  assert error.min() > 0


@every
def test_packing_again_changes_nothing(row):
  if row in MOVING:
    pytest.skip(MOVING[row])
  again = np.asarray(_dense(stack(decoded(row), row)))
  # A scale may be rounded once more, to a float of 11 bits.
  atol = 2.0**-10 * np.abs(decoded(row)).max(-2, keepdims=True)
  moved = np.abs(again - decoded(row)) > atol
  # A group whose ends fall between two codes may lose its first or last one.
  assert moved.mean() <= (0.02 if row.startswith("int") else 0)


@pytest.mark.parametrize("row", ggml.TYPES)
@pytest.mark.sample(3)
def test_traced_packing_equals_eager_packing(row):
  """Encoders of NumPy, too: AWQ and LoftQ round in the middle of a trace."""
  importance = jnp.linspace(0.5, 2, 2 * INPUTS).reshape(2, INPUTS)
  pack = jax.jit(qtensor.pack, static_argnums=1)
  got = pack(jnp.asarray(matrices()), ROWS[row], importance)
  want = qtensor.pack(matrices(), ROWS[row], importance)
  chex.assert_trees_all_equal(jax.device_get(got), want)


@every
def test_zeros_stay_zeros(row):
  w = stack(np.zeros((2, INPUTS, OUTPUTS), np.float32), row)
  assert not np.asarray(_dense(w)).any()


@jax.jit
def _products(w, x, ids):
  y, pull = jax.vjp(lambda x: weights.einsum("td,df->tf", x, w), x)
  back = weights.einsum("tf,df->td", y, w)
  return (y, pull(jnp.sin(y))[0], back), weights.take(w, ids)


@every
@pytest.mark.sample(3)
def test_products_and_gradients_are_the_dense_ones(row):
  dense = decoded(row)[1]
  x = jnp.asarray(
    np.random.default_rng(1).standard_normal((5, INPUTS)), np.float32
  )
  ids = np.array([[3, 0], [200, 3]])
  got, rows = jax.device_get(_products(one(row), x, jnp.asarray(ids)))
  want, _ = _products(jnp.asarray(dense), x, jnp.asarray(ids))
  # Sums of 256 products.
  for a, b in zip(got, jax.device_get(want), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6 * float(np.abs(b).max()) * 16)
  np.testing.assert_array_equal(rows, dense[ids])


@every
@pytest.mark.sample(2)
def test_an_embedding_decodes_only_requested_rows(row):
  embed = dataclasses.replace(one(row), axis=-1)
  assert embed.shape == (OUTPUTS, INPUTS)
  ids = np.array([[3, 0], [23, 3]])
  got = jax.jit(weights.take)(embed, jnp.asarray(ids))
  np.testing.assert_array_equal(got, decoded(row)[1].T[ids])


@every
def test_a_format_round_trips_through_its_record(row):
  note = json.loads(json.dumps(native._describe({"w": leaf(row)})))
  made = native._abstract(note, "weights")["w"]
  assert jax.tree.structure(made) == jax.tree.structure(leaf(row))


def test_parts_of_another_matrix_are_refused():
  note = json.loads(json.dumps(native._describe({"w": leaf("int4")})))
  ok = note["w"]["parts"]["scale"]
  for wrong in (["float16", 2, 7, OUTPUTS], ["float32", *ok[1:]], None):
    note["w"]["parts"]["scale"] = wrong
    with pytest.raises(UserError, match="scale of int4-asym-g32 is"):
      native._abstract(note, "weights")
  note["w"]["parts"]["scale"] = ok
  note["w"]["inputs"] = INPUTS - 8
  with pytest.raises(UserError, match="no multiple of its block"):
    native._abstract(note, "weights")


@every
@pytest.mark.sample(3)
def test_panels_hold_the_same_numbers(row):
  w = leaf(row)
  if not cpu_layout.is_supported(w):
    pytest.skip("panels hold no such codes")
  got = jax.jit(lambda w: cpu_layout.from_qtensor(w).dense())(w)
  # A zero a group becomes an offset, which is rounded once.
  atol = 2.0**-22 * np.abs(decoded(row)).max(-2, keepdims=True) * 16
  assert (np.abs(np.asarray(got) - decoded(row)) <= atol).all()


@every
def test_axes_name_every_part(row):
  w = leaf(row)
  named = weights.axes(w, ("in", "out"))
  for name, letters in w.format.layout().items():
    want = tuple({"x": "in", "o": "out", ".": None}[c] for c in letters)
    assert named.parts[name] == (None,) * (w.parts[name].ndim - len(want)) + (
      want
    )


# Order and outliers ----------------------------------------------------------


def ordered():
  w = leaf("int4")
  order = jnp.stack(
    [jax.random.permutation(jax.random.key(i), INPUTS) for i in (0, 1)]
  ).astype(jnp.int32)
  rows = jnp.array([[3, 200], [0, 7]], jnp.int32)
  values = jnp.arange(2 * 2 * OUTPUTS, dtype=jnp.float32)
  values = values.reshape(2, 2, OUTPUTS)
  outliers = {"rows": rows, "values": values}
  return dataclasses.replace(w, order=order, outliers=outliers)


def test_order_and_outliers():
  w, want = ordered(), decoded("int4").copy()
  for i in range(2):
    want[i] = want[i][np.asarray(w.order[i])]
    want[i][np.asarray(w.outliers["rows"][i])] = w.outliers["values"][i]
  np.testing.assert_array_equal(w.dense(), want)
  one = jax.tree.map(lambda x: x[0], w)
  x = jnp.asarray(np.random.default_rng(1).standard_normal((5, INPUTS)))
  x = x.astype(jnp.float32)
  got = weights.einsum("td,df->tf", x, one)
  np.testing.assert_allclose(got, x @ want[0], rtol=1e-5, atol=1e-3)
  assert not cpu_layout.is_supported(w)
  named = weights.axes(w, ("in", "out"))
  assert named.order == (None, None)
  assert named.outliers["values"] == (None, None, "out")
  note = json.loads(json.dumps(native._describe({"w": w})))
  made = native._abstract(note, "weights")["w"]
  assert jax.tree.structure(made) == jax.tree.structure(w)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_in_whole_bytes(bits):
  rng = np.random.default_rng(bits)
  codes = rng.integers(0, 2**bits, (3, 24, 5)).astype(np.uint8)
  packed = packing.pack(codes, bits)
  assert packed.shape == (3, 3 * bits, 5)
  np.testing.assert_array_equal(packing.unpack(packed, bits), codes)
  there = jax.jit(packing.pack, static_argnums=1)(jnp.asarray(codes), bits)
  chex.assert_trees_all_equal(np.asarray(there), packed)
  np.testing.assert_array_equal(packing.unpack(there, bits), codes)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Affine(bits=3, block=12), "12 codes of 3 bits do not fill"),
    (lambda: Affine(block=96).for_shape(256, 4), "256 inputs are no multiple"),
    (
      lambda: ggml.GGML().for_shape(40, 4),
      "Q4_0: 40 inputs are no multiple of its",
    ),
  ],
)
def test_mistakes(make, message):
  with pytest.raises(UserError, match=message):
    make()
