"""Training programs over a mesh of GPUs, lowered without one.

By its type, a kernel's result has to differ between devices, as its operands
do: otherwise JAX rejects its gradients, or adds up the cotangents of all
devices. Plain lax gives the collectives that a program should have.
"""

import collections

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import subjaxprs

from kernels_pallas.flash_attention.sharded import (
  AttentionSharding,
  sharded_attention,
)
from kernels_pallas.masks import Mask
from tests.support_gpu import needs_kernels

pytestmark = needs_kernels

CUTS = {
  "rows": AttentionSharding(batch=("a",), heads=("b",)),
  "gathered": AttentionSharding(batch=("a",), length=("b",)),
  "ring": AttentionSharding(batch=("a",), ring=("b",)),
  "exchanged": AttentionSharding(batch=("a",), ulysses=("b",)),
}
COLLECTIVES = (
  "psum", "psum_invariant", "all_gather", "reduce_scatter", "all_to_all",
  "ppermute",
)  # fmt: skip


def collectives(jaxpr):
  """Counts the calls of each collective, loops' bodies once."""
  found = collections.Counter(
    eqn.primitive.name
    for eqn in jaxpr.eqns
    if eqn.primitive.name in COLLECTIVES
  )
  return sum(map(collectives, subjaxprs(jaxpr)), found)


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.sample(4)
def test_gradients_have_the_collectives_of_plain_lax(cut):
  device = jax.sharding.AbstractDevice(
    "NVIDIA H100 80GB HBM3", None, platform="gpu"
  )
  mesh = jax.sharding.AbstractMesh(
    (2, 2), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2,
    abstract_device=device,
  )  # fmt: skip
  x = {n: jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16) for n in "qkv"}
  x["sinks"] = jax.ShapeDtypeStruct((4,), jnp.float32)

  def program(backend):
    def loss(x):
      o, lse = sharded_attention(
        **x, mask=Mask.causal(), sharding=CUTS[cut], backend=backend,
        return_lse=True,
      )  # fmt: skip
      return jnp.sum(o.astype(jnp.float32)) + jnp.sum(lse)

    return jax.jit(jax.grad(loss)).trace(x)

  with jax.sharding.use_abstract_mesh(mesh):
    ours, plain = program("mosaic_gpu"), program("xla_blockwise")
    text = ours.lower(lowering_platforms=("cuda",)).as_text()
  assert "mosaic_gpu" in text
  assert collectives(ours.jaxpr.jaxpr) == collectives(plain.jaxpr.jaxpr)
