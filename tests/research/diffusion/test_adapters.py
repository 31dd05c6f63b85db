"""Adapters, on plain and on packed matrices, under diffusion's objectives.

The truth is the same objective of plain arrays: what an adapted matrix decodes
to, with gradients through that.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import tree, weights
from research.diffusion.alignment.estimators import Elbo
from research.diffusion.alignment.preference import VRPO
from research.diffusion.block import BlockDiffusion
from research.diffusion.objective import MaskedDiffusion
from research.lora import wrap
from research.lora.adapted import AdaptedTensor
from research.quant import qtensor
from research.quant.formats.codebook import Codebook
from research.quant.quantize import Quantize
from research.training import state, step
from tests import support
from tests.support_lora import adapting

V, T = 20, 8
MASK = V - 1


def is_adapted(x):
  return isinstance(x, AdaptedTensor)


@functools.cache
def network():
  """A model whose MLPs are NF4, all of whose matrices have moved adapters."""
  model = support.model(depth=1, width=32, hidden=32, head_dim=8, vocab=V)

  packing = Quantize(
    format=Codebook(block=32), targets=("mlp/gate", "mlp/up", "mlp/down")
  )
  params = packing(support.params(model))
  params = adapting(rank=2, alpha=4.0)(params, jax.random.key(0))
  rng = np.random.default_rng(0)

  def move(path, x):
    some = 0.3 * rng.standard_normal(x.shape)
    return jnp.asarray(some, x.dtype) if "/trained/" in path else x

  return model, tree.map_paths(move, params)


def batch(rows):
  tokens = np.random.default_rng(1).integers(0, MASK, (rows, T))
  place = np.broadcast_to(np.arange(T), tokens.shape)
  return {
    "tokens": jnp.asarray(tokens, jnp.int32),
    "targets": jnp.asarray(np.roll(tokens, -1, 1), jnp.int32),
    "weights": jnp.asarray(place < T - 1, jnp.float32),
    "positions": jnp.asarray(place, jnp.int32),
    "segments": jnp.zeros(tokens.shape, jnp.int32),
  }


def asked(name):
  """Returns an objective and a batch of it."""
  model, _ = network()
  if name == "vrpo":
    pairs = {k: v.reshape(2, 2, T) for k, v in batch(4).items()}
    how = VRPO(
      model=model,
      mask_id=MASK,
      estimator=Elbo(times=2),
      reference=wrap.disable,
    )
    return how, pairs
  if name == "blocks":
    return BlockDiffusion(model=model, mask_id=MASK, block=4), batch(4)
  return MaskedDiffusion(model=model, mask_id=MASK), batch(4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masked", "blocks", "vrpo"])
@pytest.mark.sample(3)
def test_a_step_is_that_of_plain_arrays_and_moves_adapters_alone(name):
  _, params = network()
  objective, rows = asked(name)
  key = jax.random.key(3)
  tx = optax.sgd(1e-3)
  begun = state.create(params, "/trained/", tx)
  kinds = jax.tree.leaves(params, is_leaf=is_adapted)
  inner = [x.w for x in kinds if is_adapted(x)]
  assert {type(w) for w in inner} >= {qtensor.QTensor}
  assert len({type(w) for w in inner}) == 2

  def loss(trainable, plain):
    now = tree.combine(trainable, begun.frozen)
    if not plain:
      return objective(now, rows, key)[0]
    # Arrays alone: each adapted matrix as what it stands for.
    full = jax.tree.map(
      lambda x: weights.dense(x) if is_adapted(x) else x,
      now,
      is_leaf=is_adapted,
    )
    if name == "vrpo":
      base = jax.tree.map(
        lambda x: weights.dense(x.w) if is_adapted(x) else x,
        now,
        is_leaf=is_adapted,
      )
      other = VRPO(model=objective.model, mask_id=MASK, estimator=Elbo(times=2))
      return other(dict(full) | {"reference": base}, rows, key)[0]
    return objective(full, rows, key)[0]

  @jax.jit
  def both(trainable):
    grad = jax.value_and_grad(loss)
    return grad(trainable, False), grad(trainable, True)

  got, want = both(begun.trainable)
  chex.assert_trees_all_close(got, want, rtol=2e-4, atol=2e-4)
  assert all(jnp.abs(g).max() > 1e-4 for g in jax.tree.leaves(got[1]))
  update = jax.jit(step.make_train_step(objective, tx))
  moved, metrics = update(begun, rows, key)
  chex.assert_trees_all_equal(moved.frozen, begun.frozen)
  assert np.isfinite(metrics["loss"])
  apart = jax.tree.map(
    lambda a, b: float(jnp.abs(a - b).max()), moved.trainable, begun.trainable
  )
  assert all(x > 0 for x in jax.tree.leaves(apart))
