"""Tests the rounding error of normal numbers in every format: a fixed table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.quant.formats import ggml
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.formats.iq4 import IQ4NL
from research.quant.formats.microscaling import Microscaling
from research.quant.formats.nvfp4 import NVFP4


def sym(bits, block):
  return Affine(bits=bits, block=block, symmetric=True)


def asym(block):
  return Affine(block=block)


def book(kind, block, nested=0):
  return Codebook(kind=kind, block=block, nested=nested)


def block(kind):
  return ggml.TYPES[kind]


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
  (Microscaling(rule="rceil"), 4.25, 0.1157),  # qwix's, which calls it ceil
  (Microscaling(rule="ceil"), 4.25, 0.1442),  # torchao's, measured there
  (NVFP4(), 4.5, 0.0952),
  (NVFP4(divided=False), 4.5, 0.0952),
  (block("Q4_0"), 4.5, 0.0860),
  (block("Q4_1"), 5.0, 0.0782),
  (block("Q5_0"), 5.5, 0.0428),
  (block("Q5_1"), 6.0, 0.0379),
  (block("Q8_0"), 8.5, 0.0054),
  (block("Q2_K"), 2.625, 0.297),
  (block("Q3_K"), 3.4375, 0.151),
  (block("Q4_K"), 4.5, 0.0714),
  (block("Q5_K"), 5.5, 0.0361),
  (block("Q6_K"), 6.5625, 0.0177),
  (IQ4NL(tries=0), 4.5, 0.0787),
  (block("IQ4_NL"), 4.5, 0.0762),
  (block("IQ4_XS"), 4.25, 0.0768),
]


@functools.cache
def numbers():
  return jax.random.normal(jax.random.key(0), (4096, 256))


@functools.partial(jax.jit, static_argnums=1)
def traced(w, format):
  parts = format.encode(w)
  return error(format.decode(parts), w), parts


def error(got, w):
  return jnp.sqrt(jnp.mean((got - w) ** 2) / jnp.mean(w**2))


def measured(format):
  """Returns (error, parts), of blocks by ggml's encoder, which is NumPy's."""
  w = numbers()
  if format.traceable:
    return traced(w, format)
  parts = format.encode(np.asarray(w))
  return error(format.values(parts), w), parts


@pytest.mark.parametrize(
  "format, bits, want",
  TABLE,
  ids=[f"{f.name}-{n}" for n, (f, *_) in enumerate(TABLE)],
)
@pytest.mark.sample(13)
def test_error_and_bits(format, bits, want):
  # The table has four decimals, and was made of another million numbers.
  got, made = measured(format)
  assert float(got) == pytest.approx(want, rel=0.01, abs=0.6e-4)
  used = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made))
  assert 8 * used / numbers().size == pytest.approx(bits, abs=0.006)
