"""What few bits leave of answers: a task's accuracy, and its interval.

Perplexity and divergence are about all tokens; a task asks for some of them and
counts. Rows answer the same questions, so what is lost is a paired difference.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats as scipy_stats

from experiments.core.stats import Mean, above
from experiments.studies.protocol import Rows, Verdict
from experiments.studies.quant.quant_rows import by_method, row
from experiments.studies.quant.quant_study import Row
from research import intervals
from research.data.sources.last_words import LastWords
from research.interop import lm_eval
from research.quant.algorithms.calibrate import Calibration
from research.quant.algorithms.gptq import GPTQ
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.methods import GPTQMethod

BASE = "32 bits"
"""Name of the row that nothing was done to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastWord:
  """Whether the likeliest tokens are a sentence's last word.

  Attributes:
    data: the sentences.
    batch: that are read at a time.
    name: of the task.
  """

  data: LastWords
  batch: int = 8
  name: str = "last word"

  def right(self, loaded: Any) -> list[bool]:
    """Returns which last words a model finds, exactly and by itself."""
    found = lm_eval.loglikelihood(loaded, self.data.items(), self.batch)
    return [greedy for _, greedy in found]


def rows(
  calibration: Calibration, bits: Sequence[int] = (4, 3), block: int = 64
) -> tuple[Row, ...]:
  """Returns the model itself, some formats, and ever fewer bits by GPTQ.

  Args:
    calibration: what GPTQ reads.
    bits: of groups of `block`, most first; then 2 bits have groups of 32, so
      2.56 in all.
    block: inputs that share a scale.
  """
  method = GPTQMethod(options=GPTQ(drift=0.5))
  formats = [Affine(bits=b, block=block) for b in bits]
  formats.append(Affine(bits=2, block=32))
  out = [
    Row(name=BASE, group="none", errors=False),
    row(Affine(bits=8, block=block), group="integers"),
    row(Affine(bits=bits[0], block=block), group="integers"),
    row(Codebook(kind="nf4"), group="codebooks"),
  ]
  out += [by_method(f, f"GPTQ {f.name}", calibration, method) for f in formats]
  return tuple(dataclasses.replace(r, errors=False) for r in out)


class RelativeAccuracy(NamedTuple):
  """Accuracy, and which share of the base's it is; halves of 95% intervals."""

  accuracy: float
  half: float
  share: float
  share_half: float

  def __str__(self) -> str:
    return (
      f"{self.accuracy:.1%} ± {self.half:.1%}, {self.share:.1%} ±"
      f" {self.share_half:.1%} of the base's"
    )


def relative_accuracy(
  right: Sequence[bool], base: Sequence[bool]
) -> RelativeAccuracy:
  """Returns accuracy and its share of the base's.

  The share's interval is that of a ratio of means over the same questions
  (the delta method); the accuracy's is Wilson's, its larger half.

  Args:
    right: which questions were answered.
    base: the same of the base, which answered at least one.
  """
  a, b = np.asarray(right, float), np.asarray(base, float)
  p = float(a.mean())
  low, high, _ = intervals.of_share(a)
  share = p / float(b.mean())
  apart = (a - share * b) / b.mean()
  half = scipy_stats.norm.ppf(intervals.UPPER) * scipy_stats.sem(apart)
  return RelativeAccuracy(p, float(max(p - low, high - p)), share, float(half))


def answers(found: Rows, task: str = "last word") -> list[Verdict]:
  """Returns what each row keeps of a task's accuracy.

  The share's interval decides: few questions decide little.

  Args:
    found: rows as they are measured.
    task: its name.
  """
  base = found.get(BASE)
  if base is None or not any(base["right"][task]):
    return []
  out = []
  for name, measured in found.items():
    if "failed" in measured or name == BASE:
      continue
    said = relative_accuracy(measured["right"][task], base["right"][task])
    bits = measured["bits_per_weight"]
    for least in (0.95,) if bits > 3.9 else (0.5,):
      out.append(
        Verdict(
          f"{name}, {bits:.2f} bits, keeps {least:.0%} of the accuracy: {task}",
          f"{said}; {len(base['right'][task])} questions",
          above(Mean(said.share, said.share_half), least),
        )
      )
  return out
