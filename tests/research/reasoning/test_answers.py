"""Questions of files: GSM8K, MATH, and fields with other names."""

import json

import pytest

from research.errors import UserError
from research.reasoning import Isolated, MathVerify, extraction
from research.reasoning.tasks import AnswerFile, answers


def write(path, *rows):
  """Writes JSON Lines."""
  path.write_text("".join(json.dumps(x) + "\n" for x in rows), "utf-8")
  return str(path)


GSM8K = {
  "question": "How many?",
  "answer": "Half of 48 is 48/2=<<48/2=24>>24.\n#### 1,024",
}
MATH = {
  "problem": "What is $x$?",
  "level": "Level 5",
  "type": "Algebra",
  "solution": r"So $x = \boxed{\frac{1}{2}}$.",
}


def test_gsm8k_is_graded_as_by_the_harness(tmp_path):
  task = answers.gsm8k(write(tmp_path / "test.jsonl", GSM8K))
  [problem] = task
  assert problem.prompt == "Question: How many?\nAnswer:"
  assert problem.answer == "1,024"
  assert problem.id == "test.jsonl:1"
  assert problem.meta["solution"] == GSM8K["answer"]
  assert task.verify(problem, "It is 1024.").correct
  assert task.verify(problem, "$1,024.").correct
  assert not task.verify(problem, "1024 or 1025").correct
  assert task.verify(problem, "none").reason == "no answer"
  strict = answers.gsm8k(task.path, extract=extraction.gsm8k_strict)
  assert strict.verify(problem, "It is 1024.").canonical is None
  assert strict.verify(problem, "#### 1024").correct
  for x in (task, strict):
    assert x.verify(problem, x.oracle(problem)).correct
    assert not x.verify(problem, x.mutated(problem)).correct


def test_math_is_graded_by_the_ladder_or_math_verify(tmp_path):
  path = write(tmp_path / "math.jsonl", MATH)
  task = answers.math(path)
  [problem] = task
  assert (problem.answer, problem.difficulty) == (r"\frac{1}{2}", 5)
  assert "put your final answer within \\boxed{}." in problem.prompt
  assert problem.prompt.startswith("What is $x$?")
  lenient = answers.math(path, grader=MathVerify(seconds=60))
  for text, ladder, verified in [
    (r"\boxed{1/2}", True, True),
    (r"\boxed{.5}", True, True),
    (r"\boxed{2/4}", False, True),
    (r"\boxed{\dfrac12}", True, True),
    (r"\boxed{1/2 or 1/3}", False, False),
    (r"1/2", False, False),
    (r"\boxed{1}, \boxed{1/", False, False),
  ]:
    assert task.verify(problem, text).correct == ladder, text
    assert lenient.verify(problem, text).correct == verified, text


def test_questions_without_answers_are_asked_and_not_judged(tmp_path):
  path = write(tmp_path / "own.jsonl", {"question": "Why?"})
  (problem,) = task = AnswerFile(path=path, answer=None)
  assert (problem.prompt, problem.answer) == ("Why?", None)
  with pytest.raises(UserError, match="answer: found None, expected the field"):
    task.verify(problem, "the answer is 4.")


def test_a_file_of_ones_own(tmp_path):
  rows = [
    {"q": {"text": f"{i} + 1?"}, "gold": i + 1, "name": f"a{i}", "hard": i}
    for i in range(60)
  ]
  path = write(tmp_path / "own.jsonl", *rows)
  task = AnswerFile(
    path=path,
    question="q.text",
    answer="gold",
    identity="name",
    difficulty="hard",
    template="Compute {question}",
  )
  assert len(task) == 60
  assert (task[3].id, task[3].answer, task[3].difficulty) == ("a3", "4", 3)
  assert task[3].prompt == "Compute 3 + 1?"
  assert task.verify(task[3], "the answer is 4.").correct
  parts = [
    AnswerFile(
      path=path, question="q.text", answer="gold", parts="hash", split=x
    )
    for x in ("train", "validation", "heldout")
  ]
  prompts = [{x.prompt for x in part} for part in parts]
  assert sum(map(len, prompts)) == 60 == len(set().union(*prompts))
  isolated = Isolated(task, seconds=60)
  assert isolated.verify(task[0], r"\boxed{1}").correct


@pytest.mark.parametrize(
  ("names", "ids"),
  [
    (("a.jsonl", "b.jsonl"), ["a.jsonl:1", "b.jsonl:1"]),
    (("x/a.jsonl", "y/b.jsonl"), ["a.jsonl:1", "b.jsonl:1"]),
    (("x/a.jsonl", "y/a.jsonl"), ["x/a.jsonl:1", "y/a.jsonl:1"]),
    (("x/z/a.jsonl", "x/a.jsonl"), ["z/a.jsonl:1", "a.jsonl:1"]),
  ],
)
def test_no_two_problems_have_one_id(tmp_path, monkeypatch, names, ids):
  """As MATH's, which has a file of each subject under the same name."""
  for name in names:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    write(tmp_path / name, {"question": name, "answer": "1"})
  task = AnswerFile(path=[str(tmp_path / name) for name in names])
  assert [problem.id for problem in task] == ids
  monkeypatch.chdir(tmp_path)
  assert [problem.id for problem in AnswerFile(path=names)] == ids


@pytest.mark.parametrize(
  ("row", "fields", "message"),
  [
    ({"question": "?"}, {}, r"bad.jsonl:1: field 'answer': found none among"),
    ({"question": 3, "answer": "3"}, {}, r"bad.jsonl:1: field 'question'"),
    (
      {"question": "?", "answer": True},
      {},
      r"found bool 'True', expected text",
    ),
    (
      {"question": "?", "answer": "no box"},
      {"reference": extraction.boxed},
      "expected text with an answer in it",
    ),
    (
      {"question": "?", "answer": "1", "level": []},
      {"difficulty": "level"},
      "field 'level': found list",
    ),
  ],
)
def test_a_bad_line_is_named(tmp_path, row, fields, message):
  task = AnswerFile(path=write(tmp_path / "bad.jsonl", row), **fields)
  with pytest.raises(UserError, match=message):
    task[0]


def test_a_file_with_fewer_problems_is_an_error(tmp_path):
  path = write(tmp_path / "test.jsonl", GSM8K)
  with pytest.raises(UserError, match="found 1 problems, expected 2"):
    AnswerFile(path=path, count=2)
  with pytest.raises(UserError, match="cannot be read"):
    AnswerFile(path=str(tmp_path / "none.jsonl"))
