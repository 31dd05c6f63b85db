"""A budget over a batch: against all divisions, and what it is spent on."""

import itertools

import jax
import numpy as np
import pytest

from research.nn.flops import Causal, model_cost
from research.prm.scores.aggregate import Min
from research.search import ledger as ledgers
from research.search.engine import Engine, Path
from research.search.step_search import Limits
from research.search.strategies.allocation import (
  AdaptiveAllocation,
  Agreement,
  MeanScore,
  allocate,
)
from research.typing import UserError
from tests.research.search import test_search as shared


@pytest.mark.parametrize(
  "pass_rates",
  [(0.5, 0.1, 0.9), (0.3, 0.3, 0.02), (0, 0.2, 1), (0.05, 0.6, 0.6)],
)
@pytest.mark.parametrize("first", [0, 1, 2])
def test_no_division_of_the_budget_is_worth_more(pass_rates, first):
  total = 9

  def worth(counts):
    return sum(
      1 - (1 - p) ** k for p, k in zip(pass_rates, counts, strict=True)
    )

  found = allocate(pass_rates, total, first)
  assert sum(found) == total and min(found) >= first
  every = itertools.product(range(first, total + 1), repeat=len(pass_rates))
  best = max(worth(x) for x in every if sum(x) == total)
  assert worth(found) == pytest.approx(best)


def test_what_is_solved_or_hopeless_gets_no_more():
  assert allocate((1, 0, 0.2), 12, first=2) == [2, 2, 8]
  # All the same: as equal as can be.
  assert allocate((0, 0, 0), 8, first=1) == [3, 3, 2]


def path(answer, stopped=True, scores=()):
  return Path(0, 0, 1, steps=((answer,),) * len(scores), scores=scores,
              done=True, stopped=stopped)  # fmt: skip


def test_ease_is_agreement_or_the_mean_score():
  agreement = Agreement(lambda path: path.problem)
  assert agreement([path(1)] * 3 + [path(1, stopped=False)]) == 0.75
  assert agreement([path(1, stopped=False)]) == 0
  scored = [path(1, scores=x) for x in ((0.9, 0.4), (0.2,))]
  assert MeanScore(Min())(scored) == pytest.approx(0.3)


def test_the_budget_is_spent_where_it_pays_and_is_on_the_ledger():
  cost = model_cost(shared.policy().model)
  engine = Engine(policy=shared.policy(), verifier=shared.Arbitrary(cost=cost))
  seen = []

  def predict(paths):
    seen.append(list(paths))
    return (0.0, 0.1, 0.99)[paths[0].problem]

  limits = Limits(tokens=shared.NEW, key=jax.random.key(2))
  search = AdaptiveAllocation(predictor=predict, copies=4, first=2)
  samples = search(engine, shared.PROMPTS, limits)
  assert [len(one.paths) for one in samples] == [2, 8, 2]
  for i, (one, prompt) in enumerate(zip(samples, shared.PROMPTS, strict=True)):
    assert list(one.paths[:2]) == seen[i]
    assert {path.problem for path in one.paths} == {i}
    assert [path.root for path in one.paths] == list(range(len(one.paths)))
    assert len({path.tokens for path in one.paths}) == len(one.paths)
    lengths = [len(path.tokens) for path in one.paths]
    assert one.ledger.policy_prefill_tokens == len(prompt)
    assert one.ledger.verifier_prefill_tokens == len(prompt)
    assert one.ledger.policy_decode_tokens == sum(lengths)
    # Each sample feeds the prompt's last token, and not its own last one.
    passes = (cost.forward(n, Causal(len(prompt) - 1, n), n) for n in lengths)
    once = ledgers.prefill(cost, len(prompt)).flops_policy
    assert one.ledger.flops_policy == once + sum(passes)


def test_a_budget_of_first_samples_is_as_many_of_each():
  search = AdaptiveAllocation(predictor=lambda paths: 0.5, copies=2, first=2)
  limits = Limits(tokens=shared.NEW, key=jax.random.key(2), steps=1)
  samples = search(Engine(policy=shared.policy()), shared.PROMPTS, limits)
  assert [len(one.paths) for one in samples] == [2, 2, 2]
  assert {len(path.steps) for one in samples for path in one.paths} == {1}


def test_mistakes():
  for first in (0, 5):
    with pytest.raises(
      UserError, match=f"first: found {first}, expected 1 to 4"
    ):
      AdaptiveAllocation(predictor=np.mean, copies=4, first=first)
  with pytest.raises(UserError, match="MeanScore: found paths without scores"):
    MeanScore()([Path(0, 0, 1, steps=((1,),))])
