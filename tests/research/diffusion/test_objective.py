"""The objective in expectation, and what it does with documents and prompts."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masks import Mask
from research.diffusion import process
from research.diffusion.objective import MaskedDiffusion
from research.diffusion.schedule import Cosine, Linear, Power
from research.training.objectives import losses
from research.typing import UserError
from tests import support

V, T = 16, 6
MASK = V - 1


@functools.cache
def network():
  model = support.model(depth=1, width=16, hidden=16, head_dim=8, vocab=V)
  return model, support.params(model)


def rows(n, length=T):
  tokens = np.random.default_rng(0).integers(0, MASK, (n, length))
  ones = np.ones((n, length))
  return {
    "tokens": jnp.asarray(tokens, jnp.int32),
    "targets": jnp.asarray(np.roll(tokens, -1, 1), jnp.int32),
    "weights": jnp.asarray(ones, jnp.float32).at[:, -1].set(0),
    "positions": jnp.broadcast_to(jnp.arange(length), (n, length)),
    "segments": jnp.zeros((n, length), jnp.int32),
  }


def logp(tokens):
  """Returns log p of every place, a full mask, none for the mask token."""
  model, params = network()
  mask = Mask.full()
  hidden, _ = model.apply({"params": params}, tokens, None, mask)
  logits = model.apply({"params": params}, hidden, method="logits")
  return jax.nn.log_softmax(logits.at[..., MASK].set(-1e9))


@functools.cache
def losses_of_sets():
  """Returns a row, and its masked tokens' loss for each of 2^T sets of masks.

  The n-th set has the places of n's bits.
  """
  row = rows(1)["tokens"][0]
  sets = np.array([[n >> i & 1 for i in range(T)] for n in range(2**T)], bool)
  noisy = jnp.where(jnp.asarray(sets), MASK, row)
  found = jnp.take_along_axis(
    jax.jit(logp)(noisy), jnp.broadcast_to(row, noisy.shape)[..., None], -1
  )[..., 0]
  return row, (sets * -np.asarray(found, np.float64)).sum(-1)


def by_size():
  """Returns the loss of n masks, n = 1..T, over all sets of so many."""
  _, loss = losses_of_sets()
  size = np.array([n.bit_count() for n in range(2**T)])
  return np.array([loss[size == n].mean() for n in range(1, T + 1)])


def exact():
  """Returns the bound of the row, by all 2^T - 1 sets of masks."""
  return T * (by_size() / np.arange(1, T + 1)).mean()


def expected(schedule, levels):
  """Returns what the objective is on average, by quadrature over times.

  Of n masks of T at a time that masks p: the binomial law, times the weight.
  """
  n = np.arange(1, T + 1)
  choices = np.array([math.comb(T, k) for k in n])

  def at(t, weight):
    p = np.asarray(schedule.masked(jnp.asarray(t)), np.float64)[:, None]
    law = choices * p**n * (1 - p) ** (T - n)
    return weight * (law @ by_size())

  if levels is not None:
    t = np.arange(1, levels + 1) / levels
    alpha = 1 - np.stack([t - 1 / levels, t])  # of the linear schedule
    return at(t, levels * (alpha[0] - alpha[1]) / t).mean()
  nodes, sizes = np.polynomial.legendre.leggauss(64)
  t = (nodes + 1) / 2
  return at(t, np.asarray(schedule.weight(jnp.asarray(t)))) @ sizes / 2


CHANGES = [
  dict(),
  pytest.param(dict(spread="even"), marks=pytest.mark.slow),
  dict(schedule=Cosine(high=1e-3), spread="even"),
  pytest.param(
    dict(schedule=Power(power=2.0, high=1e-3), spread="even"),
    marks=pytest.mark.slow,
  ),
  dict(complement=True, schedule=Linear()),
  dict(levels=50, schedule=Linear()),
]


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_in_expectation_it_is_the_bound_of_any_schedule(change):
  """Draws without the network, whose losses of all sets are known.

  A row has many documents of the same tokens, each at a time of its own.
  """
  model, params = network()
  objective = MaskedDiffusion(model=model, mask_id=MASK, **change)
  row, known = losses_of_sets()

  @functools.partial(jax.jit, static_argnums=(1, 2))
  def draw(key, n, documents):
    segments = jnp.arange(T * documents) // T
    segments = jnp.broadcast_to(segments, (n, T * documents))
    masked, counts = objective.draw(key, segments >= 0, segments)
    named = (masked.reshape(-1, T) << jnp.arange(T)).sum(-1)
    return named, counts.reshape(-1, T)[:, 0]

  def values(key, n, documents=1):
    """Returns each document's loss; of a complement, both of its masks'."""
    named, counts = map(np.asarray, draw(key, n, documents))
    return (known[named] * counts).reshape(-1, n * documents).sum(0)

  # The same as the objective's own, with its network.
  n, key = 16, jax.random.key(9)
  batch = rows(n) | {"tokens": jnp.broadcast_to(row, (n, T))}
  loss, weight, _ = jax.jit(objective)(params, batch, key)
  assert float(weight) == n * T
  np.testing.assert_allclose(loss, values(key, n).sum(), rtol=2e-5)
  found = [values(jax.random.key(i), 512, 512) for i in range(8)]
  found = np.concatenate(found)
  error = found.std() / found.size**0.5
  want = expected(objective.schedule, objective.levels)
  assert error < 0.02 and abs(found.mean() - want) < 4.5 * error
  # Noise of e at t = 0 takes away times below e: of one mask T e of its share,
  # of more nearly nothing (research/diffusion/MATH.md 2.1); steps add at most
  # one's width.
  bound = exact()
  share = T * 1e-3 if objective.levels is None else 1 / 50
  assert abs(want - bound) < share * bound


@pytest.mark.parametrize(
  "schedule",
  [Linear(), Linear(high=1e-3), Linear(low=0.1), Linear(low=0.1, high=0.05)],
)
def test_a_complement_counts_by_how_many_it_masks(schedule):
  """Weights are the slope over the share of masks; two shares make 1."""
  objective = MaskedDiffusion(mask_id=MASK, schedule=schedule, complement=True)
  segments = jnp.broadcast_to(jnp.arange(64), (64, 64))
  _, counts = jax.jit(objective.draw)(
    jax.random.key(0), segments >= 0, segments
  )
  slope = 1 - schedule.low - schedule.high
  first, second = np.split(0.5 * slope / np.asarray(counts, np.float64), 2)
  assert (first >= schedule.high).all() and (first <= 1 - schedule.low).all()
  # No time masks fewer than `high`, or more than 1 - `low`.
  want = np.clip(1 - first, schedule.high, 1 - schedule.low)
  np.testing.assert_allclose(second, want, atol=1e-6)


def test_only_masked_places_count_and_the_gradient_is_the_dense_one():
  model, params = network()
  objective = MaskedDiffusion(model=model, mask_id=MASK, rows=4)
  batch, key = rows(5), jax.random.key(0)
  masked, counts = objective.draw(
    key, objective.maskable(batch), batch["segments"]
  )

  def truth(params):
    tokens = batch["tokens"]
    noisy = jnp.where(masked, MASK, tokens)
    hidden, _ = model.apply({"params": params}, noisy, None, Mask.full())
    logits = model.apply({"params": params}, hidden, method="logits")
    found = jax.nn.log_softmax(logits.at[..., MASK].set(-1e9))
    found = jnp.take_along_axis(found, tokens[..., None], -1)[..., 0]
    return -jnp.where(masked, counts * found, 0).sum()

  def ours(params):
    return objective(params, batch, key)[0]

  got, want = (jax.jit(jax.value_and_grad(f))(params) for f in (ours, truth))
  chex.assert_trees_all_close(got, want, rtol=2e-5, atol=2e-5)


def test_a_sparse_loss_is_the_plain_one():
  k = jax.random.split(jax.random.key(0), 3)
  hidden = jax.random.normal(k[0], (3, 7, 8))
  head = jax.random.normal(k[1], (8, V))
  targets = jnp.arange(21).reshape(3, 7) % V
  weight = jnp.where(jax.random.uniform(k[2], (3, 7)) < 0.3, 2.0, 0.0)
  logits = support.linear_head("btd,dv->btv")

  def loss(head, hidden, sparse):
    how = losses.TokenLoss(rows=4, sparse=sparse)
    return losses.chunked_cross_entropy(
      logits, head, hidden, targets, weight, how
    )

  f = jax.jit(
    jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2
  )
  chex.assert_trees_all_close(
    f(head, hidden, True), f(head, hidden, False), rtol=1e-5, atol=1e-5
  )


def test_prompts_stay_clean_and_padding_is_nothing():
  model, params = network()
  batch = rows(64)
  batch["weights"] = batch["weights"].at[:, :2].set(0)
  batch["segments"] = batch["segments"].at[:, -1].set(-1)
  objective = MaskedDiffusion(
    model=model, mask_id=MASK, noise="learned", norm="sequence"
  )
  maskable = objective.maskable(batch)
  # The targets of places 2, 3, 4 are tokens 3, 4, 5; the last is padding.
  np.testing.assert_array_equal(maskable[0], [0, 0, 0, 1, 1, 0])
  masked, _ = objective.draw(jax.random.key(0), maskable, batch["segments"])
  assert masked.any() and not (masked & ~maskable).any()
  f = jax.jit(objective)
  loss, weight, _ = f(params, batch, jax.random.key(0))
  assert float(weight) == 64
  other = dict(batch)
  other["tokens"] = batch["tokens"].at[:, -1].set(3)
  chex.assert_trees_all_close(
    f(params, other, jax.random.key(0))[0], loss, rtol=1e-6
  )


def test_documents_of_a_row_have_times_of_their_own_and_do_not_leak():
  model, params = network()
  batch = rows(400)
  batch["segments"] = jnp.broadcast_to(jnp.array([0, 0, 0, 1, 1, 1]), (400, T))
  batch["positions"] = jnp.broadcast_to(jnp.array([0, 1, 2, 0, 1, 2]), (400, T))
  objective = MaskedDiffusion(model=model, mask_id=MASK)
  masked, counts = objective.draw(
    jax.random.key(0), objective.maskable(batch), batch["segments"]
  )
  t = 1 / np.asarray(counts)
  assert (t[:, 0] == t[:, 2]).all() and (t[:, 3] == t[:, 5]).all()
  # Of 400 pairs the correlation errs by 1 / sqrt(400).
  assert abs(np.corrcoef(t[:, 0], t[:, 3])[0, 1]) < 0.2
  f = jax.jit(objective)
  half = {k: v[:, :3] for k, v in batch.items()}
  g = jax.jit(dataclasses.replace(objective, noise="learned"))
  learned = dict(batch)
  learned["weights"] = batch["weights"].at[:, 3:].set(0)
  one = g(params, learned, jax.random.key(1))[0]
  learned["tokens"] = batch["tokens"].at[:, 3:].set(2)
  chex.assert_trees_all_close(
    g(params, learned, jax.random.key(1))[0], one, rtol=1e-6
  )
  assert f(params, half, jax.random.key(1))[1] == 1200


def test_evaluation_draws_the_same_masks_every_time():
  model, params = network()
  f = jax.jit(MaskedDiffusion(model=model, mask_id=MASK))
  chex.assert_trees_all_equal(
    f(params, rows(4), None), f(params, rows(4), None)
  )


def test_evaluation_draws_other_times_for_other_batches():
  """With the same for all, it would be a bound at a batch's few times."""
  tokens = np.random.default_rng(0).integers(0, MASK, (64, 2, T))
  tokens = jnp.asarray(tokens, jnp.int32)

  def times(tokens):
    key, free = process.drawing(None, tokens), jnp.ones(tokens.shape, bool)
    return MaskedDiffusion().times(key, free, jnp.zeros_like(tokens))[:, 0]

  found = np.asarray(jax.jit(jax.vmap(times))(tokens))
  assert len(np.unique(found)) == found.size
  # Four standard errors of the mean of uniform numbers.
  assert abs(found.mean() - 0.5) < 4 / np.sqrt(12 * found.size)
  chex.assert_trees_all_equal(found[0], times(tokens[0]))
  assert (times(tokens[0].at[1, 2].add(1)) != found[0]).all()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(complement=True, schedule=Cosine()), "needs a linear schedule"),
    (dict(complement=True, levels=4), "complement with levels 4"),
  ],
)
def test_mistakes(change, message):
  with pytest.raises(UserError, match=message):
    MaskedDiffusion(mask_id=1, **{"schedule": Linear()} | change)
