"""Objectives of masked diffusion on a mesh are what they are off it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.diffusion.block import BlockDiffusion
from research.diffusion.objective import MaskedDiffusion
from research.nn.time_embedding import TimeEmbedding
from research.sharding import Layout
from tests import support

V, T, ROWS = 16, 8, 4
MASK = V - 1
CLOCK = TimeEmbedding(features=8, hidden=8, width=8)


@functools.cache
def network(clock):
  model = support.model(
    depth=1, width=16, hidden=16, head_dim=8, vocab=V, time_embedding=clock
  )
  return model, support.params(model)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "clock", "sizes"),
  [
    (MaskedDiffusion, None, dict(data=2, fsdp=2)),
    (BlockDiffusion, None, dict(data=2, fsdp=2)),
    (BlockDiffusion, CLOCK, dict(data=1, fsdp=2, tensor=2)),
  ],
)
@pytest.mark.sample(4)
def test_on_a_mesh(kind, clock, sizes):
  """Devices skip chunks without masks, each its own."""
  layout = Layout(**sizes)
  model, params = network(clock)
  more = {} if kind is MaskedDiffusion else dict(block=4)
  objective = kind(model=model, mask_id=MASK, rows=4, **more)
  tokens = np.random.default_rng(0).integers(0, MASK, (ROWS, T))
  batch = {
    "tokens": jnp.asarray(tokens, jnp.int32),
    "weights": jnp.ones((ROWS, T)),
    "positions": jnp.broadcast_to(jnp.arange(T), (ROWS, T)),
    "segments": jnp.zeros((ROWS, T), jnp.int32),
  }

  def loss(params, batch):
    return objective(params, batch, jax.random.key(0))[0]

  f = jax.value_and_grad(loss)
  want = jax.jit(f)(params, batch)
  mesh = layout.mesh(jax.devices()[:4])
  with jax.set_mesh(mesh):
    whole = jax.device_put(batch, layout.batch(mesh))
    got = jax.jit(f)(params, whole)
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)
