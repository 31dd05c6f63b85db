"""What is made of a pool: choices, estimates, costs; and what is refused."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from experiments.core.experiment import Pretrained
from experiments.searching import pool as pools
from experiments.searching import results, running
from experiments.searching.pool import Sample, Searched
from experiments.searching.search_run import SearchRun
from research.prm.scores.aggregate import Last, Min, Product
from research.reasoning import sample_logs
from research.reasoning.problem import Problem, Verdict
from research.reasoning.trace import Step, Trace
from research.search.choose import BestOf, Confident, Majority, Weighted
from research.search.ledger import Ledger
from research.search.strategies.beam import Beam
from research.search.strategies.independent import Independent
from research.typing import UserError
from tests.experiments.searching.parity import Parity

ONCE = Ledger(policy_prefill_tokens=3, flops_policy=30, flops_verifier=6)


def sample(answer, scores=(), finish="eos", right="7"):
  """Returns a sample of two tokens a step, with an answer or None."""
  scores = scores or (None,)
  steps = tuple(
    Step(f"step {i}\n", 2 * i, 2 * i + 2, score)
    for i, score in enumerate(scores)
  )
  trace = Trace(
    "p", steps, finish, answer, 3, 2 * len(steps), -1.0 * len(steps)
  )
  return Sample(trace, Verdict(answer == right, answer, answer))


def searched(*samples, problem="p"):
  cost = Ledger(
    policy_prefill_tokens=3,
    policy_decode_tokens=4 * len(samples),
    flops_policy=30 + 40 * len(samples),
    flops_verifier=6 + 10 * len(samples),
    seconds=1.5,
  )
  return Searched(Problem(problem, "?"), samples, cost, ONCE)


MIXED = searched(
  sample("7", (0.9, 0.2)),
  sample("5", (0.5, 0.6)),
  sample("5", (0.4, 0.9)),
  sample(None, (0.99, 0.99)),
  sample("7", (0.9, 0.95), finish="length"),
  sample("7", (0.6, 0.5)),
)

UNSURE = searched(
  *(
    dataclasses.replace(x, trace=dataclasses.replace(x.trace, logprob_sum=None))
    for x in MIXED.samples
  )
)


def test_one_sample_is_what_it_is():
  """N = 1: every choice gives its answer."""
  for choice in (Majority(), BestOf(Min()), Weighted(Min()), Confident()):
    for one, expected in (
      (searched(sample("7", (0.3,))), 1.0),
      (searched(sample("5", (0.3,))), 0.0),
      (searched(sample(None, (0.3,))), 0.0),
      (searched(sample("7", (0.3,), finish="length")), 0.0),
    ):
      assert results.accuracy_of(one, choice) == expected
  found = results.result_of(
    [searched(sample("7"))], Independent(copies=1), Majority(), None
  )
  wilson = pytest.approx([1 / (1 + 1.959964**2), 1.0])
  assert found["n"] == 1 and found["interval"] == wilson
  assert results.estimates_of(
    [searched(sample("7"))], Independent(copies=1)
  ) == {
    "k": [1],
    "pass": [pytest.approx([1.0, 1 / (1 + 1.959964**2), 1.0])],
    "majority": [pytest.approx([1.0, 1 / (1 + 1.959964**2), 1.0])],
    "flops": [86.0],
  }


def test_equal_candidates_are_one_answer():
  """All candidates equal: no choice can go wrong, nor right."""
  for answer, expected in (("7", 1.0), ("5", 0.0)):
    one = searched(*[sample(answer, (0.5, 0.5))] * 4)
    for choice in (Majority(), BestOf(Product()), Weighted(Last())):
      assert results.accuracy_of(one, choice) == expected
      assert results.accuracy_at(one, choice, 2) == pytest.approx(expected)


def test_no_answer_and_a_cut_solution_are_no_votes():
  assert results.accuracy_of(MIXED, Majority()) == 0.5  # two for 7, two for 5
  # The best scores are those of no answer and of a solution that was cut.
  assert results.accuracy_of(MIXED, BestOf(Last())) == 0.0
  assert results.accuracy_of(MIXED, BestOf(Min())) == 0.5  # 5 and 7 tie
  none = searched(sample(None), sample(None, finish="length"))
  found = results.result_of([none], Independent(copies=2), Majority(), None)
  assert found["accuracy"] == 0.0
  estimates = results.estimates_of([none], Independent(copies=2))["pass"]
  wilson = pytest.approx([0.0, 0.0, 1.959964**2 / (1 + 1.959964**2)])
  assert estimates == [wilson] * 2


@pytest.mark.parametrize(
  "choice", [Majority(), BestOf(Min()), Weighted(Product()), Confident(keep=1)]
)
def test_the_order_of_samples_changes_nothing(choice):
  """Also where a grader rejects one form of an answer that it accepts."""
  accepted, other = sample("7", (0.5,)), sample("5", (0.4,))
  rejected = dataclasses.replace(accepted, verdict=Verdict(False, "7.", "7"))
  samples = [accepted, rejected, rejected, other]
  for order in itertools.permutations(samples):
    found = results.accuracy_of(searched(*order), choice)
    assert found == pytest.approx(1 / 3)


@pytest.mark.parametrize(
  "choice", [Majority(), BestOf(Min()), BestOf(Last()), Weighted(Product())]
)
@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_fewer_samples_are_the_mean_of_all_subsets(choice, n):
  """Closed forms against running the choice on every subset."""
  every = [
    results.accuracy_of(searched(*[MIXED.samples[i] for i in which]), choice)
    for which in itertools.combinations(range(6), n)
  ]
  found = results.accuracy_at(MIXED, choice, n)
  assert found == pytest.approx(np.mean(every))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_best_sample_has_its_own_verdict(n):
  """Not that of samples whose equal answers the grader does not accept."""
  first = sample("7", (0.9,))
  second = dataclasses.replace(
    sample("7", (0.8,)), verdict=Verdict(False, "7.", "7")
  )
  pool = searched(first, second, sample("5", (0.7,)))
  for choice in (BestOf(Min()), Confident(keep=1, inner=BestOf(Min()))):
    # The first one is the best of every subset that has it.
    assert results.accuracy_at(pool, choice, n) == pytest.approx(n / 3)
    assert results.accuracy_of(pool, choice) == 1


def test_a_pool_says_what_fewer_samples_cost():
  cost = results.cost_at(MIXED, 2)
  assert cost["policy_prefill_tokens"] == 3
  assert cost["policy_decode_tokens"] == 8
  assert (cost["flops_policy"], cost["flops_verifier"]) == (110, 26)
  assert cost["flops"] == 136 and cost["seconds"] == 0.5
  found = results.result_of([MIXED] * 2, Independent(copies=6), Majority(), 2)
  assert found["flops_per_problem"] == 136
  assert (found["flops_policy"], found["flops_verifier"]) == (110, 26)
  assert found["tokens_per_problem"] == 8 and found["n"] == 2


@pytest.mark.parametrize(
  ("pool", "strategy", "choice", "n", "message"),
  [
    ([MIXED], Beam(copies=4, width=2), Majority(), 2, "depend on each other"),
    ([MIXED], Independent(copies=6), Majority(), 7, "a problem has 6 samples"),
    ([searched(sample("7"))], Independent(), BestOf(Min()), None, "without"),
    ([UNSURE], Independent(), Confident(), None, "without a log-probability"),
  ],
)
def test_what_a_pool_cannot_say_is_an_error(pool, strategy, choice, n, message):
  with pytest.raises(UserError, match=message):
    results.result_of(pool, strategy, choice, n)


# --- files --------------------------------------------------------------------


def test_texts_without_answers_are_warned_of(tmp_path, capsys):
  """Of texts in which no answer was found, all were wrong without a word."""
  run = SearchRun(
    task=Parity(), policy=Pretrained(name="x"), strategy=Independent(copies=2)
  )
  for answers, share in ((("7", None), 0.5), ((None, None), 0.0)):
    pool = [searched(*map(sample, answers))]
    assert running.report(run, pool, tmp_path)["answered"] == share
    assert ("found in 0% of the samples" in capsys.readouterr().err) == (
      share < 0.5
    )


def test_logs_count_the_answers_that_results_count(tmp_path):
  """A sample that was cut has none, whatever its text looks like."""
  run = SearchRun(
    task=Parity(count=1),
    policy=Pretrained(name="not loaded"),
    strategy=Independent(copies=6),
    problems=(0, 1),
  )
  running.report(run, [MIXED], tmp_path)
  (log,) = sample_logs.read_samples(str(tmp_path / running.LOGS))
  nothing = sample_logs.INVALID
  assert log.filtered == ("7", "5", "5", nothing, nothing, "7")
  found = json.loads((tmp_path / "result.json").read_text())
  one = found["estimates"]["pass"][0][0]
  assert log.metrics["mean_correct"] == pytest.approx(one)


def test_a_pool_is_read_as_it_was_written(tmp_path):
  path = tmp_path / "pool.jsonl"
  hostile = searched(sample("\x1b[31m\u2028\x9b7\u202e"), problem="q\n{}")
  pools.append(path, [MIXED])
  pools.append(path, [hostile])
  assert pools.read(path) == [MIXED, hostile]
  data = path.read_bytes()
  assert data.isascii() and b"\x1b" not in data
  path.write_bytes(data[:-30])  # killed while it wrote
  assert pools.read(path) == [MIXED]
  pools.repair(path)
  assert path.read_bytes() == data.splitlines(keepends=True)[0]
  assert pools.read(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda x: x | {"ledger": {"flops_policy": -1}}, "flops_policy: found -1"),
    (lambda x: x | {"ledger": {"speed": 1}}, "speed: found 1"),
    (lambda x: x | {"samples": {}}, "samples: found none"),
    (lambda x: x | {"samples": [{}]}, r"samples\[0\]: trace: found None"),
    (lambda x: x | {"problem": {"id": 3}}, "found no 'prompt'"),
    (lambda x: {"text": "of another program"}, "samples: found none"),
  ],
)
def test_a_damaged_pool_names_its_line(tmp_path, change, message):
  path = tmp_path / "pool.jsonl"
  lines = [MIXED.to_json(), change(MIXED.to_json())]
  path.write_text("".join(json.dumps(x) + "\n" for x in lines))
  with pytest.raises(UserError, match=message) as error:
    pools.read(path)
  assert "pool.jsonl:2" in str(error.value)
