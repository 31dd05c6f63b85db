"""What the flags of `generate --sampler=diffusion` say, and what they mean."""

import dataclasses
import math
from typing import get_args

from research.diffusion.growth import Growth
from research.diffusion.policies import (
  Factor,
  Hierarchy,
  Policy,
  Quota,
  Threshold,
)
from research.diffusion.remask import Kind, Remask
from research.typing import UserError

BLOCK = 32
"""Tokens of a block where neither the model nor a flag says how many."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
  """What the flags say, under their names; see `experiments.generate`."""

  length: int = 128
  canvas: str = "fixed"
  block: int | None = None
  steps: int | None = None
  policy: str = "quota"
  select: str = "candidate"
  plan: str = "even"
  remask: str = "none"
  cache: str = "none"
  guidance: float = 0.0
  ends: str = "any"
  edit: float | None = None
  seed: int = 0
  gif: str | None = None
  html: str | None = None

  def check(self, prompts: int) -> None:
    """Raises UserError for what is wrong whatever the model is.

    Args:
      prompts: how many there are.
    """
    if self.length < 1:
      raise UserError(
        f"--max_new_tokens: found {self.length}, expected at least 1"
      )
    policy_of(self.policy)
    cache_of(self.cache)
    planned = self.policy.startswith("quota")
    if self.steps is not None and not planned:
      raise UserError(
        f"--steps={self.steps}: --policy={self.policy} needs as many calls as "
        "it takes; expected --policy=quota, or no --steps"
      )
    if self.plan != "even" and not planned:
      raise UserError(
        f"--plan={self.plan}: --policy={self.policy} has no plan; expected "
        "--policy=quota"
      )
    if self.plan == "chance" and self.policy != "quota":
      raise UserError(
        f"--policy={self.policy}: --plan=chance draws how many places are "
        "filled; expected --policy=quota"
      )
    if self.plan == "chance" and self.select != "random":
      raise UserError(
        f"--select={self.select}: --plan=chance fills any place as likely as "
        "another; expected --select=random"
      )
    if remask_of(self.remask) is not None and self.plan != "chance":
      raise UserError(
        f"--remask={self.remask}: --plan={self.plan} says how many places are "
        "filled; expected --plan=chance"
      )
    if growth_of(self) is not None:
      self._check_growth()
    for name, file in (("gif", self.gif), ("html", self.html)):
      if file is not None and prompts > 1:
        raise UserError(f"--{name}: shows one prompt, found {prompts}")

  def _check_growth(self) -> None:
    """Raises UserError for what a canvas that grows cannot have."""
    alone = dict(steps=None, plan="even", cache="none", edit=None)
    for name, value in alone.items():
      if getattr(self, name) != value:
        raise UserError(
          f"--{name}={getattr(self, name)}: not with --canvas={self.canvas}, "
          "whose places are not known before and move; leave one of them out"
        )
    if self.policy.startswith("credit"):
      raise UserError(
        f"--policy={self.policy}: counts earlier calls place by place, and "
        f"with --canvas={self.canvas} places move; expected threshold:P, say"
      )


def growth_of(wanted: Wanted) -> Growth | None:
  """Returns how the canvas grows, see `experiments.generate`, or None."""
  name, colon, number = wanted.canvas.partition(":")
  if wanted.canvas == "fixed":
    return None
  if name == "auto" and not colon:
    return Growth(start=min(Growth.start, wanted.length))
  size = _whole(number)
  if name == "auto" and size is not None and 1 <= size <= wanted.length:
    return Growth(start=size)
  raise UserError(
    f"--canvas={wanted.canvas}: expected fixed, auto, or auto:N with N from 1 "
    f"to --max_new_tokens={wanted.length}"
  )


def policy_of(text: str) -> Policy:
  """Returns what a name and a number stand for, see `experiments.generate`."""
  name, colon, number = text.partition(":")
  value = _number(number) if colon else None
  if text == "quota":
    return Quota()
  if text == "hierarchy":
    return Hierarchy()
  if name == "quota+threshold" and value is not None and 0 < value <= 1:
    return Threshold(threshold=value, quota_first=True)
  if name in ("threshold", "credit") and value is not None and 0 < value <= 1:
    return Threshold(threshold=value)
  if name == "factor" and value is not None and value > 0:
    return Factor(factor=value)
  raise UserError(
    f"--policy={text}: expected quota, hierarchy, threshold:P, "
    "quota+threshold:P or credit:P with P in (0, 1], or factor:F with F above 0"
  )


def remask_of(text: str) -> Remask | None:
  """Returns what is masked again, see `experiments.generate`, or None."""
  kind, colon, number = text.partition(":")
  if text == "none":
    return None
  value = _number(number) if colon else None
  if kind in get_args(Kind) and value is not None and 0 <= value <= 1:
    return Remask(kind=kind, eta=value)
  raise UserError(
    f"--remask={text}: expected none, or cap:E, rescale:E or confidence:E with "
    "E from 0 to 1"
  )


def _number(text: str) -> float | None:
  try:
    value = float(text)
  except ValueError:
    return None
  return value if math.isfinite(value) else None


def _whole(text: str) -> int | None:
  return int(text) if text.isdecimal() and len(text) < 7 else None


def cache_of(text: str) -> tuple[str, int | None]:
  """Returns a cache's kind and its number, see `experiments.generate`."""
  name, colon, number = text.partition(":")
  if not colon and name in ("none", "prefix", "dual", "delayed"):
    return name, None
  least = {"vicinity": 0, "delayed": 1}.get(name)
  count = _whole(number)
  if least is not None and count is not None and count >= least:
    return name, count
  raise UserError(
    f"--cache={text}: expected none, prefix, dual, vicinity:N, delayed or"
    " delayed:N"
  )
