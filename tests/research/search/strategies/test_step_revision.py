"""Revised chains: what stays, what is drawn again, and what it costs."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.nn.flops import Causal, model_cost
from research.search import ledger as ledgers
from research.search.engine import Engine
from research.search.step_search import Limits
from research.search.strategies.independent import Independent
from research.search.strategies.step_revision import StepRevision
from research.typing import UserError
from tests.research.search import test_search as shared

ROUNDS, CHAINS = 2, 4


def run(search, **fields):
  policy = shared.policy(log_probs=True)
  cost = model_cost(policy.model)
  engine = Engine(policy=policy, verifier=shared.Arbitrary(cost=cost))
  limits = Limits(**{"tokens": shared.NEW, "key": jax.random.key(2)} | fields)
  return search(engine, shared.PROMPTS, limits)


@pytest.fixture(name="samples", scope="module")
def _samples():
  return run(StepRevision(copies=CHAINS, rounds=ROUNDS, threshold=0.4))


def chains(one):
  found = collections.defaultdict(list)
  for path in one.paths:
    found[path.root].append(path)
  return list(found.values())


def right(path):
  """Returns how many steps stand before the first wrong one."""
  wrong = [i for i, score in enumerate(path.scores) if score < 0.4]
  return wrong[0] if wrong else len(path.steps)


def test_right_steps_stay_and_the_wrong_one_is_drawn_again(samples):
  lengths, kept = set(), set()
  for one in samples:
    assert len(chains(one)) == CHAINS
    for tries in chains(one):
      lengths.add(len(tries))
      for before, after in zip(tries, tries[1:], strict=False):
        n = right(before)
        assert n < len(before.steps)
        assert after.steps[:n] == before.steps[:n]
        assert after.scores[:n] == before.scores[:n]
        assert after.steps[n] != before.steps[n]
        kept.add(n)
      ended = right(tries[-1]) == len(tries[-1].steps)
      assert ended or len(tries) == 1 + ROUNDS
      for path in tries:
        assert path.done and len(path.scores) == len(path.steps)
  # From the prompt, and from within; chains that were right at once.
  assert lengths == {1, 2, 3} and {0, 1} <= kept


def test_revised_steps_follow_their_own_texts(samples):
  """Log-probabilities are those of whole texts, read without a cache."""
  policy = shared.policy()
  paths = [path for one in samples for path in one.paths]
  tokens = np.zeros((len(paths), 16), np.int32)
  for row, path in zip(tokens, paths, strict=True):
    text = [*shared.PROMPTS[path.problem], *path.tokens]
    row[: len(text)] = text
  model, params = policy.model, {"params": policy.params}
  hidden, _ = model.apply(params, jnp.asarray(tokens[:, :-1]))
  logits = model.apply(params, hidden, method="logits")
  every = np.take_along_axis(
    np.asarray(jax.nn.log_softmax(logits)), tokens[:, 1:, None], axis=2
  )[..., 0]
  for row, path in zip(every, paths, strict=True):
    own = row[path.prompt - 1 :][: len(path.tokens)]
    assert path.log_prob == pytest.approx(own.sum(), rel=1e-4)


def test_each_try_costs_what_it_draws(samples):
  cost = model_cost(shared.policy().model)
  for prompt, one in zip(shared.PROMPTS, samples, strict=True):
    flops = ledgers.prefill(cost, len(prompt)).flops_policy
    drawn = read = 0
    for tries in chains(one):
      shared_steps = [0, *map(right, tries)]
      for path, n in zip(tries, shared_steps, strict=False):
        before = len(prompt) + sum(map(len, path.steps[:n]))
        new = sum(map(len, path.steps[n:]))
        # The last token of what is there is fed, the last new one never is.
        flops += cost.forward(new, Causal(before - 1, new), new)
        drawn, read = drawn + new, read + new - shared.unread(path)
    assert one.ledger.flops_policy == flops
    assert one.ledger.policy_decode_tokens == drawn
    assert one.ledger.verifier_new_tokens == read
    assert one.ledger.policy_prefill_tokens == len(prompt)
    assert one.ledger.verifier_prefill_tokens == len(prompt)


def test_without_a_round_chains_are_independent_samples(samples):
  plain = run(StepRevision(copies=CHAINS, rounds=0, threshold=0.4))
  expected = shared.found(Independent(copies=CHAINS))
  assert shared.tokens(plain) == shared.tokens(expected)
  for one, other in zip(plain, samples, strict=True):
    assert one.paths == other.paths[:CHAINS]


def test_a_chain_may_have_its_last_try_alone(samples):
  search = StepRevision(
    copies=CHAINS, rounds=ROUNDS, threshold=0.4, every=False
  )
  for one, other in zip(run(search), samples, strict=True):
    assert list(one.paths) == [tries[-1] for tries in chains(other)]
    clock = dict(seconds=0.0)
    assert dataclasses.replace(one.ledger, **clock) == dataclasses.replace(
      other.ledger, **clock
    )


def test_steps_are_capped():
  found = run(StepRevision(copies=CHAINS, rounds=1), steps=2)
  steps = [len(path.steps) for one in found for path in one.paths]
  assert max(steps) == 2
  assert all(len(x) <= 2 for one in found for x in chains(one))


def test_mistakes():
  with pytest.raises(UserError, match="found no verifier"):
    StepRevision()(Engine(policy=shared.policy()), [[1]], Limits(tokens=2))
