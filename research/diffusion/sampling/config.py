"""All settings of a diffusion sampler, which check themselves once.

`SamplerConfig` is what Python gives, what gin files bind, and where the flags
of `experiments.generate --sampler=diffusion` come from
(`experiments.core.flags_from`); `for_model` makes it the static argument of the
sampler's programs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from research.diffusion.sampling.policies import (
  Credit,
  Factor,
  Hierarchy,
  Policy,
  Quota,
  Threshold,
)
from research.diffusion.sampling.remask import Remask
from research.errors import UserError
from research.io import settings
from research.io.settings import Form, Forms, setting
from research.ranges import AtLeast, NonNegativeInt, PositiveInt, Ranged, Share

BLOCK = 32
"""Tokens of a block where neither the model nor a setting says how many."""

Select = Literal["candidate", "max", "margin", "entropy", "random"]
Plan = Literal["even", "dream", "linear", "cosine", "chance"]
Ends = Literal["any", "last", "never"]


@dataclasses.dataclass(frozen=True)
class Prefix:
  """Keys and values of all before a block are kept."""


@dataclasses.dataclass(frozen=True)
class Dual:
  """Keys and values of all around a block are kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vicinity(Ranged):
  """Keys and values of all but some tokens around a block are kept.

  Attributes:
    before: tokens before the block that are read again.
    after: tokens behind it; None for as many.
  """

  before: NonNegativeInt
  after: NonNegativeInt | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delayed(Ranged):
  """Keys and values of all but masks and what was just filled are kept.

  Attributes:
    refresh: calls of a block after which all is read again; 1 is no cache,
      None for never.
    halvings: how often the number of tokens that a call reads may halve.
  """

  refresh: PositiveInt | None = None
  halvings: NonNegativeInt = 3


Cache = Prefix | Dual | Vicinity | Delayed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth(Ranged):
  """When a canvas grows, and by how much; the defaults are DAEDAL's.

  See `variable_length` (Li et al. 2025, arXiv:2508.00819).

  Attributes:
    start: places at first (the paper's L_init); None for 64, or the longest
      canvas where that is shorter.
    by: masks that are added at the end, or that a place becomes (E_factor).
    window: positions whose probability of an end is averaged (W_eos).
    eos_threshold: readiness from which the canvas is long enough to begin
      (tau_eos).
    expand_threshold: readiness from which nothing is inserted (tau_expand).
    low_threshold: candidates less likely than this are in doubt (tau_low).
    ends: ends put behind the canvas where it is long enough to begin: not in
      the paper, but in its code, half a window.
  """

  start: PositiveInt | None = None
  by: AtLeast(2) = 8
  window: PositiveInt = 32
  eos_threshold: Share = 0.5
  expand_threshold: Share = 0.9
  low_threshold: Share = 0.1
  ends: NonNegativeInt = 16

  def first_length(self, length: int) -> int:
    """Returns the places of a canvas at first, of `length` at most."""
    return min(64, length) if self.start is None else self.start


POLICIES = Forms(
  (
    Form("quota", Quota),
    Form("threshold", Threshold, dict(quota_first=False)),
    Form("quota+threshold", Threshold, dict(quota_first=True)),
    Form("factor", Factor),
    Form("credit", Credit, dict(quota_first=False)),
    Form("hierarchy", Hierarchy),
  )
)
CACHES = Forms(
  (
    Form("none", None),
    Form("prefix", Prefix),
    Form("dual", Dual),
    Form("vicinity", Vicinity),
    Form("delayed", Delayed),
  )
)
REMASKS = Forms(
  (
    Form("none", None),
    *(
      Form(kind, Remask, dict(kind=kind))
      for kind in ("cap", "rescale", "confidence")
    ),
  )
)
CANVASES = Forms((Form("fixed", None), Form("auto", Growth)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
  """How a diffusion model fills in masks; all of it is static.

  What a setting does is said beside it.

  Attributes:
    mask_id: of the mask, which is never a candidate; None until `for_model`.
    end: token ids that end a text, which the model says as well.

  Raises:
    UserError: a setting is out of bounds, has no effect or contradicts another.
  """

  length: int = setting(
    128, "Maximum number of new tokens.", flag="max_new_tokens", least=1
  )
  canvas: Growth | None = setting(
    None,
    "length of the answer: fixed (`length`), or auto (DAEDAL): 64 positions at "
    "first (auto:N for N), extended up to `length` while the model does not "
    "expect the text to end; use it with policy=threshold:0.9. Options and "
    "defaults: auto,by=8,window=32,begin=0.5,ready=0.9,low=0.1,ends=16 (masks "
    "added at a time, positions tested for an end, thresholds).",
    forms=CANVASES,
  )
  block: int | None = setting(
    None,
    "tokens per block; blocks are filled from left to right. By default the "
    "model's own block size, else 32, or the whole answer if shorter.",
    least=1,
  )
  steps: int | None = setting(
    None,
    "forward passes in all, over all blocks; by default one per token. For "
    "policy=quota.",
    least=1,
  )
  policy: Policy = setting(
    Quota(),
    "which positions each call fills: quota (a number set by `steps`), "
    "threshold:P (all with confidence of at least P), quota+threshold:P "
    "(whichever fills more; LLaDA 2), factor:F (Fast-dLLM), credit:P (dInfer: "
    "a threshold on confidence accumulated over calls; options "
    "credit:P,alpha=0.7,beta=0.8,gamma=0.2) or hierarchy (dInfer; "
    "hierarchy:0.92,low=0.62: every position above the first threshold, and "
    "the most confident of each run of masks above the second).",
    forms=POLICIES,
  )
  select: Select = setting(
    "candidate",
    "the confidence that ranks positions: the probability of the sampled "
    "candidate (LLaDA's low_confidence; biased at temperatures above 0), the "
    "largest probability (max), the margin between the two largest, or, with "
    "policy=quota, low entropy, or random.",
  )
  plan: Plan = setting(
    "even",
    "with policy=quota, the schedule of how many positions each call fills; "
    "chance draws the number (with select=random: ancestral sampling).",
  )
  place_temperature: float | None = setting(
    None,
    "with policy=quota, sample the positions to fill, at this temperature of "
    "their confidence (Dream's alg_temp); by default the most confident are "
    "filled.",
  )
  tempered: bool = setting(
    False,
    "compute confidence after temperature, top_k and so on (LLaDA 2), instead "
    "of from the model's own probabilities.",
  )
  ends: Ends = setting(
    "any",
    "when end-of-text tokens may be filled in: like any token, last in each "
    "block, or never. Use last or never if answers end too early.",
  )
  stop_early: bool = setting(
    True, "do not fill positions after an end of text."
  )
  remask: Remask | None = setting(
    None,
    "ReMDM, with plan=chance: mask filled positions again, with probability "
    "at most E (cap:E), E times the maximum (rescale:E), or higher where "
    "confidence was lower (confidence:E). Set more `steps` than tokens. "
    "cap:E,start=0.6,stop=0.1 limits it to these times (time falls from 1 to "
    "0).",
    forms=REMASKS,
  )
  edit: float | None = setting(
    None,
    "replace a filled token if another token has a probability above this "
    "(LLaDA 2.1), until none changes.",
    least=0.0,
    most=1.0,
  )
  edit_steps: int = setting(
    16, "with `edit`, maximum number of additional calls per block.", least=0
  )
  cache: Cache | None = setting(
    None,
    "KV cache while a block is filled: none, prefix (tokens before the "
    "block), dual (tokens before and after it), vicinity:N (all but N tokens "
    "around it; vicinity:N,after=M has M after it), or delayed (all but masks "
    "and tokens just filled; delayed:N recomputes all every N calls; "
    "delayed,halvings=3 sets how often the number of tokens per call may "
    "halve).",
    forms=CACHES,
  )
  guidance: float = setting(
    0.0, "scale of classifier-free guidance by the prompt.", least=0.0
  )
  mask_id: int | None = None
  end: tuple[int, ...] = ()

  def __post_init__(self):
    settings.check(self)
    self._check_quota()
    self._check_confidence()
    if self.edit is None and self.edit_steps != type(self).edit_steps:
      raise UserError(
        f"{self.show('edit_steps')}: has no effect without `edit`"
      )
    if self.canvas is not None:
      self._check_canvas()
    if self.mask_id is not None:
      # A program has blocks of a known size.
      block = min(BLOCK, self.length) if self.block is None else self.block
      object.__setattr__(self, "block", block)
      self._check_program()

  def for_model(
    self, mask_id: int, end: Sequence[int] = (), **changes
  ) -> "SamplerConfig":
    """Returns what programs take: these settings, for a model's rows.

    Args:
      mask_id: the model's.
      end: its ids that end a text.
      **changes: settings that rows decide about, such as the length.
    """
    return dataclasses.replace(self, mask_id=mask_id, end=tuple(end), **changes)

  def show(self, name: str) -> str:
    """Returns `name=value` of a setting, for messages."""
    return settings.show(self, name)

  def _check_quota(self) -> None:
    """Raises UserError for a policy, a plan and steps that do not agree."""
    policy, plan = self.show("policy"), self.show("plan")
    if self.steps is not None and not self.policy.uses_quota:
      raise UserError(
        f"{self.show('steps')}: {policy} chooses the number of steps itself; "
        "expected policy=quota, or no `steps`"
      )
    if self.plan != "even" and not self.policy.uses_quota:
      raise UserError(f"{plan}: {policy} has no plan; expected policy=quota")
    if self.plan == "chance" and not isinstance(self.policy, Quota):
      raise UserError(
        f"{policy}: plan=chance draws how many places are filled; expected "
        "policy=quota"
      )
    if self.plan == "chance" and self.select != "random":
      raise UserError(
        f"{self.show('select')}: plan=chance fills positions at random; "
        "expected select=random"
      )
    if self.remask is not None and self.plan != "chance":
      raise UserError(
        f"{self.show('remask')}: {plan} fixes how many positions are filled; "
        "expected plan=chance"
      )

  def _check_confidence(self) -> None:
    """Raises UserError for confidences that the policy would misread."""
    policy, draw = self.show("policy"), self.show("place_temperature")
    if self.policy.needs_probabilities and self.select in ("entropy", "random"):
      raise UserError(
        f"{self.show('select')}: {policy} compares confidences with a "
        "probability; expected select=candidate, max or margin, or "
        "policy=quota"
      )
    if self.place_temperature is None:
      return
    if not self.place_temperature > 0:
      raise UserError(
        f"{draw}: expected more than 0, or leave it out for the surest places"
      )
    if self.policy.needs_probabilities:
      raise UserError(
        f"{draw}: {policy} judges how sure places are, not only which is "
        "surer; expected policy=quota"
      )
    if self.select == "random":
      raise UserError(
        f"{draw}: has no effect with select=random; leave one of them out"
      )

  def _check_canvas(self) -> None:
    """Raises UserError for what a canvas that grows cannot have."""
    canvas = self.show("canvas")
    if self.canvas.first_length(self.length) > self.length:
      raise UserError(
        f"{canvas}: expected auto:N with N from 1 to {self.show('length')}"
      )
    if not isinstance(self.cache, Prefix | None):
      raise UserError(
        f"{self.show('cache')}: not with {canvas}, whose tokens move; "
        "expected prefix, which keeps the prompt, or none"
      )
    for name, value in dict(steps=None, plan="even", edit=None).items():
      if getattr(self, name) != value:
        raise UserError(
          f"{self.show(name)}: not with {canvas}, whose length is not known "
          "in advance and whose tokens move; leave one of them out"
        )
    if isinstance(self.policy, Credit):
      raise UserError(
        f"{self.show('policy')}: keeps statistics of each position, and with "
        f"{canvas} tokens move; expected e.g. threshold:P"
      )
    if self.mask_id is not None and not self.end:
      raise UserError(
        f"{canvas}: end is empty, so that no canvas is ever long enough; name "
        "the tokens that end a text"
      )

  def _check_program(self) -> None:
    """Raises UserError for what a model's rows cannot be filled by."""
    if self.ends != "any" and not self.end:
      raise UserError(
        f"{self.show('ends')}: has no effect, as no token is named that ends a "
        "text; leave it out"
      )
    if self.length % self.block:
      raise UserError(
        f"{self.show('block')}: does not divide {self.show('length')}"
      )
    blocks = self.length // self.block
    if self.steps is not None and self.steps % blocks:
      raise UserError(
        f"{self.show('steps')}: expected a multiple of the {blocks} blocks of "
        f"{self.block} tokens"
      )
    if self.mask_id in self.end:
      raise UserError(
        f"end={self.end}: holds the mask's id, {self.mask_id}; leave it out"
      )

  @property
  def draws_places(self) -> bool:
    """Whether places to fill are drawn, however candidates are."""
    return self.select == "random" or self.place_temperature is not None

  @property
  def block_steps(self) -> int:
    """Returns the steps planned for a block, of what `for_model` returned."""
    if self.steps is None:
      return self.block
    return self.steps // (self.length // self.block)

  @property
  def of_block(self) -> "SamplerConfig":
    """Returns these for a block alone: rows of all lengths share a program."""
    steps = None if self.steps is None else self.block_steps
    return dataclasses.replace(self, length=self.block, steps=steps)
