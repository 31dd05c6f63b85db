"""How lm-evaluation-harness asks models that fill in masks."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from research.diffusion import likelihood, mask_ratio_time
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.denoiser import Denoiser
from research.interop.diffusion.spec import Spec
from research.interop.loaded import Loaded
from research.typing import UserError

_ELSEWHERE = {"mask_id", "canvas", "guidance"}
"""Settings of a sampler that the model or another field decides about."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionEvalSettings:
  """How a masked diffusion model is evaluated.

  Attributes:
    samples: of an estimate (LLaDA's `mc_num`); one for targets of a single
      token.
    batch_size: rows at once, whose numbers of masks are spread evenly.
    rounding: of these numbers, see `likelihood.counts`.
    guidance: by the context, w; 0 for none.
    greedy: whether to find out if a continuation is the one that reveals its
      surest token first; it takes a call a token, and is False otherwise.
    options: of the sampler, by their names in `SamplerConfig`. By default
      `length` is a request's, `block` the model's or 32, `end` the model's and
      its tokenizer's. `steps` are those of the length, split among its blocks.
      With `stop_early=False` a text is not cut where it ends: as LLaDA
      evaluates. A `cache` is for models without blocks of their own.
    seed: of masks and samples; a value depends on it and on the request's
      place.

  Raises:
    UserError: an option is none of the sampler's, or is the model's to say.
  """

  samples: int = 128
  batch_size: int = 16
  rounding: likelihood.Rounding = "floor"
  guidance: float = 0.0
  greedy: bool = False
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  seed: int = 0

  def __post_init__(self):
    known = {f.name for f in dataclasses.fields(SamplerConfig)} - _ELSEWHERE
    unknown = sorted(set(self.options) - known)
    if unknown:
      *most, last = sorted(known)
      raise UserError(
        f"DiffusionEvalSettings.options: found {unknown[0]!r}, expected"
        f" {', '.join(most)} or {last}"
      )
    SamplerConfig(**self.options)  # which checks itself


DEFAULT = DiffusionEvalSettings()


def reading(
  kind: Callable[..., Denoiser], loaded: Loaded, spec: Spec, **more: Any
) -> Any:
  """Returns how rows are read: a denoiser of the model."""
  times = mask_ratio_time.for_model(loaded.model, spec.mask_id)
  return kind(model=loaded.model, shift=spec.shift, time=times, **more)


def spec_of(loaded: Loaded) -> Spec:
  """Returns how a model's masks are filled.

  Raises:
    UserError: it has none.
  """
  if loaded.diffusion is None:
    raise UserError(
      f"{loaded.source.get('path', 'the model')}: predicts the next token and "
      "has no mask; expected a masked diffusion model. Use "
      "research.interop.lm_eval.autoregressive"
    )
  return loaded.diffusion
