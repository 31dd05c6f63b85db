"""LoRA+: the factor that starts at zero learns faster.

Hayou et al. 2024 (arXiv:2402.12354): `b` learns at `ratio` times the rate of
`a`, about 16; with it the rate of `a` is best about half of plain LoRA's.
`peft_groups` are the finer rules of PEFT's `create_loraplus_optimizer`.
"""

import re
from collections.abc import Callable

import optax

from research.lora.pairs import UP
from research.training import optim, ranges, rates
from research.typing import Array

EMBEDDING = r"(^|/)embed/"
"""Paths of adapters on the embedding."""


def loraplus(
  learning_rate: optim.Number | optim.Schedule,
  *,
  ratio: optim.Number = 16.0,
  b1: optim.Number = 0.9,
  b2: optim.Number = 0.999,
  eps: optim.Number = 1e-8,
  weight_decay: optim.Number = 0.0,
  clip: optim.Number | None = 1.0,
) -> optax.GradientTransformation:
  """Returns AdamW with the rate of every `b` multiplied.

  Args:
    learning_rate: of `a` and all else: a number, or a schedule of the updates
      done.
    ratio: rate of `b` over that of `a`.
    b1: decay of the mean.
    b2: decay of the mean square.
    eps: added to the root of the mean square.
    weight_decay: share of a parameter taken off at rate 1.
    clip: bound of the gradient's global norm, or None.
  """
  ranges.non_negative("loraplus", ratio=ratio)
  return rates.adamw(
    learning_rate,
    rates.table([(rf"(^|/){UP}$", ratio)]),
    b1=b1,
    b2=b2,
    eps=eps,
    weight_decay=weight_decay,
    clip=clip,
  )


def peft_groups(
  learning_rate: optim.Number | optim.Schedule,
  *,
  ratio: optim.Number = 16.0,
  embedding: optim.Number = 1e-6,
  peak: optim.Number | None = None,
  undecayed: str = r"bias$",
  b1: optim.Number = 0.9,
  b2: optim.Number = 0.999,
  eps: optim.Number = 1e-8,
  weight_decay: optim.Number = 0.0,
  clip: optim.Number | None = None,
) -> optax.GradientTransformation:
  """Returns AdamW with the parameter groups of PEFT 0.21.

  Vectors (norms, biases, DoRA's magnitudes) learn at `ratio` like `b`; adapters
  on the embedding at `embedding`; and of the first group those do not decay
  that `undecayed` finds. All of the embedding's adapters decay.

  Args:
    learning_rate: of all else: a number, or a schedule of the updates done.
    ratio: rate of `b` and of vectors over `learning_rate`.
    embedding: rate of the embedding's adapters where the schedule is at `peak`.
    peak: of the schedule; None for a `learning_rate` that is a number.
    undecayed: regular expression, searched for in paths.
    b1: decay of the mean.
    b2: decay of the mean square.
    eps: added to the root of the mean square.
    weight_decay: share of a parameter taken off at rate 1.
    clip: bound of the gradient's global norm, or None.
  """
  ranges.positive("peft_groups", peak=peak)
  ranges.non_negative("peft_groups", ratio=ratio, embedding=embedding)
  share = embedding / (learning_rate if peak is None else peak)
  return rates.adamw(
    learning_rate,
    _peft_factor(ratio, share),
    b1=b1,
    b2=b2,
    eps=eps,
    weight_decay=weight_decay,
    decayed=lambda path, x: (
      not _is_fast(path, x) or re.search(undecayed, path) is None
    ),
    clip=clip,
  )


def _peft_factor(ratio, share) -> Callable[[str, Array], float]:
  def factor(path, x):
    if re.search(EMBEDDING, path):
      return share
    return ratio if _is_fast(path, x) else 1.0

  return factor


def _is_fast(path: str, x: Array) -> bool:
  if re.search(EMBEDDING, path):
    return False
  return path.rpartition("/")[2] == UP or rates.ndim(path, x) == 1
