"""LoRA+: a larger learning rate for the factor initialised to zero.

Hayou et al. 2024 (arXiv:2402.12354): `b` learns at `ratio` (about 16) times the
rate of `a`, whose best rate is then about half of plain LoRA's. An embedding's
adapter has `a` initialised to zero, so there `a` learns faster. `peft_groups`
implements the parameter groups of PEFT's `create_loraplus_optimizer`.
"""

import re
from collections.abc import Callable

import optax

from research import ranges, tree
from research.lora.methods.lora import LoRA
from research.lora.optim import pairs
from research.lora.optim.pairs import DOWN, UP
from research.optim import optim, rates
from research.typing import Array, UserError

EMBEDDING = r"(^|/)embed/"
"""Regular expression for paths of embeddings' adapters."""


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
  """Returns `optim.adamw` with a larger learning rate for every `b`.

  Its `init` raises UserError if no trainable array is a `b`.

  Args:
    learning_rate: rate of `a` and all other parameters: a number, or a
      schedule of the number of updates done.
    ratio: rate of `b` over that of `a`; on an embedding, `a` over `b`.
  """
  ranges.check("loraplus", ranges.NonNegativeFloat, ratio=ratio)
  fast = re.compile(rf"{EMBEDDING}(.*/)?{DOWN}$|^(?!(.*/)?embed/)(.*/)?{UP}$")
  rest = rates.adamw(
    learning_rate,
    rates.table([(fast.pattern, ratio)]),
    b1=b1,
    b2=b2,
    eps=eps,
    weight_decay=weight_decay,
    clip=clip,
  )

  def check(params):
    if not any(fast.search(path) for path, _ in tree.flatten_paths(params)):
      raise UserError(
        f"LoRA+: found no trainable array that ends in /{UP}.\n"
        "Expected adapters of LoRA to be trainable: '/trained/'."
      )

  return _checked(check, rest)


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
  """Returns `optim.adamw` with the parameter groups of PEFT 0.21.

  Its `init` raises UserError for adapters of other methods than LoRA, since
  PEFT's groups depend on its names and axes of LoRA's parameters.

  Vectors (norms, biases, DoRA's magnitudes) learn at `ratio` like `b`; those of
  this group whose path matches `undecayed` have no weight decay. The
  embedding's adapters learn at `embedding`, with weight decay.

  Args:
    learning_rate: rate of all other parameters: a number, or a schedule of the
      number of updates done.
    ratio: rate of `b` and of vectors over `learning_rate`.
    embedding: rate of the embedding's adapters where the schedule is at `peak`.
    peak: maximum of the schedule; None if `learning_rate` is a number.
  """
  ranges.check("peft_groups", ranges.PositiveFloat, peak=peak)
  ranges.check(
    "peft_groups", ranges.NonNegativeFloat, ratio=ratio, embedding=embedding
  )
  share = embedding / (learning_rate if peak is None else peak)
  rest = rates.adamw(
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

  def check(params):
    for path, method in pairs.methods(params).items():
      if not isinstance(method, LoRA):
        raise UserError(
          f"LoRA+: {path}: {type(method).__name__}, expected plain LoRA or "
          "what extends it; loraplus.loraplus takes any."
        )

  return _checked(check, rest)


def _checked(check, inner) -> optax.GradientTransformation:
  """Returns `inner` with `check(params)` called in its `init`."""

  def init(params):
    check(params)
    return inner.init(params)

  return optax.GradientTransformation(init, inner.update)


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
