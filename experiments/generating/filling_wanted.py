"""What the flags of `generate --sampler=diffusion` say, and what they mean."""

import dataclasses
import math
from collections.abc import Sequence
from typing import get_args

from experiments.generating import filling_gaps
from experiments.generating.flag_text import parse
from research.diffusion.sampling.growth import Growth
from research.diffusion.sampling.policies import (
  Factor,
  Hierarchy,
  Policy,
  Quota,
  Threshold,
)
from research.diffusion.sampling.remask import Kind, Remask
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
  place_temperature: float | None = None
  tempered: bool = False
  cache: str = "none"
  guidance: float = 0.0
  ends: str = "any"
  stop_early: bool = True
  edit: float | None = None
  edit_steps: int = 16
  infill: Sequence[str] = ()
  seed: int = 0
  gif: str | None = None
  html: str | None = None

  def check(self, prompts: int) -> None:
    """Raises UserError for what is wrong whatever the model is.

    Args:
      prompts: how many there are, or texts with gaps.
    """
    if self.length < 1:
      raise UserError(
        f"--max_new_tokens: found {self.length}, expected at least 1"
      )
    cache_of(self.cache)
    for text in self.infill:
      filling_gaps.parsed(text)
    self._check_places()
    if self.edit is None and self.edit_steps != Wanted.edit_steps:
      raise UserError(
        f"--edit_steps={self.edit_steps}: has no effect without --edit"
      )
    for name in ("guidance", "edit"):
      # Which a flag's bounds let pass.
      if not math.isfinite(getattr(self, name) or 0.0):
        raise UserError(f"--{name}={getattr(self, name)}: expected a number")
    if self.infill and not self.stop_early:
      raise UserError(
        "--nostop_early: --infill fills all gaps, whatever ends in them; leave "
        "it out"
      )
    if growth_of(self) is not None:
      self._check_growth()
    for name, file in (("gif", self.gif), ("html", self.html)):
      if file is not None and prompts > 1:
        raise UserError(f"--{name}: shows one prompt, found {prompts}")

  def _check_places(self) -> None:
    """Raises UserError for ways to choose places that exclude each other."""
    policy = policy_of(self.policy)
    if self.steps is not None and not policy.uses_quota:
      raise UserError(
        f"--steps={self.steps}: --policy={self.policy} needs as many calls as "
        "it takes; expected --policy=quota, or no --steps"
      )
    if self.plan != "even" and not policy.uses_quota:
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
    if policy.needs_probabilities and self.select in ("entropy", "random"):
      raise UserError(
        f"--select={self.select}: --policy={self.policy} compares how sure "
        "places are with a probability; expected --select=candidate, max or "
        "margin, or --policy=quota"
      )
    if self.place_temperature is not None and not self.place_temperature > 0:
      raise UserError(
        f"--place_temperature={self.place_temperature}: expected more than 0, "
        "or leave it out for the surest places"
      )
    if self.place_temperature is not None and self.policy != "quota":
      raise UserError(
        f"--place_temperature={self.place_temperature}: --policy={self.policy} "
        "judges how sure places are, not only which is surer; expected "
        "--policy=quota"
      )
    if self.place_temperature is not None and self.select == "random":
      raise UserError(
        f"--place_temperature={self.place_temperature}: has no effect with "
        "--select=random; leave one of them out"
      )

  def _check_growth(self) -> None:
    """Raises UserError for what a canvas that grows cannot have."""
    if self.infill:
      raise UserError(
        f"--infill: says how long gaps are, and --canvas={self.canvas} finds "
        "out; leave one of them out"
      )
    if self.cache not in ("none", "prefix"):
      raise UserError(
        f"--cache={self.cache}: not with --canvas={self.canvas}, whose places "
        "move; expected prefix, which keeps the prompt, or none"
      )
    alone = dict(steps=None, plan="even", edit=None)
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


_GROWTH = dict(
  by=int, window=int, begin=float, ready=float, low=float, ends=int
)
_CREDIT = dict(alpha=float, beta=float, gamma=float)
_REMASK = dict(start=float, stop=float)


def growth_of(wanted: Wanted) -> Growth | None:
  """Returns how the canvas grows, see `experiments.generate`, or None."""
  if wanted.canvas == "fixed":
    return None
  it = parse("canvas", wanted.canvas)
  start = min(Growth.start, wanted.length) if it.text is None else it.whole
  if it.name == "auto" and start is not None and 1 <= start <= wanted.length:
    return it.build(Growth, _GROWTH, start=start)
  raise UserError(
    f"{it.where}: expected fixed, auto, or auto:N with N from 1 to "
    f"--max_new_tokens={wanted.length}, then perhaps ,by=8 or another of "
    f"{', '.join(_GROWTH)}"
  )


def policy_of(text: str) -> Policy:
  """Returns what a name and a number stand for, see `experiments.generate`."""
  it = parse("policy", text)
  value = it.number
  share = value is not None and 0 < value <= 1
  if text == "quota":
    return Quota()
  if it.name == "hierarchy" and (it.text is None or share):
    given = {} if value is None else dict(threshold=value)
    found = it.build(Hierarchy, dict(low=float), **given)
    if 0 < found.low <= 1:
      return found
  if it.name in ("threshold", "quota+threshold") and share:
    both = it.name != "threshold"
    return it.build(Threshold, {}, threshold=value, quota_first=both)
  if it.name == "credit" and share and credit_of(text) is not None:
    return Threshold(threshold=value)
  if it.name == "factor" and value is not None and value > 0:
    return it.build(Factor, {}, factor=value)
  raise UserError(
    f"{it.where}: expected quota, hierarchy[:P][,low=P], threshold:P, "
    "quota+threshold:P or credit:P[,alpha=A][,beta=B][,gamma=G] with P in "
    "(0, 1], or factor:F with F above 0"
  )


def credit_of(text: str) -> dict[str, float] | None:
  """Returns the numbers of `credit`, None of another policy."""
  it = parse("policy", text)
  if it.name != "credit":
    return None
  found = it.numbers(_CREDIT)
  if min(found.values(), default=0.0) >= 0 and found.get("beta", 0.0) < 1:
    return found
  raise UserError(
    f"{it.where}: expected alpha and gamma of at least 0, and beta from 0 to "
    "below 1"
  )


def remask_of(text: str) -> Remask | None:
  """Returns what is masked again, see `experiments.generate`, or None."""
  if text == "none":
    return None
  it = parse("remask", text)
  value = it.number
  if it.name in get_args(Kind) and value is not None and 0 <= value <= 1:
    return it.build(Remask, _REMASK, kind=it.name, eta=value)
  raise UserError(
    f"{it.where}: expected none, or cap:E, rescale:E or confidence:E with E "
    "from 0 to 1, then perhaps ,start=T,stop=T with times from 0 to 1"
  )


def cache_of(text: str) -> tuple[str, dict[str, int]]:
  """Returns a cache's kind and its numbers, see `experiments.generate`."""
  if text in ("none", "prefix", "dual"):
    return text, {}
  it = parse("cache", text)
  count = it.whole
  if it.name == "vicinity" and count is not None:
    more = it.numbers(dict(after=int))
    return it.name, dict(before=count, after=count) | more
  if it.name == "delayed" and (it.text is None or (count or 0) >= 1):
    more = it.numbers(dict(halvings=int))
    return it.name, ({} if count is None else dict(refresh=count)) | more
  raise UserError(
    f"{it.where}: expected none, prefix, dual, vicinity:N[,after=M], delayed "
    "or delayed:N, then perhaps ,halvings=H"
  )
