"""Block diffusion between its two ends, and against passes block by block."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.diffusion.block import BlockDiffusion
from research.diffusion.objective import MaskedDiffusion
from research.diffusion.sampling import denoiser
from research.diffusion.sampling.block_causal import BlockCausal
from research.diffusion.schedule import Linear
from research.training.objectives.objective import NextToken
from research.typing import UserError
from tests import support

V, T = 20, 12
MASK = V - 1


@functools.cache
def network():
  model = support.model(depth=2, width=32, hidden=32, head_dim=8, vocab=V)
  return model, support.params(model)


def rows(n=3):
  tokens = np.random.default_rng(0).integers(0, MASK, (n, T))
  return {
    "tokens": jnp.asarray(tokens, jnp.int32),
    "targets": jnp.asarray(np.roll(tokens, -1, 1), jnp.int32),
    "weights": jnp.ones((n, T)).at[:, -1].set(0),
    "positions": jnp.broadcast_to(jnp.arange(T), (n, T)),
    "segments": jnp.zeros((n, T), jnp.int32),
  }


def packed():
  """Rows of two documents, 5 and 6 tokens, and padding."""
  place = np.array([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, -1])
  segment = np.array([0] * 5 + [1] * 6 + [-1])
  out = rows() | {
    "positions": jnp.broadcast_to(place, (3, T)),
    "segments": jnp.broadcast_to(segment, (3, T)),
  }
  last = jnp.array([4, 10, 11])
  return out | {"weights": jnp.ones((3, T)).at[:, last].set(0)}


@pytest.mark.parametrize("batch", [rows, packed])
@pytest.mark.sample(2)
def test_blocks_of_one_token_are_autoregression(batch):
  """With right-shifted logits, term by term: no noise is left."""
  model, params = network()
  batch, key = batch(), jax.random.key(0)
  ours = BlockDiffusion(
    model=model, mask_id=MASK, block=1, shift=True, never_mask=False
  )
  f = jax.jit(jax.value_and_grad(lambda p: ours(p, batch, key)[0]))
  ar = NextToken(model=model)
  g = jax.jit(jax.value_and_grad(lambda p: ar(p, batch, None)[0]))
  (loss, grads), (want, right) = f(params), g(params)
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(right))
  # The mask token's embedding has a gradient of its own.
  chex.assert_trees_all_close(grads, right, atol=2e-5 * largest, rtol=0)
  assert ours(params, batch, key)[1] == batch["weights"].sum()


@pytest.mark.slow
def test_one_block_is_plain_diffusion():
  model, params = network()
  batch = rows()
  ours = BlockDiffusion(model=model, mask_id=MASK, block=T)
  plain = MaskedDiffusion(model=model, mask_id=MASK, schedule=Linear())
  masked, counts = ours.draw(
    jax.random.key(3), ours.maskable(batch), batch["positions"]
  )
  hidden, _ = ours.states(params, batch, masked)
  noisy = jnp.where(masked, MASK, batch["tokens"])
  whole = denoiser.NoCache(model=model)
  logits = whole.scores(params, noisy, jnp.ones((3, T), bool))
  got = model.apply({"params": params}, hidden, method="logits")
  chex.assert_trees_all_close(
    got, logits, atol=2e-5 * float(jnp.abs(logits).max()), rtol=0
  )
  t = 1 / counts
  assert (t[:, :1] == t).all() and len(set(np.asarray(t[:, 0]).tolist())) == 3
  chex.assert_trees_all_close(plain.schedule.weight(t), counts, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.sample(2)
def test_one_pass_is_a_pass_a_block_with_its_clean_past(shift):
  model, params = network()
  batch, k = rows(), 4
  ours = BlockDiffusion(model=model, mask_id=MASK, block=k, shift=shift)
  masked, _ = ours.draw(
    jax.random.key(1), ours.maskable(batch), batch["positions"]
  )
  hidden, _ = ours.states(params, batch, masked)
  got = model.apply({"params": params}, hidden, method="logits")
  d = BlockCausal(model=model, block=k, shift=shift)
  f = jax.jit(
    lambda tokens, at: d.prefill(
      params, tokens, jnp.ones(tokens.shape, bool), at, k
    )[0]
  )
  place = jnp.arange(T)
  for at in range(0, T, k):
    here = (place >= at) & (place < at + k)
    tokens = jnp.where(masked & here, MASK, batch["tokens"])
    want = f(tokens, jnp.int32(at))
    first = 1 if shift and at == 0 else 0
    chex.assert_trees_all_close(
      got[:, at + first : at + k],
      want[:, first:],
      atol=2e-5 * float(jnp.abs(want).max()),
      rtol=0,
    )


@pytest.mark.slow
def test_times_of_blocks():
  n, k = 600, 3
  batch = rows(n)
  ours = BlockDiffusion(mask_id=MASK, block=k, low=0.25, high=0.75)
  masked, counts = ours.draw(
    jax.random.key(0), ours.maskable(batch), batch["positions"]
  )
  t = np.asarray(1 / counts)
  blocks = t.reshape(n, T // k, k)
  assert (blocks == blocks[..., :1]).all()
  assert t.min() >= 0.25 and t.max() <= 0.75
  np.testing.assert_allclose(
    np.diff(np.sort(blocks[..., 0], -1)), 0.5 / 4, atol=1e-6
  )
  # Each block is as noisy as any other: 600 times on [0.25, 0.75].
  assert np.abs(blocks[..., 0].mean(0) - 0.5).max() < 4 * 0.5 / 12**0.5 / n**0.5
  share = np.asarray(masked).mean()
  assert abs(share - t.mean()) < 4 * 0.5 / (n * T) ** 0.5


@pytest.mark.parametrize("head", [0, 3])
def test_padding_takes_no_times_of_blocks(head):
  """Two blocks are half of the range apart, however long the row."""
  k, place = 3, jnp.arange(T)
  own = (place >= head) & (place < head + 2 * k)
  positions = jnp.broadcast_to(jnp.where(own, place - head, -1), (5, T))
  ours = BlockDiffusion(mask_id=MASK, block=k, low=0.25, high=0.75)
  t = np.asarray(ours.times(jax.random.key(0), positions))
  blocks = t[:, head : head + 2 * k].reshape(-1, 2, k)
  assert (blocks == blocks[..., :1]).all()
  np.testing.assert_allclose(
    np.abs(np.diff(blocks[..., 0])), 0.5 / 2, atol=1e-6
  )


def test_documents_do_not_leak():
  model, params = network()
  batch = packed()
  ours = BlockDiffusion(model=model, mask_id=MASK, block=4, noise="learned")
  batch["weights"] = batch["weights"].at[:, 5:].set(0)
  key = jax.random.key(0)
  f = jax.jit(lambda batch: ours(params, batch, key)[0])
  want = f(batch)
  batch["tokens"] = batch["tokens"].at[:, 5:].set(2)
  np.testing.assert_allclose(f(batch), want, rtol=1e-6)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(low=0.0), "low is 0.0 and high 1.0"),
    (dict(low=0.8, high=0.5), "low is 0.8 and high 0.5"),
  ],
)
def test_mistakes(change, message):
  with pytest.raises(UserError, match=message):
    BlockDiffusion(mask_id=1, **change)
