"""Guidance by the prompt, for the sampler: a denoiser around a denoiser."""

import dataclasses

from research.diffusion import likelihood, process
from research.diffusion.sampling.denoiser import Denoiser
from research.ranges import NonNegativeFloat, Ranged
from research.typing import Array, Bool, Params, UserError


def with_prompt(params: Params, prompt: Bool[Array, "B T"]) -> Params:
  """Returns parameters for `ClassifierFreeGuidance`, with rows' prompts.

  Data, not part of the denoiser: prompts of all lengths share a program.
  """
  return {"params": params, "prompt": prompt}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierFreeGuidance(Ranged, Denoiser):
  """`likelihood.guided_logits` of a free and a conditioned call.

  Each step reads rows twice, and each of the two has a cache of its own if
  `inner` has one. Parameters are those of `with_prompt`, which say what is
  masked for `u`.

  Attributes:
    inner: the denoiser, e.g. `denoiser.NoCache`.
    mask_id: of the mask.
    weight: w; 0 gives the conditional logits.
  """

  inner: Denoiser
  mask_id: int
  weight: NonNegativeFloat = 1.0

  @property
  def passes(self) -> int:
    """Returns the forward passes of a call."""
    return (1 if self.weight == 0 else 2) * self.inner.passes

  @property
  def unit(self) -> int:
    return self.inner.unit

  def prefill(self, params, tokens, valid, start, size):
    return self._both(self.inner.prefill, params, tokens, valid, start, size)

  def step(self, params, tokens, valid, start, size, carry):
    return self._both(
      self.inner.step, params, tokens, valid, start, size, carry
    )

  @property
  def caches_finished(self) -> bool:
    """Whether `inner` does, of either row."""
    return self.inner.caches_finished

  def cache_finished(self, params, tokens, valid, start, size, memory=None):
    mine, other = (None, None) if memory is None else memory
    params, blind = self._blind(params, tokens, valid)
    read = self.inner.cache_finished
    kept = read(params, tokens, valid, start, size, mine)
    if self.weight == 0:
      return kept, ()
    return kept, read(params, blind, valid, start, size, other)

  def _both(self, ask, params, tokens, valid, start, size, carry=None):
    mine, other = ((), ()) if carry is None else ((x,) for x in carry)
    params, blind = self._blind(params, tokens, valid)
    conditional, left = ask(params, tokens, valid, start, size, *mine)
    if self.weight == 0:
      return conditional, (left, ())  # nothing to read twice for, or to round
    free, right = ask(params, blind, valid, start, size, *other)
    return likelihood.guided_logits(conditional, free, self.weight), (
      left,
      right,
    )

  def _blind(self, params, tokens, valid):
    """Returns the model's own parameters, and rows whose prompt is masked."""
    if not {"params", "prompt"} <= set(params):
      raise UserError(
        "ClassifierFreeGuidance: does not know the rows' prompts; expected "
        "parameters of classifier_free_guidance.with_prompt"
      )
    params, asked = params["params"], params["prompt"]
    return params, process.noisy(tokens, valid & asked, self.mask_id)
