"""Tests that large matrices are decoded in slices, in less memory."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import sharding, weights
from research.quant import qtensor
from research.quant.formats import ggml
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.formats.fp8 import FP8
from research.quant.formats.nvfp4 import NVFP4
from research.quant.layouts import products
from research.quant.layouts.products import OutputAxis

INPUTS, OUTPUTS, EXPERTS = 256, 96, 3
FORMATS = {
  "int4": Affine(),
  "nf4 of two levels": Codebook(),
  "nvfp4": NVFP4(),
  "fp8 of tiles": FP8(share="tile", tile_inputs=96, tile_outputs=20),
  "Q4_K": ggml.TYPES["Q4_K"],
}
every = pytest.mark.parametrize("name", FORMATS)


@functools.cache
def leaf(name):
  w = np.random.default_rng(0).normal(size=(EXPERTS, INPUTS, OUTPUTS))
  packed = qtensor.pack(jnp.asarray(w, jnp.float32), FORMATS[name])
  # A third of them in another order, one in full precision.
  order = np.tile(np.arange(INPUTS, dtype=np.int32), (EXPERTS, 1))
  order[:, :85] = order[:, :85][:, ::-1]
  rows = jnp.full((EXPERTS, 1), 7, jnp.int32)
  values = jnp.ones((EXPERTS, 1, OUTPUTS))
  return dataclasses.replace(
    jax.tree.map(jnp.asarray, packed),
    order=jnp.asarray(order),
    outliers={"rows": rows, "values": values},
  )


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """About five pieces a matrix: 6, since 5 do not divide its outputs."""
  monkeypatch.setattr(products, "PIECE", INPUTS * OUTPUTS * 4 // 5)


def both(f, x):
  """Returns a product and a gradient of it."""
  y, pull = jax.vjp(f, x)
  dy = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
  return y, pull(dy.astype(y.dtype))[0]


def compared(product, x, w, dense):
  f = jax.jit(lambda x, w: both(lambda x: product(x, w), x))
  got, want = f(x, w), f(x, dense)
  # Sums of 256 products in another order; in 16 bits, each piece is rounded.
  eps = 16 * float(jnp.finfo(x.dtype).eps)
  for a, b in zip(got, want, strict=True):
    assert a.dtype == b.dtype
    a, b = np.float32(a), np.float32(b)
    np.testing.assert_allclose(a, b, atol=eps * float(np.abs(b).max()))


EQUATIONS = {  # left and right of `w`, the shape of x, and where outputs are
  "bi,io->bo": ((5, INPUTS), OutputAxis(True, 1)),
  "...i,io->...o": ((2, 5, INPUTS), OutputAxis(True, -1)),
  "...o,io->...i": ((2, 5, OUTPUTS), OutputAxis(False, -1)),
  "b...i,io->bo...": ((2, 5, INPUTS), OutputAxis(True, 1)),
  "bo...,io->i...b": ((2, OUTPUTS, 5), OutputAxis(False, 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("eq", EQUATIONS)
@pytest.mark.cover(1)
def test_einsum_in_any_order_of_letters(eq, dtype):
  shape, along = EQUATIONS[eq]
  left, out = eq.split(",")[0], eq.split("->")[1]
  assert products.output_axis(left, "o", out) == along
  w = jax.tree.map(lambda x: x[1], leaf("int4"))
  assert products.piece_count(w, products.PIECE) == 6
  x = jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)
  compared(functools.partial(weights.einsum, eq), x, w, w.dense())


@pytest.mark.parametrize("axis", [-2, -1])
@every
@pytest.mark.cover(1)
@pytest.mark.sample(4)
def test_every_kind_of_part_is_sliced(name, axis):
  w = dataclasses.replace(leaf(name), axis=axis)
  one = jax.tree.map(lambda x: x[1], w)
  assert products.piece_count(one, products.PIECE) == 6
  rng = np.random.default_rng(2)
  for eq, n in (("ti,io->to", 0), ("to,io->ti", 1)):
    x = jnp.asarray(rng.normal(size=(4, one.shape[n])), jnp.float32)
    compared(functools.partial(weights.einsum, eq), x, one, one.dense())
  ids = jnp.array([[3, 0], [OUTPUTS - 1, 3]])
  np.testing.assert_array_equal(weights.take(one, ids), one.dense()[ids])


@pytest.mark.parametrize("axis", [-2, -1])
@every
@pytest.mark.cover(1)
@pytest.mark.sample(4)
def test_experts(name, axis):
  w = dataclasses.replace(leaf(name), axis=axis)
  assert products.piece_count(w, products.PIECE) > 6
  x = np.random.default_rng(3).normal(size=(10, w.shape[1]))
  sizes = jnp.array([4, 0, 5])  # the last row is no expert's
  product = lambda x, w: weights.ragged_dot(x, w, sizes)  # noqa: E731
  compared(product, jnp.asarray(x, jnp.float32), w, w.dense())


def test_sizes_of_experts_of_any_integers():
  """Each fits int8, unlike their sum."""
  w, sizes = leaf("int4"), np.array([100, 90, 60])
  x = np.random.default_rng(3).normal(size=(sizes.sum() + 1, w.shape[1]))
  x, dense = jnp.asarray(x, jnp.float32), w.dense()
  owner = np.repeat(np.arange(len(sizes)), sizes)
  want = np.einsum("ti,tio->to", x[:-1], dense[owner])
  got = weights.ragged_dot(x, w, jnp.asarray(sizes, jnp.int8))
  chex.assert_trees_all_close(got[:-1], want, atol=1e-4)
  assert not np.any(got[-1])


def test_stacks_of_matrices():
  w = leaf("int4")
  x = np.random.default_rng(3).normal(size=(EXPERTS, 5, INPUTS))
  f = functools.partial(weights.einsum, "eti,eio->eto")
  compared(f, jnp.asarray(x, jnp.float32), w, w.dense())


def test_batches_of_a_product():
  w = jax.tree.map(lambda x: x[0], leaf("nf4 of two levels"))
  x = jnp.asarray(np.random.default_rng(4).normal(size=(3, 2, INPUTS)), "f4")
  f = functools.partial(weights.einsum, "ti,io->to")
  got = jax.jit(jax.vmap(f, (0, None)))(x, w)
  chex.assert_trees_all_close(got, x @ w.dense(), atol=1e-4)


# Memory ----------------------------------------------------------------------

WIDE = 16 << 20  # bytes of a decoded matrix below
MATRICES = {
  "einsum": (lambda x, w: weights.einsum("ti,io->to", x, w), (), 0),
  "its transpose": (lambda x, w: weights.einsum("to,io->ti", x, w), (), 1),
  "of odd letters": (lambda x, w: weights.einsum("it,io->ot", x.T, w), (), 0),
  "experts": (
    lambda x, w: weights.ragged_dot(x, w, jnp.array([4, 4])),
    (2,),
    0,
  ),
}


def packed_shape(format, lead):
  """Returns a matrix `[I, O]`, or one an expert, of 16 MB, as shapes."""
  outputs = 8192 // (lead[0] if lead else 1)
  w = jax.ShapeDtypeStruct((*lead, 512, outputs), jnp.float32)
  return jax.eval_shape(functools.partial(qtensor.pack, format=format), w)


@pytest.mark.parametrize("format", [Affine(), Codebook()], ids=lambda f: f.name)
@pytest.mark.parametrize("case", MATRICES)
@pytest.mark.cover(1)
def test_no_program_holds_a_whole_large_matrix(case, format, monkeypatch):
  product, lead, side = MATRICES[case]
  w = packed_shape(format, lead)
  assert 4 * np.prod(w.shape) == WIDE
  x = jax.ShapeDtypeStruct((8, w.shape[-2:][side]), jnp.float32)

  def temporaries():
    f = jax.jit(lambda x, w: both(lambda x: product(x, w), x))
    return f.lower(x, w).compile().memory_analysis().temp_size_in_bytes

  monkeypatch.setattr(products, "PIECE", 2 << 20)
  assert temporaries() < WIDE / 2
  monkeypatch.setattr(products, "PIECE", WIDE)
  assert temporaries() >= WIDE


def test_small_and_sharded_matrices_are_decoded_at_once():
  w = packed_shape(Affine(), ())
  assert products.piece_count(w, WIDE // 4) == 1
  assert products.piece_count(w, 2 << 20) == 8
  flat = packed_shape(Codebook(block=4096), ())
  assert products.piece_count(flat, 2 << 20) == 1  # blocks across rows
  with jax.set_mesh(sharding.Layout(data=1, fsdp=2, tensor=2).mesh()):
    assert products.piece_count(w, 2 << 20) == 1
