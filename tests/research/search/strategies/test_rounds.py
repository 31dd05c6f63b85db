"""Strategies that ask again, or say when it is enough."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy import integrate, stats

from research.generation import generate
from research.generation.sampling import GREEDY
from research.search.engine import Engine, Frontier, Path
from research.search.step_search import Limits
from research.search.strategies.adaptive import Adaptive, lead
from research.search.strategies.budget_forcing import BudgetForcing
from research.search.strategies.independent import Independent
from research.search.strategies.rounds import LastTries, Rounds, Subsets
from research.typing import UserError
from tests.research.search import test_search as shared

KEY = jax.random.key(2)


def limits(**fields):
  return Limits(**{"tokens": shared.NEW, "key": KEY} | fields)


# --- adaptive ----------------------------------------------------------------


@pytest.mark.parametrize(
  ("answers", "counts"),
  [([1, 1, 1], (3, 0)), ([1, 2, 2, None, 2, 1], (3, 2)), ([4, 5], (1, 1))],
)
def test_the_lead_is_an_integral(answers, counts):
  first, second = counts
  density = stats.beta(first + 1, second + 1).pdf
  expected, _ = integrate.quad(density, 0.5, 1)
  assert lead(answers) == pytest.approx(expected)


def test_without_answers_nothing_leads():
  assert lead([None, None]) == 0


def test_what_ran_is_charged():
  """A batch decodes all of its problems until the last one is decided."""
  engine, limit = Engine(policy=shared.policy()), limits()
  search = Adaptive(
    answer=lambda path: 7 if path.problem == 0 else None,
    round=4,
    max_samples=8,
    confidence=0.6,
  )
  found = search(engine, shared.PROMPTS, limit)
  ran = [
    Independent(copies=4)(
      engine,
      shared.PROMPTS,
      limits(key=jax.random.fold_in(limit.key, k)),
    )
    for k in range(2)
  ]
  assert len(found[0].paths) < 8
  for i, one in enumerate(found):
    for name in ("policy_decode_tokens", "flops_policy"):
      each = [getattr(x[i].ledger, name) for x in ran]
      assert getattr(one.ledger, name) == sum(each)


def test_decided_problems_have_no_more_samples():
  engine = Engine(policy=shared.policy())
  sure = Adaptive(answer=lambda path: 7, round=4, max_samples=12)
  for one in sure(engine, shared.PROMPTS, limits()):
    ended = [path for path in one.paths if path.stopped]
    # 4 of 4 votes are sure, P(Beta(5, 1) > 1/2) = 0.97; three are not.
    assert len(one.paths) == 12 or len(ended) >= 4
    assert len(one.paths) % 4 == 0
  never = Adaptive(answer=lambda path: None, round=4, max_samples=8)
  for one in never(engine, shared.PROMPTS, limits()):
    assert len(one.paths) == 8
    assert len({path.tokens for path in one.paths}) == 8


def test_a_verifier_finds_each_problem_at_its_index_in_all_rounds():
  """Where those before it are decided, too: an oracle looks it up there."""

  @dataclasses.dataclass(frozen=True)
  class Oracle(shared.Arbitrary):
    def read(self, state, paths, new):
      return state, np.array([path.problem / 10 for path in paths])

  engine = Engine(policy=shared.policy(), verifier=Oracle())
  search = Adaptive(
    answer=lambda path: 7 if path.problem == 0 else None,
    round=4,
    max_samples=8,
    confidence=0.6,
  )
  found = search(engine, shared.PROMPTS, limits())
  assert [len(one.paths) for one in found] == [4, 8, 8]
  for i, one in enumerate(found):
    assert {path.prompt for path in one.paths} == {len(shared.PROMPTS[i])}
    assert {x for path in one.paths for x in path.scores} == {i / 10}
    assert {path.problem for path in one.paths} == {i}


# --- rounds ------------------------------------------------------------------


def shows(prompt, paths):
  """A prompt that says which solutions it shows."""
  return [*prompt, *(token for path in paths for token in path.tokens[:2])]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("shown", "every"), [(LastTries(2), True), (Subsets(2), False)]
)
def test_each_round_shows_earlier_solutions(shown, every):
  asked = []

  def rewrite(prompt, paths):
    asked.append((tuple(prompt), [path.tokens for path in paths]))
    return shows(prompt, paths)

  strategy = Rounds(
    rewrite=rewrite, shown=shown, width=3, rounds=3, every=every
  )
  engine = Engine(policy=shared.policy())
  samples = strategy(engine, shared.PROMPTS[:2], limits())
  first = Independent(copies=3)(engine, shared.PROMPTS[:2], limits())
  assert len(asked) == 2 * 2 * 3
  for i, one in enumerate(samples):
    assert len(one.paths) == (9 if every else 3)
    starts = [path.tokens for path in first[i].paths]
    prompt = tuple(shared.PROMPTS[i])
    own = [texts for other, texts in asked if other == prompt]
    for texts in own[:3]:
      assert set(texts) <= set(starts) and len(set(texts)) == len(texts)
    if every:
      assert [len(x) for x in own] == [1, 1, 1, 2, 2, 2]
      # The oldest first, each chain its own.
      assert [x[0] for x in own[3:]] == [x[0] for x in own[:3]]
    else:
      assert [len(x) for x in own] == [2] * 6
    cost, least = one.ledger, first[i].ledger
    assert cost.policy_decode_tokens > least.policy_decode_tokens
    assert cost.policy_prefill_tokens > 3 * len(prompt)


# --- budgets -----------------------------------------------------------------


@pytest.mark.slow
def test_an_early_end_is_replaced_and_a_late_one_forced():
  """Against greedy generation from the texts so far."""
  policy = dataclasses.replace(shared.policy(), sampling=GREEDY)
  plain = Independent(copies=1)(Engine(policy=policy), [[5, 6]], limits())
  (path,) = plain[0].paths
  assert path.log_prob is None
  stop = path.tokens[1]
  policy = dataclasses.replace(policy, stop_tokens=(stop,), log_probs=True)
  cut = path.tokens[: path.tokens.index(stop)]
  strategy = BudgetForcing(
    min_tokens=7, max_tokens=7, wait=(20, 21), max_waits=1, answer=(22,)
  )
  (one,) = strategy(Engine(policy=policy), [[5, 6]], limits(tokens=16))
  (found,) = one.paths
  text = [5, 6, *cut, 20, 21]
  more = generate.generate(
    policy.model, policy.params, [text], 12, stop_tokens=(stop,)
  ).tokens[0]
  assert found.tokens[: len(cut) + 2] == (*cut, 20, 21)
  tail = found.tokens[len(cut) + 2 :]
  if 22 in tail:
    at = tail.index(22)
    assert len(cut) + 2 + at >= 7
    assert list(tail[:at]) == more[:at]
    again = generate.generate(
      *(policy.model, policy.params, [[*text, *tail[: at + 1]]]),
      *(16 - len(cut) - 3 - at,),
      stop_tokens=(stop,),
    )
    rest = again.tokens[0] + [stop] * (again.reasons == ["stop"])
    assert list(tail[at + 1 :]) == rest
  else:
    assert list(tail) == [*more, stop]
  assert one.ledger.policy_decode_tokens >= len(found.tokens)
  assert found.log_prob is None  # of tokens that were not drawn


# --- mistakes ----------------------------------------------------------------


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Adaptive(answer=id, round=3, max_samples=4), "rounds of 3"),
    (lambda: BudgetForcing(min_tokens=3), "found min_tokens 3"),
    (lambda: BudgetForcing(max_tokens=3), "found max_tokens 3 and no answer"),
    (
      lambda: BudgetForcing(max_tokens=3, answer=(22,))(
        Engine(policy=dataclasses.replace(shared.policy(), boundary=None)),
        shared.PROMPTS,
        limits(),
      ),
      "pauses at the end of a text alone",
    ),
    (
      lambda: Engine(
        policy=shared.policy(), verifier=shared.Arbitrary()
      ).append(Frontier(None, None, (), (), (), 0.0), [[1]], [False]),
      "found a verifier",
    ),
  ],
)
def test_mistakes(make, message):
  with pytest.raises(UserError, match=message):
    make()


def test_subsets_of_few_are_all_of_them():
  paths = [Path(0, i, 1) for i in range(2)]
  chosen = Subsets(5)([paths], np.random.default_rng(0))
  assert [sorted(path.root for path in x) for x in chosen] == [[0, 1]] * 2
