"""Guidance by the prompt, for the sampler: a denoiser around a denoiser."""

import dataclasses
import functools

from research.diffusion import likelihood, process
from research.diffusion.sampling.denoiser import Denoiser, passes
from research.typing import Array, Bool, Params, UserError


def with_prompt(params: Params, prompt: Bool[Array, "B T"]) -> Params:
  """Returns parameters for `Guided`, with what each row's prompt is.

  Data, not part of the denoiser: prompts of all lengths share a program.
  """
  return {"params": params, "prompt": prompt}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guided:
  """Logits of `likelihood.toward`, free of the prompt and told it.

  Each step reads rows twice, and each of the two has a cache of its own if
  `inner` has one. Parameters are those of `with_prompt`, which say what is
  masked for `u`.

  Attributes:
    inner: the denoiser, e.g. `denoiser.Whole`.
    mask_id: of the mask.
    weight: w; 0 gives the conditional logits.
  """

  inner: Denoiser
  mask_id: int
  weight: float = 1.0

  def __post_init__(self):
    if self.weight < 0:
      raise UserError(
        f"Guided: weight is {self.weight}, expected a number of at least 0"
      )

  @property
  def passes(self) -> int:
    """Returns the forward passes of a call."""
    return (1 if self.weight == 0 else 2) * passes(self.inner)

  def first(self, params, tokens, valid, start, size):
    return self._both(self.inner.first, params, tokens, valid, start, size)

  def again(self, params, tokens, valid, start, size, carry):
    return self._both(
      self.inner.again, params, tokens, valid, start, size, carry
    )

  @property
  def remember(self):
    """`inner`'s, of either row; there is none if `inner` has none."""
    return functools.partial(self._remembered, self.inner.remember)

  def _remembered(
    self, remember, params, tokens, valid, start, size, memory=None
  ):
    mine, other = (None, None) if memory is None else memory
    params, blind = self._blind(params, tokens, valid)
    kept = remember(params, tokens, valid, start, size, mine)
    if self.weight == 0:
      return kept, ()
    return kept, remember(params, blind, valid, start, size, other)

  def _both(self, ask, params, tokens, valid, start, size, carry=None):
    mine, other = ((), ()) if carry is None else ((x,) for x in carry)
    params, blind = self._blind(params, tokens, valid)
    told, left = ask(params, tokens, valid, start, size, *mine)
    if self.weight == 0:
      return told, (left, ())  # nothing to read twice for, or to round
    free, right = ask(params, blind, valid, start, size, *other)
    return likelihood.toward(told, free, self.weight), (left, right)

  def _blind(self, params, tokens, valid):
    """Returns the model's own parameters, and rows whose prompt is masked."""
    if not {"params", "prompt"} <= set(params):
      raise UserError(
        "Guided: does not know the rows' prompts; expected parameters of "
        "guided.with_prompt"
      )
    params, asked = params["params"], params["prompt"]
    return params, process.noisy(tokens, valid & asked, self.mask_id)
