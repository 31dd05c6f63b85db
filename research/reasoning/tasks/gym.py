"""reasoning-gym's generators and scorers, behind the rules that they need.

Stojanovski et al. 2025, arXiv:2505.24760; the package `reasoning-gym`.

* Item i of seed s is item i + 1 of seed s - 1, so another seed is the same set,
  shifted. Splits are ranges of indices of one seed, and seeds are a size apart.
* Scores are not correctness: a wrong answer may get 0.5. Correct is 1.
* Some scorers reject their own answer, accept anything, raise, or *run the
  answer as code*. `allowed.json` has the names that passed `self_test`; others
  are refused. Two that evaluate arithmetic are given nothing but arithmetic.

`python -m research.reasoning.tasks.gym > research/reasoning/tasks/allowed.json`
makes the list anew.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, ClassVar

from research.data.sources.sources import PARTS
from research.errors import UserError
from research.ranges import AtLeast
from research.reasoning.extraction import Extractor, answer_tag
from research.reasoning.extras import needs
from research.reasoning.problem import Problem, Verdict
from research.reasoning.tasks.task import Task

FULL = 1 - 1e-9
"""The score from which an answer is correct."""

GUARDS = {
  "countdown": re.compile(r"(?!.*\*\*)(?!.*//)[-+*/().\d ]{1,200}"),
  "puzzle24": re.compile(r"(?!.*\*\*)(?!.*//)[-+*/().\d ]{1,200}"),
}
"""What scorers that evaluate arithmetic are given; all else is wrong."""

GARBAGE = ("", " ", "zzz", "[]", "{}", "()", "None", "\n", "\\frac{")
"""Answers that no question of the list has, and that no scorer may accept."""

_EVALUATES = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\s*\(\s*(?!entry)")
_ALLOWED = pathlib.Path(__file__).with_name("allowed.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gym(Task):
  """One of reasoning-gym's data sets.

  Attributes:
    name: name of the data set, one of `allowed()`.
    config: its settings, such as `{"min_terms": 2, "max_terms": 2}`.
    size: indices of the seed, of which 8 of 10 train.
    suffix: text behind every question.
    extract: finds the answer in a text.
  """

  NAME: ClassVar[str] = "reasoning_gym"

  name: str
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  size: AtLeast(10) = 20_000
  suffix: str = "\nGive the answer between <answer> and </answer>."
  extract: Extractor = answer_tag

  def __post_init__(self):
    super().__post_init__()
    self.expect("seed", 0, (1 << 32) // self.size - 1)
    if self.name not in allowed():
      why = refused().get(self.name, "it is no data set of it")
      raise UserError(
        f"Gym.name: found {self.name!r}, which is refused: {why}.\n"
        f"Expected one of {', '.join(allowed())}."
      )
    first, last = self._range()
    if self.count > last - first:
      raise UserError(
        f"Gym.count: found {self.count}, but the split {self.split!r} has"
        f" {last - first} indices; raise size, {self.size}, or lower count."
      )

  def _range(self) -> tuple[int, int]:
    low, high = PARTS[self.split]
    return round(low * self.size), round(high * self.size)

  def problem(self, index: int) -> Problem:
    """Returns a question, with its index in `meta`."""
    at = self._range()[0] + index
    entry = self._entry(at)
    answer = entry["answer"]
    return Problem(
      id=f"{self.NAME}/{self.name}/{self.seed}/{at}",
      prompt=entry["question"] + self.suffix,
      answer=None if answer is None else str(answer),
      meta={"index": at},
    )

  def _entry(self, index: int) -> dict[str, Any]:
    return _entry(self._settings, index)

  @functools.cached_property
  def _settings(self) -> str:
    # Items of neighbouring seeds are the same: these are a size apart.
    seed = self.seed * self.size
    settings = {"name": self.name, "seed": seed, "size": self.size}
    return json.dumps(settings | {"config": dict(self.config)})

  def present(self, answer: str) -> str:
    return f"<answer>{answer}</answer>"

  def score(self, problem: Problem, answer: str | None) -> float:
    """Returns reasoning-gym's score from 0 to 1; 0 if its scorer fails."""
    guard = GUARDS.get(self.name)
    if guard and not guard.fullmatch(answer or ""):
      return 0.0
    data, entry = _data(self._settings), self._entry(problem.meta["index"])
    return _score(data, entry, answer)

  def verify(self, problem: Problem, text: str | None) -> Verdict:
    """Returns whether the answer in the text has the full score."""
    answer = None if text is None else self.extract(text)
    if answer is None:
      return Verdict(False, reason="no answer")
    score = self.score(problem, answer)
    correct = score >= FULL
    reason = "correct" if correct else f"wrong: score {score:.3g}"
    # Whether case, spaces or zeros matter is known to the scorer alone.
    return Verdict(correct, answer, answer, reason)


def allowed() -> tuple[str, ...]:
  """Returns the names of the data sets that passed the self-test."""
  return tuple(_list()["allowed"])


def refused() -> dict[str, str]:
  """Returns the names of those that did not, and why."""
  return dict(_list()["refused"])


@functools.cache
def _list() -> dict[str, Any]:
  return json.loads(_ALLOWED.read_text("utf-8"))


@functools.lru_cache(maxsize=32)
def _data(settings: str) -> Any:
  values = json.loads(settings)
  with needs("reasoning-gym"):
    import reasoning_gym
  try:
    return reasoning_gym.create_dataset(
      values["name"],
      seed=values["seed"],
      size=values["size"],
      **values["config"],
    )
  except (AssertionError, TypeError, ValueError) as error:
    raise UserError(
      f"Gym: reasoning-gym refuses the settings of {values['name']}: {error}."
    ) from error


@functools.lru_cache(maxsize=1024)
def _entry(settings: str, index: int) -> dict[str, Any]:
  return _data(settings)[index]


def _score(data: Any, entry: dict[str, Any], answer: str | None) -> float:
  try:
    score = float(data.score_answer(answer, entry))
  except Exception:  # scorers raise on garbage
    return 0.0
  return score if math.isfinite(score) else 0.0


# The self-test ---------------------------------------------------------------


def self_test(name: str, problems: int = 5) -> str:
  """Returns why a data set must not be used; "" if it may.

  It is asked for a few problems twice, its scorer for their own answers, for
  none, for garbage, and for answers that would leave a file if they were run.
  """
  with needs("reasoning-gym"):
    import reasoning_gym
  make = functools.partial(
    reasoning_gym.create_dataset, name, seed=0, size=20_000
  )
  try:
    data, again = make(), make()
    entries = [data[i] for i in range(problems)]
  except Exception as error:
    return f"cannot be made: {type(error).__name__}: {str(error)[:80]}"
  if [x["question"] for x in entries] != [
    again[i]["question"] for i in range(problems)
  ]:
    return "its questions differ from run to run"
  if any(not isinstance(x["answer"], str) for x in entries):
    return "it has no reference answer"
  if name not in GUARDS:
    if _EVALUATES.search(inspect.getsource(type(data).score_answer)):
      return "its scorer evaluates answers as code"
    if any(_runs(data, entry) for entry in entries):
      return "its scorer runs answers as code"
  for entry in entries:
    if not _score(data, entry, entry["answer"]) >= FULL:
      return "its scorer rejects the reference answer"
    for answer in (None, *GARBAGE):
      same = (answer or "").strip() == entry["answer"].strip()
      if not same and _score(data, entry, answer) >= FULL:
        return f"its scorer accepts {answer!r}"
  return ""


def _runs(data: Any, entry: dict[str, Any]) -> bool:
  """Whether a scorer runs its answer: then the answer leaves a file."""
  with tempfile.TemporaryDirectory() as folder:
    file = os.path.join(folder, "ran")
    code = f"__import__('pathlib').Path({file!r}).touch()"
    for answer in (code, f"[{code}]", f"({code})", f"{{{code}}}", f"={code}"):
      _score(data, entry, answer)
      if os.path.exists(file):
        return True
  return False


def questions(name: str, problems: int = 5) -> str:
  """Returns a digest of a data set's first questions and answers."""
  with needs("reasoning-gym"):
    import reasoning_gym
  try:
    data = reasoning_gym.create_dataset(name, seed=0, size=20_000)
    entries = [data[i] for i in range(problems)]
  except Exception as error:
    return f"{type(error).__name__}"
  text = repr([(x["question"], x["answer"]) for x in entries])
  return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _names() -> list[str]:
  with needs("reasoning-gym"):
    from reasoning_gym.factory import DATASETS
  return sorted(DATASETS)


def _digests(hash_seed: str) -> dict[str, str]:
  """Returns all digests, of a process with a seed for Python's hashes."""
  done = subprocess.run(
    [sys.executable, "-m", "research.reasoning.tasks.gym", "questions"],
    env=os.environ | {"PYTHONHASHSEED": hash_seed},
    stdout=subprocess.PIPE,
    check=True,
  )
  return json.loads(done.stdout)


def main(output: str = "list") -> None:
  """Prints the list of allowed and refused data sets as JSON.

  Args:
    output: "list", or "questions" for the digests of all questions.
  """
  # Progress bars and prints of theirs would be in the file.
  with contextlib.redirect_stdout(sys.stderr):
    if output == "questions":
      results = {name: questions(name) for name in _names()}
    else:
      results = {name: self_test(name) for name in _names()}
  if output == "questions":
    print(json.dumps(results))
    return
  first, second = _digests("1"), _digests("2")
  for name in results:
    if not results[name] and first[name] != second[name]:
      # Another process, such as `Isolated`'s, would judge another question.
      results[name] = "its questions depend on the seed of Python's hashes"
  version = importlib.metadata.version("reasoning-gym")
  print(
    json.dumps(
      {
        "made_by": "python -m research.reasoning.tasks.gym",
        "reasoning_gym": version,
        "allowed": [name for name, why in results.items() if not why],
        "refused": {name: why for name, why in results.items() if why},
      },
      indent=1,
    )
  )


if __name__ == "__main__":
  main(*sys.argv[1:])
