"""Traces refuse what they must not say, and are written without loss."""

import json

import pytest

from research.errors import UserError
from research.reasoning.trace import (
  MonteCarlo,
  Sampler,
  Step,
  Trace,
)

STEPS = (
  Step("3 x 4 = 12\n", 0, 5, score=0.9, label=1, mc=MonteCarlo(3, 8)),
  Step("12 - 2 = 9\n", 5, 9, label=0.25),
)
TRACE = Trace(
  "figs",
  STEPS,
  finish="eos",
  final_answer="9",
  n_prompt=7,
  n_new=9,
  logprob_sum=-3.5,
  sampler=Sampler(0.8, 1.0, 3, "tiny"),
)


@pytest.mark.parametrize("trace", [TRACE, Trace("empty", (), "length")])
def test_a_trace_survives_json(trace):
  text = json.dumps(trace.to_json())
  assert Trace.from_json(json.loads(text), "pool.jsonl:1") == trace


def test_only_what_the_model_ended_is_complete_and_votes():
  for finish in ("stop", "length", "cap"):
    cut = Trace("figs", STEPS, finish, final_answer="9", n_new=9)
    assert not cut.complete
    assert cut.vote is None
  assert TRACE.complete
  assert TRACE.vote == "9"
  assert Trace("figs", (), "eos").vote is None


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Step(" \n"), "blank"),
    (lambda: Step("a", 0), "both or none"),
    (lambda: Step("a", 3, 3), "one at least"),
    (lambda: Step("a", score=float("nan")), "not a number"),
    (lambda: Step("a", label=1.5), "0 to 1"),
    (lambda: Step("a", mc=MonteCarlo(9, 8)), "9 correct of 8"),
    (lambda: Step("a", mc=MonteCarlo(0, 0)), "one rollout"),
    (lambda: Trace("x", (), "eos", final_answer=" "), "empty final answer"),
    (lambda: Trace("x", STEPS[::-1], "eos", n_new=9), "step 1 starts at"),
    (lambda: Trace("x", STEPS, "eos", n_new=8), "at most n_new"),
  ],
)
def test_nonsense_is_refused(make, message):
  with pytest.raises(UserError, match=message):
    make()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"finish": None}, "finish is None"),
    ({"finish": "done"}, "finish is 'done', expected eos"),
    ({"n_new": True}, "n_new is True, expected int"),
    ({"oops": 1}, "field 'oops'"),
    ({"steps": "abc"}, "steps is 'abc'"),
    ({"steps": [{"text": "a", "mc": {"c": 1}}]}, r"steps\[0\]: mc"),
    ({"steps": [{"text": ""}]}, r"steps\[0\]: Step: found the blank"),
    ({"sampler": {"heat": 1}}, "sampler: found the field 'heat'"),
  ],
)
def test_a_bad_record_names_file_and_field(change, message):
  values = TRACE.to_json() | change
  with pytest.raises(UserError, match=r"pool.jsonl:4: .*" + message):
    Trace.from_json(values, "pool.jsonl:4")
