"""A pool of samples in a file: a problem a line, appended as it is searched.

A line is a JSON object: `problem` (a `reasoning.Problem`), `samples` (of each a
`reasoning.Trace`, a `reasoning.Verdict`, and the `root`, the copy of the prompt
that it comes from), `ledger` (`search.Ledger`), and `prompt_ledger`, the part
of it that reading the prompt costs, however many samples follow.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from research.data.sources import jsonl
from research.io.fields import Fields
from research.reasoning.problem import Problem, Verdict
from research.reasoning.trace import Trace
from research.search.engine import Path
from research.search.ledger import Ledger
from research.typing import UserError

FILE = "pool.jsonl"


@dataclasses.dataclass(frozen=True)
class Sample:
  """A solution that was searched.

  Attributes:
    trace: steps with their scores.
    verdict: the task verifier's judgement of the text.
    root: index of the prompt's copy that it comes from.
  """

  trace: Trace
  verdict: Verdict
  root: int = 0

  @property
  def answer(self) -> str | None:
    """What it votes for; None if it was cut, or has no answer."""
    return self.trace.vote

  @property
  def correct(self) -> bool:
    """Whether it gives a right answer; a solution that was cut gives none."""
    return self.answer is not None and self.verdict.correct

  @property
  def scores(self) -> tuple[float, ...]:
    return tuple(s.score for s in self.trace.steps if s.score is not None)

  def path(self) -> Path:
    """Returns it as `research.search.choose` reads it, without its tokens."""
    steps = [x for x in self.trace.steps if x.start is not None]
    lengths = [x.end - x.start for x in steps]
    if rest := self.trace.n_new - sum(lengths):
      # Of a step that had no text, and so is none.
      lengths = [*lengths[:-1], lengths[-1] + rest] if lengths else [rest]
    return Path(
      problem=0,
      root=self.root,
      prompt=self.trace.n_prompt,
      steps=tuple((0,) * n for n in lengths),
      scores=self.scores,
      log_prob=self.trace.logprob_sum,
      done=self.trace.finish in ("eos", "length"),
      stopped=self.trace.complete,
    )


@dataclasses.dataclass(frozen=True)
class Searched:
  """A problem, and what was found.

  Attributes:
    samples: in the search's order.
    ledger: cost of the whole search.
    prompt_ledger: the cost that does not grow with the number of samples.
  """

  problem: Problem
  samples: tuple[Sample, ...]
  ledger: Ledger
  prompt_ledger: Ledger

  def to_json(self) -> dict[str, Any]:
    return {
      "problem": self.problem.to_json(),
      "samples": [
        {
          "trace": x.trace.to_json(),
          "verdict": x.verdict.to_json(),
          "root": x.root,
        }
        for x in self.samples
      ],
      "ledger": self.ledger.to_json(),
      "prompt_ledger": self.prompt_ledger.to_json(),
    }

  @classmethod
  def from_json(cls, values: Mapping[str, Any], where: str) -> "Searched":
    """Returns what `to_json` wrote.

    Raises:
      UserError: it is not such an object.
    """
    samples = values.get("samples")
    if not isinstance(samples, list):
      raise UserError(f"{where}: samples: found none, expected a list")
    return cls(
      Problem.from_json(_object(values, "problem", where), where),
      tuple(
        _sample(x, f"{where}: samples[{i}]") for i, x in enumerate(samples)
      ),
      _ledger(_object(values, "ledger", where), f"{where}: ledger"),
      _ledger(_object(values, "prompt_ledger", where), f"{where}: ledger"),
    )


def read(path: pathlib.Path) -> list[Searched]:
  """Returns a pool's problems; none if there is no file.

  Raises:
    UserError: a line is not of a pool; one that has no end is left out.
  """
  if not path.exists():
    return []
  problems = []
  for i, line in enumerate(_parts(path)[0].split(b"\n")[:-1], 1):
    where = f"{path}:{i}"
    try:
      record = jsonl.parse(line.decode("utf-8"), where)
    except UnicodeDecodeError as error:
      raise UserError(f"{where}: is not UTF-8 at byte {error.start}") from error
    problems.append(Searched.from_json(record.values, where))
  return problems


def repair(path: pathlib.Path) -> None:
  """Cuts off a last line without an end, which a killed run has left."""
  if not path.exists():
    return
  whole, rest = _parts(path)
  if rest:
    with path.open("r+b") as file:
      file.truncate(len(whole))


def append(path: pathlib.Path, searched: Sequence[Searched]) -> None:
  """Adds problems, each in one write.

  All is ASCII: a model may write what a terminal would obey.
  """
  with path.open("a", encoding="ascii") as file:
    for problem in searched:
      file.write(json.dumps(problem.to_json(), allow_nan=False) + "\n")
      file.flush()


def _parts(path: pathlib.Path) -> tuple[bytes, bytes]:
  """Returns whole lines, and what stands behind the last of them."""
  data = path.read_bytes()
  end = data.rfind(b"\n") + 1
  return data[:end], data[end:]


def _object(values: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
  value = values.get(name)
  if not isinstance(value, dict):
    raise UserError(
      f"{where}: {name}: found {value!r:.60}, expected an object: is it a"
      " line of experiments.search's pool.jsonl?"
    )
  return value


def _sample(values: Any, where: str) -> Sample:
  if not isinstance(values, dict):
    raise UserError(f"{where}: found {values!r:.60}, expected an object")
  return Sample(
    Trace.from_json(_object(values, "trace", where), where),
    Verdict.from_json(_object(values, "verdict", where), where),
    Fields(values, where).integer("root", least=0),
  )


def _ledger(values: Mapping[str, Any], where: str) -> Ledger:
  names = [x.name for x in dataclasses.fields(Ledger)]
  bad = [k for k, x in values.items() if k not in names or not _count(x)]
  if bad:
    raise UserError(
      f"{where}: {bad[0]}: found {values[bad[0]]!r:.40}, expected numbers from"
      f" 0 on of {', '.join(names)}"
    )
  return Ledger(**values)


def _count(x: Any) -> bool:
  return isinstance(x, int | float) and not isinstance(x, bool) and x >= 0
