"""Rows, heads and packed matrices over a slice of absent TPUs.

Other tests in this folder do the same on CPUs, with numbers.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels_pallas.flash_attention.sharded import (
  AttentionSharding,
  sharded_attention,
)
from kernels_pallas.masks import Mask
from kernels_pallas.quantized_matmul import planar
from kernels_pallas.quantized_matmul.api import quantized_matmul
from research.planning import chips

pytestmark = pytest.mark.chips


@pytest.fixture(name="mesh")
def _mesh():
  devices = np.asarray(chips.topology("v5e:2x2").devices).reshape(2, 2)
  axes = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.sharding.Mesh(devices, ("data", "tensor"), axis_types=axes)
  with jax.set_mesh(mesh):
    yield mesh


def compiled(f, places, *operands):
  """The text of a program for the mesh, and its kinds of collectives."""
  step = jax.jit(f, in_shardings=places, out_shardings=places)
  text = step.lower(*operands).compile().as_text()
  kinds = r" (all-[\w-]+?|reduce-scatter|collective-permute)(?:-start)?\("
  return text, set(re.findall(kinds, text))


def test_rows_and_heads_need_no_communication(mesh):
  cut = AttentionSharding(batch=("data",), heads=("tensor",))

  def loss(q, k, v):
    o = sharded_attention(q, k, v, mask=Mask.causal(), sharding=cut)
    return o.astype(jnp.float32).sum()

  q, k = (jax.ShapeDtypeStruct((2, 1024, n, 128), jnp.bfloat16) for n in (8, 4))
  place = jax.NamedSharding(mesh, P("data", None, "tensor"))
  text, sent = compiled(jax.grad(loss, (0, 1, 2)), place, q, k, k)
  assert not sent
  assert "flash_attention_forward" in text and "flash_attention_fused" in text


def test_packed_matrices_communicate_only_sums(mesh):
  """Inputs over one axis, outputs over the other, and the gradient."""

  def local(x, w):
    w = dataclasses.replace(w, inputs=w.padded[0], outputs=w.padded[1])
    run = lambda x: jax.lax.psum(quantized_matmul(x, w), "data")  # noqa: E731
    y, pull = jax.vjp(run, x)
    return pull(y)[0], w

  w = jax.eval_shape(
    planar.pack,
    jax.ShapeDtypeStruct((1024, 1024), jnp.int8),
    jax.ShapeDtypeStruct((8, 1024), jnp.float32),
  )
  x = jax.ShapeDtypeStruct((8, 1024), jnp.bfloat16)
  specs = P(None, "data"), P("data", "tensor")
  f = jax.shard_map(local, in_specs=specs, out_specs=specs)
  places = tuple(jax.NamedSharding(mesh, spec) for spec in specs)
  text, sent = compiled(lambda *x: (f(*x)[0], x[1]), places, x, w)
  assert sent == {"all-reduce"}
  for name in ("quantized_matmul_few", "quantized_matmul_gradient"):
    assert name in text
