"""Math-Shepherd: labels by rollouts, in one string (Wang et al. 2024).

Layout: huggingface.co/datasets/peiyi9979/Math-Shepherd, dataset card. `input`
is the question and steps "Step k: ...", each followed by the tag; `label` is
the same text with "+" or "-" in place of each tag.
"""

import dataclasses
from typing import Any, ClassVar

from research.data.sources.jsonl import Record
from research.errors import UserError
from research.prm.formats import files
from research.prm.labelled import LabelledSolution

TAG = "\N{CYRILLIC SMALL LETTER KA}\N{CYRILLIC SMALL LETTER I}"
"""One token of Mistral's tokenizer, which is why it was taken."""


@dataclasses.dataclass(frozen=True)
class MathShepherd:
  """Math-Shepherd; a row with a tag missing or a step twice is refused."""

  single: ClassVar[bool] = True

  def solutions(self, record: Record) -> list[LabelledSolution]:
    """Returns the record's solution; steps keep their "Step k: "."""
    parts = record.text("input").split(TAG)
    if len(parts) < 2 or parts[-1]:
      raise record.wrong(
        "input", parts[-1][-40:], f"steps, each with the tag {TAG} at its end"
      )
    start = " Step 1: "
    if parts[0].count(start) != 1:
      count_of_start = f"{start!r} {parts[0].count(start)} times"
      raise record.wrong(
        "input", count_of_start, "it once, between question and steps"
      )
    prompt, first = parts[0].split(start)
    chunks = [start[1:] + first, *parts[1:-1]]
    for i, chunk in enumerate(chunks, start=1):
      if (after := f"\nStep {i + 1}: ") in chunk:
        raise record.wrong(
          "input", chunk[-40:], f"the tag {TAG} before {after!r}"
        )
    return [
      LabelledSolution(
        prompt=prompt,
        steps=tuple(chunk.strip() for chunk in chunks),
        labels=_labels(record, parts[:-1]),
        label_source="monte_carlo_hard",
        segmenter_id="math_shepherd",
        extra=files.extra(record, ("input", "label")),
      )
    ]

  def values(self, solution: LabelledSolution) -> dict[str, Any]:
    """Returns the record; steps without "Step k: " get one."""
    signs = files.hard(solution, "-+".__getitem__)
    steps = [
      text if text.startswith(f"Step {i}: ") else f"Step {i}: {text}"
      for i, text in enumerate(solution.steps, start=1)
    ]
    if any(TAG in text for text in (solution.prompt, *steps)):
      raise UserError(
        f"steps: found the tag {TAG}, expected none inside a text"
      )

    def joined(tags):
      tagged = [f"{x} {tag}" for x, tag in zip(steps, tags, strict=True)]
      return f"{solution.prompt} " + "\n".join(tagged)

    return dict(solution.extra) | {
      "input": joined([TAG] * len(steps)),
      "label": joined(signs),
    }


def _labels(record: Record, parts: list[str]) -> tuple[int, ...]:
  label, at, labels = record.text("label"), 0, []
  for i, part in enumerate(parts, start=1):
    at += len(part)
    sign = label[at : at + 1]
    if label[at - len(part) : at] != part or sign not in ("+", "-"):
      raise record.wrong(
        "label", label[max(0, at - 20) : at + 20], f"'+' or '-' after step {i}"
      )
    labels.append(int(sign == "+"))
    at += 1
  if label[at:]:
    raise record.wrong("label", label[at:], "the end, after the last sign")
  return tuple(labels)
