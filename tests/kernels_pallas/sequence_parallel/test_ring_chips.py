"""Attention over a slice's tokens, compiled for absent TPUs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.flash_attention.sharded import (
  AttentionSharding,
  sharded_attention,
)
from kernels_pallas.masks import Mask
from research.planning import chips

pytestmark = pytest.mark.chips


@pytest.mark.parametrize(
  ("way", "expected"),
  [
    ("ring", {"collective-permute-start"}),
    ("length", {"all-gather", "reduce-scatter"}),
    ("ulysses", {"all-to-all"}),
  ],
)
def test_both_directions_compile_with_one_kind_of_collective(way, expected):
  devices = np.asarray(chips.topology("v5e:2x2").devices)
  mesh = jax.sharding.Mesh(
    devices, ("along",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  cut = AttentionSharding(**{way: ("along",)})

  def loss(q, k, v):
    o = sharded_attention(q, k, v, mask=Mask.causal(), sharding=cut)
    return o.astype(jnp.float32).sum()

  q, k = (jax.ShapeDtypeStruct((1, 4096, n, 128), jnp.bfloat16) for n in (8, 4))
  place = jax.sharding.NamedSharding(mesh, jax.P(None, "along"))
  with jax.set_mesh(mesh):
    step = jax.jit(
      jax.grad(loss, (0, 1, 2)), in_shardings=place, out_shardings=place
    )
    text = step.lower(q, k, k).compile().as_text()
  # A reduce-scatter may be fused with an all-reduce into one computation.
  kinds = r" (all-[\w-]+?|reduce-scatter|collective-permute)(-start)?\("
  found = {"".join(m) for m in re.findall(kinds, text)}
  assert found - {"all-reduce"} <= expected and found, found
  assert "flash_attention_forward" in text and "flash_attention_fused" in text
