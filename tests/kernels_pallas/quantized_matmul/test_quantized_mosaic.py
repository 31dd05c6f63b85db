"""The TPU kernels, interpreted on the CPU, against float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.quantized_matmul import api, planar
from kernels_pallas.quantized_matmul.activations import quantize_rows
from kernels_pallas.quantized_matmul.planar_matmul import planar_matmul
from kernels_pallas.quantized_matmul.tpu import dequantize
from kernels_pallas.quantized_matmul.tpu.problem import (
  Tile,
  fit,
  prepare,
)
from kernels_pallas.quantized_matmul.tpu.tile_sizes import Config
from tests.kernels_pallas.planar_cases import KINDS, NF4, Q4_0, case

# Interpreted kernels are large programs over tiny arrays.
quick = functools.partial(
  jax.jit,
  compiler_options={
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
  },
)
SMALL = Tile(16, 128, 128)
CONFIG = Config(SMALL, SMALL, SMALL)


def run(x, w, config=CONFIG, activations=None, interpret=True):
  """Returns the product by the kernels, interpreted."""
  return planar_matmul(x, w, "mosaic_tpu", activations, config, interpret)


def draw(*shape, dtype=np.float32):
  rng = np.random.default_rng(shape)
  return jnp.asarray(rng.standard_normal(shape), dtype)


def absolute(kind):
  """Returns [I, O]: size of the numbers that are summed for a weight.

  Codes are 16 larger inside the kernels, and offsets cancel that.
  """
  w, parts, matrix = case(kind)
  largest = 32 if w.bits == 4 else 128
  own = np.arange(w.inputs) // w.group
  terms = np.abs(matrix) + largest * np.abs(np.float64(parts[1]))[own]
  return (
    terms if parts[2] is None else terms + np.abs(np.float64(parts[2]))[own]
  )


def bound(kind, x, y, rounded, transposed=False):
  """Returns the error bound of products.

  Args:
    kind: Kind of the matrix.
    x: Activations.
    y: float64 [M, O], the exact product.
    rounded: Whether scaled weights are rounded to the type of x.
    transposed: For `x W^T`.
  """
  _, _, matrix = case(kind)
  terms, matrix = absolute(kind), np.abs(matrix)
  if transposed:
    terms, matrix = terms.T, matrix.T
  size = np.abs(np.float64(x))
  slack = (x.shape[1] + 8) * 2.0**-24 * (size @ terms)
  if x.dtype == jnp.bfloat16:
    # The result is rounded; entries of codebooks or weights are.
    entries = rounded or kind == "nf4"
    slack += 2.0**-8 * np.abs(y) + entries * 2.0**-8 * (size @ matrix)
  return slack


ENTRIES = {
  "nf4": NF4,
  "signed": Q4_0,
  "mixed": (3.5, -1e-3, 7.0, -0.0, 2.0**-20, *range(-5, 5), 1e30),
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.cover(1)
def test_levels_are_the_entries_exactly(name, dtype):
  codebook = tuple(map(float, ENTRIES[name]))
  codes = np.random.default_rng(0).integers(0, 16, (256, 256), np.uint8)
  w = planar.pack(codes, np.ones((1, 256), np.float32), codebook=codebook)
  found = jax.jit(
    lambda words: dequantize.levels(
      words, codebook, dtype, dequantize.tables(codebook, dtype)
    )
  )(w.codes)
  assert found.dtype == dtype
  want = jnp.asarray(codebook, dtype)[codes].astype(jnp.float32)
  np.testing.assert_array_equal(
    found.astype(jnp.float32) + dequantize.base(codebook), want
  )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "most"), [(1, 999), (13, 999), (21, 0)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cover(1)
def test_products(kind, rows, most, dtype):
  w, _, matrix = case(kind)
  x = draw(rows, w.inputs, dtype=dtype)
  config = Config(SMALL, SMALL, SMALL, most)
  got = quick(lambda x, w: run(x, w, config))(x, w)
  chex.assert_shape(got, (rows, w.outputs))
  assert got.dtype == x.dtype
  want = np.float64(x) @ matrix
  off = np.abs(np.float64(got) - want)
  assert np.all(off <= bound(kind, x, want, rounded=most == 0))


def test_many_rows_in_tiles_as_on_a_chip():
  """512 rows, as in a prefill, with default tiles."""
  codes = np.random.default_rng(0).integers(0, 16, (1000, 600), np.uint8)
  scale = np.full((8, 600), 0.5, np.float32)
  w = planar.pack(codes, scale, group=128, codebook=Q4_0)
  x = draw(512, 1000, dtype=jnp.bfloat16)
  matrix = (codes - 8.0) / 2
  got = quick(lambda x, w: run(x, w, Config()))(x, w)
  want = np.float64(x) @ matrix
  # Weights are exact in bfloat16: the result is rounded, sums of 1000 are not.
  slack = 2.0**-8 * np.abs(want) + 1e3 * 2.0**-24 * np.abs(x) @ np.abs(matrix)
  assert np.all(np.abs(np.float64(got) - want) <= slack)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cover(1)
def test_the_input_gradient(kind, dtype):
  w, _, matrix = case(kind)
  dy = draw(19, w.outputs, dtype=dtype)

  @quick
  def gradient(w, dy):
    x = jnp.zeros((19, w.inputs), dy.dtype)
    f = lambda x: run(x, w)  # noqa: E731
    return jax.vjp(f, x)[1](dy)[0]

  dx = gradient(w, dy)
  assert dx.dtype == dy.dtype
  want = np.float64(dy) @ matrix.T
  off = np.abs(np.float64(dx) - want)
  assert np.all(off <= bound(kind, dy, want, True, transposed=True))


def test_the_backward_pass_saves_only_packed_weights():
  w, _, _ = case("signed")
  x = draw(3, w.inputs)

  def pull(x, w):
    return jax.vjp(
      lambda x: run(x, w), x
    )[1]  # fmt: skip

  kept = sum(
    part.size * part.dtype.itemsize
    for part in jax.tree.leaves(jax.eval_shape(pull, x, w))
  )
  assert kept <= sum(part.nbytes for part in jax.tree.leaves(w))


@pytest.mark.parametrize("rows", [3, 37])
@pytest.mark.parametrize("kind", ["int8, channels", "int8, groups"])
def test_int8_activations_are_summed_as_integers(kind, rows):
  w, parts, _ = case(kind)
  x = draw(rows, w.inputs)
  codes, unit = map(np.asarray, quantize_rows(x))
  np.testing.assert_allclose(unit[:, 0] * 127, np.abs(x).max(1), rtol=1e-6)
  assert np.abs(codes).max(1).tolist() == [127] * rows
  assert np.all(np.abs(codes * unit - x) <= unit / 2 * (1 + 1e-5))
  got = quick(
    lambda x, w: run(x, w, activations=jnp.int8)
  )(x, w)  # fmt: skip
  # Exact integers, then one scale a group: rounded as many times.
  _, _, matrix = case(kind)
  want = np.float64(codes) @ matrix * unit
  groups = len(parts[1]) + 4
  slack = groups * 2.0**-23 * np.abs(codes * unit) @ absolute(kind)
  assert np.all(np.abs(got - want) <= slack)


def test_a_row_of_zeros_stays_zero():
  codes, unit = quantize_rows(jnp.zeros((2, 5)))
  assert not np.any(codes) and not np.any(unit)


@pytest.mark.parametrize(
  ("kind", "backend", "activations"),
  [
    ("nf4", "reference", None),
    ("nf4", "xla", None),
    ("nf4", "auto", None),
    ("int8, channels", "xla", jnp.int8),
    ("int8, groups", "auto", jnp.int8),
  ],
)
def test_every_backend_agrees(kind, backend, activations):
  """On the CPU 'auto' is XLA, since kernels are for TPUs."""
  w, _, matrix = case(kind)
  x = draw(2, 3, w.inputs)
  how = dict(backend=backend, activations=activations)
  f = functools.partial(api.quantized_matmul, w=w, **how)
  y, pull = jax.vjp(f, x)
  chex.assert_shape(y, (2, 3, w.outputs))
  flat = x.reshape(6, -1)
  if activations is not None:
    codes, unit = quantize_rows(flat)
    flat = np.float64(codes) * np.float64(unit)
  off = np.abs(np.float64(y).reshape(6, -1) - np.float64(flat) @ matrix)
  assert np.all(off <= bound(kind, jnp.asarray(flat), 0, rounded=True))
  np.testing.assert_allclose(
    pull(jnp.ones_like(y))[0][0, 0], matrix.sum(1), rtol=1e-4, atol=1e-3
  )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(backend="cpu"), "found Planar, expected Panels"),
    (dict(backend="triton"), "backend: found 'triton'"),
    (dict(activations=jnp.int8), "int8 with 4-bit codes"),
    (dict(activations=jnp.int8, backend="reference"), "'reference', which"),
    (dict(x=draw(2, 7)), r"found x \(2, 7\)"),
  ],
)
def test_mismatched_calls_raise(change, message):
  w, _, _ = case("signed")
  arguments = dict(x=draw(2, 260), w=w) | change
  with pytest.raises(ValueError, match=message):
    api.quantized_matmul(**arguments)


@pytest.mark.parametrize("backend", ["mosaic", "cpu", "reference"])
def test_an_unknown_backend_of_planar_matmul_raises(backend):
  w, _, _ = case("signed")
  with pytest.raises(ValueError, match=f"found '{backend}', available: auto"):
    planar_matmul(draw(2, 260), w, backend)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "most"), [("affine", 999), ("nf4", 0), ("int8, channels", 999)]
)
@pytest.mark.sample(4)
def test_kernels_do_not_race_or_read_uninitialized_memory(
  tpu_interpreter, kind, most
):
  """With memory full of NaN, and parallel grid steps in random order."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  w, _, _ = case(kind)
  x = draw(21, w.inputs)
  config = Config(SMALL, SMALL, SMALL, most)

  def both(interpret):
    f = lambda x: run(x, w, config, interpret=interpret)  # noqa: E731
    y, pull = jax.vjp(f, x)
    return y, pull(jnp.ones_like(y))[0]

  found = both(tpu_interpreter)
  assert not interpret_pallas_call.races.races_found
  chex.assert_trees_all_close(
    found, quick(lambda: both(True))(), rtol=1e-5, atol=1e-4
  )


@pytest.mark.parametrize("size", [128, 640, 1024, 1152, 5504, 11008, 14336])
def test_tiles_cover_with_little_padding(size):
  tile, count = fit(size, 1024, 128)
  assert tile % 128 == 0 and tile <= 1024
  assert (count - 1) * tile < size <= count * tile
  assert count * tile <= 1.15 * size


@pytest.mark.parametrize("group", [128, 384, 640, 2048])
def test_steps_and_groups_divide_each_other(group):
  codes = np.zeros((3840, 128), np.int8)
  w = planar.pack(codes, np.ones((-(-3840 // group), 128), "f4"), group=group)
  p = prepare(w, Tile(8, 512, 128))
  assert p.tile.inputs % group == 0 or group % p.tile.inputs == 0
  assert p.tile.inputs * p.steps[0] >= 3840


@pytest.mark.parametrize(
  ("inputs", "group"),
  [(3840, 128), (3840, 640), (640, 640), (4096, 4096), (11008, 11008)],
)
def test_every_step_reads_the_scales_of_its_inputs(inputs, group):
  codes = np.zeros((inputs, 128), np.int8)
  w = planar.pack(codes, np.ones((inputs // group, 128), "f4"), group=group)
  p = prepare(w, Tile(8, 512, 128))
  place = p.specs(lambda k, o: (k, o))["scale"].index_map
  blocks, each, _ = p.arrays["scale"].shape
  found = np.array([int(place(k, 0)[0]) for k in range(p.steps[0])])
  first = np.arange(p.steps[0]) * p.tile.inputs
  np.testing.assert_array_equal(found * each, first // group)
  assert found.max() < blocks


def test_calls_unsupported_on_tpus_raise():
  w, _, _ = case("signed")
  with pytest.raises(ValueError, match="expected bfloat16 or float32"):
    run(draw(2, 260, dtype=np.float16), w)
  with pytest.raises(ValueError, match="int8 with 4-bit codes"):
    run(draw(2, 260), w, activations=jnp.int8)
  with pytest.raises(ValueError, match="multiples of 128"):
    Tile(8, 100, 128)
