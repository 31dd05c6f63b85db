"""What theory says, by enumeration: bounds, variances, parallel decoding."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masks import Mask
from research.diffusion import likelihood
from research.diffusion.objective import MaskedDiffusion
from research.diffusion.sampling.policies import Factor
from research.diffusion.schedule import Linear
from tests import support
from tests.research.diffusion import joint

X = (0, 1, 2, 0)
SETS = np.array(list(itertools.product([False, True], repeat=4)))[1:]
EPSILON = 1e-3


def losses(x):
  """Returns the cross-entropies of each set of masks, exact conditionals."""
  size = SETS.sum(-1)
  found = likelihood.values(
    joint.scores(),
    jnp.asarray(x),
    jnp.ones(4, bool),
    jnp.asarray(SETS),
    joint.MASK,
  )
  return np.asarray(found, np.float64) * size / 4


def test_mean_and_variance_of_the_form_in_time():
  """7.303704 and 307.494 (research/diffusion/MATH.md 6.2): a mask counts 1/p.

  The schedule's own weight is (1 - e)/p, the bound's; LLaDA leaves 1 - e out.
  """
  schedule, each, size = Linear(high=EPSILON), losses(X), SETS.sum(-1)
  # Nodes in log p, where the integrand is smooth.
  node, weight = np.polynomial.legendre.leggauss(200)
  span = -np.log(EPSILON)
  p = np.exp(-span * (1 - node) / 2)
  weight = weight * span / 2 * p / (1 - EPSILON)  # dt
  t = schedule.time(jnp.asarray(p, jnp.float32))
  np.testing.assert_allclose(schedule.masked(t), p, rtol=2e-3)
  chance = p[:, None] ** size * (1 - p[:, None]) ** (4 - size)
  count = np.asarray(schedule.weight(t), np.float64) / (1 - EPSILON)
  value = count[:, None] * each
  mean = (weight[:, None] * chance * value).sum()
  second = (weight[:, None] * chance * value**2).sum()
  assert mean == pytest.approx(7.303704, rel=2e-4)
  assert second - mean**2 == pytest.approx(307.494, rel=3e-3)


def test_the_objective_draws_that_form():
  """By 200,000 draws of masks and counts."""
  n = 200_000
  objective = MaskedDiffusion(mask_id=joint.MASK, schedule=Linear(high=EPSILON))
  ones = jnp.ones((n, 4), bool)
  masked, counts = jax.jit(objective.draw)(
    jax.random.key(0), ones, jnp.zeros((n, 4), jnp.int32)
  )
  table = np.zeros(16)
  table[(SETS * 2 ** np.arange(4)).sum(-1)] = losses(X)
  index = (np.asarray(masked) * 2 ** np.arange(4)).sum(-1)
  value = table[index] * np.asarray(counts[:, 0], np.float64)
  want = 7.303704 * (1 - EPSILON)
  assert abs(value.mean() - want) < 4 * np.sqrt(307.494 / n)
  # Rare small times have most of the variance: it is known to a fifth.
  assert value.var() == pytest.approx(307.494, rel=0.2)


# Property 2: a network that is no joint's ------------------------------------


@functools.cache
def network():
  """Returns log p of a random network by noisy row, `[4^4, L, V]`."""
  model = support.model(depth=1, width=16, hidden=16, head_dim=8, vocab=4)
  rows = jnp.array(list(itertools.product(range(4), repeat=4)), jnp.int32)

  @jax.jit
  def logp(params):
    hidden, _ = model.apply({"params": params}, rows, None, Mask.full())
    logits = model.apply({"params": params}, hidden, method="logits")
    return jax.nn.log_softmax(logits.at[..., joint.MASK].set(-jnp.inf))

  return logp(support.params(model))


def test_the_bound_is_one_for_any_network():
  """p(x) is the mean over all orders of the product of what each order asks."""
  known, table = np.asarray(network(), np.float64), network()
  place = 4 ** np.arange(4)[::-1]
  orders = list(itertools.permutations(range(4)))

  def scores(tokens):
    return table[(tokens * jnp.asarray(place)).sum(-1)]

  total, apart = 0.0, []
  for n, x in enumerate(joint.SEQUENCES):
    chains = []
    for order in orders:
      row, log_p = np.full(4, joint.MASK), 0.0
      for i in order:
        log_p += known[(row * place).sum(), i, x[i]]
        row[i] = x[i]
      chains.append(log_p)
    log_p = np.log(np.mean(np.exp(chains)))
    total += np.exp(log_p)
    if n % 5:
      continue
    tokens, target = jnp.asarray(x), jnp.ones(4, bool)
    bound = likelihood.exact(scores, tokens, target, joint.MASK).mean
    assert bound >= -log_p
    assert bound == pytest.approx(-np.mean(chains), rel=1e-5)
    apart.append(bound + log_p)
  assert total == pytest.approx(1, rel=1e-5)
  assert max(apart) > 0.01  # it is a bound, and not the thing itself


# Property 10: theorem 1 of Fast-dLLM -----------------------------------------


def joints(n, values, count, seed):
  """Yields random joints of n tokens, most of their mass on one sequence."""
  rng = np.random.default_rng(seed)
  for _ in range(count):
    p = rng.dirichlet(np.full(values**n, 0.05))
    share = rng.uniform(0.2, 1)
    p = (1 - share) * p
    p[rng.integers(len(p))] += share
    yield p.reshape((values,) * n)


def committed(factor, sure):
  policy = Factor(factor=factor)
  every = jnp.ones(sure.shape, bool)
  return np.asarray(policy.commit(sure, every, jnp.ones(len(sure), int)))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_factor_1_fills_in_the_mode_of_the_joint(n):
  """Of what it fills at once; with a factor of 2.5 it does not always."""
  tables = list(joints(n, 3, 3000, n))
  # The theorem's own worst case: each token right but for 1 / (n + 1 - d).
  worst = np.zeros((3,) * n)
  worst[(0,) * n] = 1
  for i in range(n):
    worst[tuple(int(j == i) for j in range(n))] = 1.05
  tables.append(worst / worst.sum())
  marginal = np.array(
    [
      [p.sum(tuple(j for j in range(n) if j != i)) for i in range(n)]
      for p in tables
    ]
  )
  sure = jnp.asarray(marginal.max(-1), jnp.float32)
  wrong = {}
  for factor in (1.0, 2.5):
    wrong[factor], several = 0, 0
    chosen = committed(factor, sure)
    for p, one, places in zip(tables, marginal, chosen, strict=True):
      rest = tuple(i for i in range(n) if not places[i])
      among = p.sum(rest)
      mode = np.unravel_index(among.argmax(), among.shape)
      wrong[factor] += tuple(one.argmax(-1)[places]) != mode
      several += places.sum() > 1
    assert several > 100
  assert wrong[1.0] == 0
  assert wrong[2.5] > 0
