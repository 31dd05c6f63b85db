"""Verifiers that hang, die, raise, print or say nonsense: exact verdicts."""

import concurrent.futures
import time

import pytest

from research.errors import UserError
from research.reasoning import Guarded, Isolated, Problem, Verdict
from research.reasoning.isolation import (
  Failed,
  TimedOut,
  Worker,
  build,
  describe,
)
from research.reasoning.tasks import Countdown
from tests.support_verifiers import Misbehaving

PROBLEM = Problem("a", "?", meta={"x": [1]})
ISOLATED = Isolated(Misbehaving(), seconds=1.5)


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("hang", "timeout: more than 1.5 s"),
    ("raise", "error: ZeroDivisionError: of no number"),
    ("die", "error: the process died"),
    ("nan", "error: AttributeError"),
    ("memory", "error: MemoryError"),
    ("digits", "error: ValueError: Exceeds the limit"),
  ],
)
def test_what_misbehaves_is_a_wrong_verdict_with_its_reason(text, reason):
  found = ISOLATED.verify(PROBLEM, text)
  assert (found.correct, found.extracted, found.canonical) == (
    False,
    None,
    None,
  )
  assert found.reason.startswith(reason)
  # The next text is judged as if nothing had been.
  assert ISOLATED.verify(PROBLEM, " 7 ").canonical == "7/3"


def test_what_a_verifier_prints_is_no_verdict():
  assert ISOLATED.verify(PROBLEM, "print").canonical == "print/3"
  assert ISOLATED.verify(PROBLEM, "7").canonical == "7/3"


@pytest.mark.parametrize("text", ["raise", "die"])
def test_steps_that_cannot_be_judged_are_unknown(text):
  found = ISOLATED.verify_step(PROBLEM, ["a", "b"], text)
  assert found.label == "unknown"
  assert found.reason.startswith("error: ")
  found = ISOLATED.verify_step(PROBLEM, ["a", "b"], "c")
  assert (found.label, found.reason) == ("ok", "2 before")


def test_a_task_says_the_same_in_its_own_process():
  task = Countdown(count=5)
  isolated = Isolated(task, seconds=20)
  for problem in task:
    for text in (task.oracle(problem), task.mutated(problem), None, "\ud800"):
      assert isolated.verify(problem, text) == task.verify(problem, text)
    step = problem.meta["solution"][0]
    assert isolated.verify_step(problem, [], step).label == "ok"
    assert isolated.verify_step(problem, [], "x") == task.verify_step(
      problem, [], "x"
    )


def test_threads_share_a_process_without_mixing_answers():
  worker = Worker("tests.support_verifiers", seconds=20)
  values = [{"text": "é\n" * n, "n": n} for n in range(40)]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(lambda x: worker.call("echo", x), values)) == values
  worker.close()


def test_a_worker_serves_public_functions_until_they_fail():
  worker = Worker("tests.support_verifiers", seconds=20)
  with pytest.raises(Failed, match="_private is not public"):
    worker.call("_private")
  with pytest.raises(Failed, match="AttributeError"):
    worker.call("missing")
  assert worker.call("echo", [1, None]) == [1, None]
  worker.close()
  assert worker.call("echo", "again") == "again"
  worker.close()


def test_a_call_ends_when_its_time_does():
  worker = Worker("tests.support_verifiers", seconds=0.2)
  start = time.monotonic()
  with pytest.raises(TimedOut, match="more than 0.2 s"):
    worker.call("echo", "hang")
  assert time.monotonic() - start < 30  # it would sleep for 60
  worker.close()


def test_a_module_that_cannot_be_imported_is_the_users_error():
  with pytest.raises(UserError, match="cannot be imported .*\n.*no_such"):
    Worker("no_such_module", seconds=1).call("echo", 1)
  with pytest.raises(UserError, match=r"seconds: found 0"):
    Worker("tests.support_verifiers", seconds=0)


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("raise", "error: ZeroDivisionError: of no number"),
    ("nan", "error: found nan instead of a Verdict"),
    ("7", ""),
  ],
)
def test_guarded_turns_exceptions_and_nonsense_into_verdicts(text, reason):
  found = Guarded(Misbehaving()).verify(PROBLEM, text)
  assert found.correct == (not reason)
  assert found.reason == (reason or "correct")


def test_guarded_has_a_limit_warns_and_counts():
  guarded = Guarded(Misbehaving(), seconds=0.2)
  with pytest.warns(UserWarning, match="Misbehaving: not judged.* timeout"):
    found = guarded.verify(PROBLEM, "hang")
  assert (found.correct, found.reason) == (False, "timeout: more than 0.2 s")
  assert guarded.verify_step(PROBLEM, [], "hang").label == "unknown"
  with pytest.warns(UserWarning, match="ZeroDivisionError: of no number"):
    guarded.verify(PROBLEM, "raise")
  assert guarded.verify(PROBLEM, "7").correct
  assert guarded.failures == {"timeout": 2, "ZeroDivisionError": 1}
  assert guarded == Guarded(Misbehaving(), seconds=0.2)


def test_guarded_does_not_know_what_is_no_step():
  class Outcome:
    """Judges no steps."""

    def verify(self, problem, text):
      return Verdict(False)

  for verifier in (Outcome(), Misbehaving()):
    found = Guarded(verifier).verify_step(PROBLEM, [], "raise")
    assert found.label == "unknown"
    assert found.reason.startswith("error: ")


def test_what_is_described_is_built_again():
  task = Countdown(values=(1, 9), numbers=3)
  assert build(describe(task)) == task
  assert build(describe(Misbehaving())) == Misbehaving()
  with pytest.raises(UserError, match=r"Isolated: found <function"):
    describe(Misbehaving(read=lambda x: x))
