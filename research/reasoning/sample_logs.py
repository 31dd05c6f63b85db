"""Samples in lm-evaluation-harness' layout, for others to score again.

The harness writes an object a document and filter, with `--log_samples`, to
`samples_TASK_DATE.jsonl` (`lm_eval/loggers/evaluation_tracker.py`, 0.4.13):
`doc_id, doc, target, arguments, resps, filtered_resps, filter, metrics,
doc_hash, prompt_hash, target_hash`, and a field a metric. `resps` has a list of
all repeats for each request, and a generation task has one request.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from research.data.sources import Paths, jsonl
from research.errors import UserError
from research.reasoning.problem import Problem, Verdict

INVALID = "[invalid]"
"""What the harness' filters write where there is no answer."""

_FIELDS = {
  "doc_id": int,
  "doc": dict,
  "target": str,
  "arguments": dict,
  "resps": list,
  "filtered_resps": list,
}


@dataclasses.dataclass(frozen=True)
class SampleLog:
  """A document and what a model answered, of a generation task.

  Attributes:
    doc_id: its index in the task.
    doc: the document.
    target: the reference answer; "" for none.
    prompt: what the model read.
    responses: its texts, one a repeat.
    filtered: what the filter left of them: one answer for all, as `take_first`
      or a vote leaves it, or a tuple with one a repeat.
    metrics: scores by name.
    filter: the filter's name.
    generation: settings of the sampler, such as `until` and `temperature`.
  """

  doc_id: int
  doc: Mapping[str, Any]
  target: str
  prompt: str
  responses: tuple[str, ...]
  filtered: str | tuple[str, ...]
  metrics: Mapping[str, float]
  filter: str = "none"
  generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def to_json(self) -> dict[str, Any]:
    """Returns the harness' object, hashes included.

    Raises:
      UserError: a metric has the name of a field.
    """
    single = isinstance(self.filtered, str)
    values = {
      "doc_id": self.doc_id,
      "doc": dict(self.doc),
      "target": self.target,
      "arguments": {
        "gen_args_0": {"arg_0": self.prompt, "arg_1": dict(self.generation)}
      },
      "resps": [list(self.responses)],
      "filtered_resps": [self.filtered if single else list(self.filtered)],
      "filter": self.filter,
      "metrics": list(self.metrics),
      "doc_hash": _hash(json.dumps(self.doc, indent=2, ensure_ascii=False)),
      "prompt_hash": _hash(self.prompt),
      "target_hash": _hash(self.target),
    }
    if taken := values.keys() & self.metrics.keys():
      raise UserError(
        f"SampleLog.metrics: found {sorted(taken)[0]!r}, a field's name."
      )
    return values | dict(self.metrics)

  @classmethod
  def from_json(cls, values: Mapping[str, Any], where: str) -> "SampleLog":
    """Returns what the harness, or `to_json`, wrote.

    Raises:
      UserError: a field is missing or of another type, or there are several
        requests a document, as in tasks of multiple choice.
    """
    for name, kind in _FIELDS.items():
      if not isinstance(values.get(name), kind):
        raise UserError(
          f"{where}: field {name!r}: found {values.get(name)!r:.60}, expected"
          f" {kind.__name__}: is it lm-evaluation-harness' --log_samples?"
        )
    requests, responses = values["arguments"], values["resps"]
    sizes = [len(values[x]) for x in ("arguments", "resps", "filtered_resps")]
    if sizes != [1, 1, 1]:
      raise UserError(
        f"{where}: found {max(sizes)} requests for one document, expected one:"
        " the samples of a task that generates text."
      )
    [arguments] = requests.values()
    [filtered] = values["filtered_resps"]
    if not isinstance(filtered, str):
      filtered = _texts(filtered, where, "filtered_resps")
    metrics = {name: values.get(name) for name in values.get("metrics", [])}
    return cls(
      doc_id=values["doc_id"],
      doc=values["doc"],
      target=values["target"],
      prompt=_text(arguments.get("arg_0"), where, "arguments"),
      responses=_texts(responses[0], where, "resps"),
      filtered=filtered,
      metrics=metrics,
      filter=values.get("filter", "none"),
      generation=arguments.get("arg_1") or {},
    )


def sample_of(
  doc_id: int,
  problem: Problem,
  texts: Sequence[str],
  verdicts: Sequence[Verdict],
  generation: Mapping[str, Any] | None = None,
) -> SampleLog:
  """Returns a problem's samples as the harness would log them.

  The metric `exact_match` is that of the first text, as its filter `take_first`
  has it, and `mean_correct` the share of right ones.

  Args:
    doc_id: the problem's index.
    texts: the model's, at least one.
    verdicts: one a text.
  """
  if not texts or len(texts) != len(verdicts):
    raise UserError(
      f"sample_of: found {len(texts)} texts and {len(verdicts)} verdicts,"
      " expected one a text."
    )
  correct = [float(x.correct) for x in verdicts]
  return SampleLog(
    doc_id=doc_id,
    doc=problem.to_json(),
    target=problem.answer or "",
    prompt=problem.prompt,
    responses=tuple(texts),
    filtered=tuple(
      INVALID if x.canonical is None else x.canonical for x in verdicts
    ),
    metrics={
      "exact_match": correct[0],
      "mean_correct": sum(correct) / len(correct),
    },
    generation=generation or {},
  )


def write_samples(path: str, samples: Iterable[SampleLog]) -> None:
  """Writes samples, a line each; readers see all of the file or none."""
  target = pathlib.Path(path)
  part = target.with_name(target.name + ".part")
  with part.open("w", encoding="utf-8") as file:
    for sample in samples:
      line = json.dumps(sample.to_json(), ensure_ascii=False, allow_nan=False)
      file.write(line + "\n")
  part.replace(target)


def read_samples(paths: Paths) -> list[SampleLog]:
  """Reads the samples of files that the harness or `write_samples` wrote."""
  return [SampleLog.from_json(x.values, x.where) for x in jsonl.read(paths)]


def _hash(text: str) -> str:
  return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _text(value: Any, where: str, field: str) -> str:
  if not isinstance(value, str):
    raise UserError(
      f"{where}: field {field!r}: found {value!r:.60}, expected text."
    )
  return value


def _texts(values: Any, where: str, field: str) -> tuple[str, ...]:
  if not isinstance(values, list):
    raise UserError(
      f"{where}: field {field!r}: found {values!r:.60}, expected a list."
    )
  return tuple(_text(x, where, field) for x in values)
