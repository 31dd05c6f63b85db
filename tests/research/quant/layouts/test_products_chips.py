"""Tests that on a TPU a product holds only a slice of a large packed matrix."""

import functools

import jax
import jax.numpy as jnp
import pytest

from research import weights
from research.planning import chips
from research.quant import qtensor
from research.quant.formats.codebook import Codebook
from research.quant.layouts import products

pytestmark = pytest.mark.chips

INPUTS, OUTPUTS, TOKENS = 4096, 16384, 2048
WIDE = 4 * INPUTS * OUTPUTS


@pytest.mark.parametrize("eq, inputs", [("ti,io->to", 1), ("to,io->ti", 0)])
def test_no_program_holds_a_whole_large_matrix(eq, inputs, monkeypatch):
  chip = chips.topology("v5e:1x1").devices[0]
  there = jax.sharding.SingleDeviceSharding(chip)

  def on_chip(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)

  like = jnp.bfloat16
  w = jax.eval_shape(
    functools.partial(qtensor.pack, format=Codebook()),
    jax.ShapeDtypeStruct((INPUTS, OUTPUTS), like),
  )
  x = jax.ShapeDtypeStruct((TOKENS, INPUTS if inputs else OUTPUTS), like)
  x, w = jax.tree.map(on_chip, (x, w))

  def temporaries():
    f = jax.jit(functools.partial(weights.einsum, eq)).lower(x, w).compile()
    return f.memory_analysis().temp_size_in_bytes

  # 4 MB of 256 in the pieces that are used, 133 and 256 MB without.
  assert temporaries() < WIDE / 16
  monkeypatch.setattr(products, "LARGE_PIECE", WIDE)
  assert temporaries() > WIDE / 3
