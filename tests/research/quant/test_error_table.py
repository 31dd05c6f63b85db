"""What every grid loses of normal numbers: a table that must not move."""

import functools

import jax
import jax.numpy as jnp
import pytest

from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.formats.microscaling import Microscaling
from research.quant.formats.nvfp4 import NVFP4


def sym(bits, block):
  return Affine(bits=bits, block=block, symmetric=True)


def asym(block):
  return Affine(block=block)


def book(kind, block, nested=0):
  return Codebook(kind=kind, block=block, nested=nested)


# Root of the mean squared error over the deviation, 2^20 numbers.
TABLE = [
  (book("nf4", 64), 4.5, 0.0919),
  (book("nf4", 64, 256), 4.127, 0.0920),
  (book("nf4", 128), 4.25, 0.0956),
  (book("nf4", 256), 4.125, 0.0986),
  (book("nf4", 4096), 4.008, 0.1101),
  (book("fp4", 64), 4.5, 0.1219),
  (book("fp4", 4096), 4.008, 0.1583),
  (sym(4, 32), 4.5, 0.0947),
  (sym(4, 64), 4.25, 0.1026),
  (sym(4, 128), 4.125, 0.1104),
  (asym(32), 4.625, 0.0808),
  (asym(64), 4.31, 0.0909),
  (asym(128), 4.16, 0.1003),
  (sym(3, 128), 3.125, 0.2367),
  (sym(8, 128), 8.125, 0.0065),
  (Microscaling(rule="floor"), 4.25, 0.1151),
  (Microscaling(rule="even"), 4.25, 0.1117),
  (Microscaling(rule="rceil"), 4.25, 0.1157),
  (NVFP4(), 4.5, 0.0952),
  (NVFP4(divided=False), 4.5, 0.0952),
]


@functools.cache
def numbers():
  return jax.random.normal(jax.random.key(0), (4096, 256))


@functools.partial(jax.jit, static_argnums=1)
def error(w, format):
  off = format.decode(format.encode(w)) - w
  return jnp.sqrt(jnp.mean(off**2) / jnp.mean(w**2))


@pytest.mark.parametrize(
  "format, bits, want",
  TABLE,
  ids=[f"{f.name}-{n}" for n, (f, *_) in enumerate(TABLE)],
)
def test_error_and_bits(format, bits, want):
  # The table has four decimals, and was made of another million numbers.
  got = float(error(numbers(), format))
  assert got == pytest.approx(want, rel=0.01, abs=0.6e-4)
  made = jax.eval_shape(format.encode, numbers())
  used = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made))
  assert 8 * used / numbers().size == pytest.approx(bits, abs=0.006)
