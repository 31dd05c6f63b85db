"""Problems and verdicts: JSON both ways, and what they refuse."""

import json

import pytest

from research.errors import UserError
from research.reasoning import Problem, StepVerdict, Verdict, first_error

PROBLEM = Problem(
  id="a/1",
  prompt="größer?",
  answer="7",
  meta={"steps": ["1", "2"], "deep": {"x": [1, None, 0.5, True]}},
  difficulty=2,
)


@pytest.mark.parametrize(
  "value",
  [
    PROBLEM,
    Problem("b", "?"),
    Verdict(True, "7", "7", "correct"),
    Verdict(False, reason="no answer"),
    StepVerdict("error", "7 is not there"),
  ],
)
def test_json_gives_the_same_value_back(value):
  text = json.dumps(value.to_json(), allow_nan=False)
  assert type(value).from_json(json.loads(text)) == value


@pytest.mark.parametrize(
  ("meta", "where"),
  [
    ({"a": (1, 2)}, "meta.a: found a tuple"),
    ({"a": [1, {"b": {3}}]}, r"meta.a\[1\].b: found a set"),
    ({"a": float("nan")}, "meta.a: found nan"),
    ({"a": {1: 2}}, "meta.a: found the key 1"),
  ],
)
def test_what_json_would_change_is_refused(meta, where):
  with pytest.raises(UserError, match=where):
    Problem("a", "?", meta=meta)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"id": "a"}, "F:1: found no 'prompt'"),
    ({"id": "a", "prompt": "?", "x": 1}, "F:1: found 'x' in a Problem"),
    ({"id": 3, "prompt": "?"}, "F:1: field 'id': found 3, expected str"),
    ({"id": "a", "prompt": "?", "difficulty": True}, "'difficulty'"),
    ({"id": "a", "prompt": "?", "meta": {"a": float("inf")}}, "F:1: .* inf"),
  ],
)
def test_a_malformed_problem_is_refused_by_name(values, message):
  with pytest.raises(UserError, match=message):
    Problem.from_json(values, "F:1")


def test_a_malformed_step_verdict_is_refused():
  with pytest.raises(UserError, match="found 'good', expected one of ok"):
    StepVerdict.from_json({"label": "good"})


def test_nothing_extracted_is_no_vote_and_not_correct():
  with pytest.raises(UserError, match="expected both or neither"):
    Verdict(False, extracted=None, canonical="")
  with pytest.raises(UserError, match="cannot be correct"):
    Verdict(True)
  # An empty answer is one, if an extractor says so.
  assert Verdict(False, "", "").canonical == ""


class Labels:
  """Says of a step what the step says."""

  def verify(self, problem, text):
    return Verdict(False)

  def verify_step(self, problem, steps, step):
    return StepVerdict(step)


@pytest.mark.parametrize(
  ("steps", "expected"),
  [
    ([], -1),
    (["ok", "ok"], -1),
    (["ok", "error", "ok"], 1),
    (["error"], 0),
    (["ok", "unknown", "error"], None),
  ],
)
def test_first_error(steps, expected):
  assert first_error(Labels(), PROBLEM, steps) == expected
