"""Credit: what a place was likely to be at earlier steps counts as well.

Ma et al. 2025 (dInfer, arXiv:2510.08666): a token that has been a place's first
choice step after step has earned some credit, and is filled earlier. It changes
logits, not what a policy does with them, so it is a denoiser around a denoiser,
and goes with any policy.
"""

import dataclasses

import jax
import jax.numpy as jnp

from research.diffusion.sampling.denoiser import Denoiser
from research.diffusion.sampling.policies import Credit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Credited(Denoiser):
  """Logits plus `alpha log(1 + M)`, where M, for each place and token, is

    M <- beta M,   M[first choice] += p(first choice) ** gamma

  at each step of a block, from 0.

  Attributes:
    inner: the denoiser.
    mask_id: of the mask, which is never a first choice.
    credit: alpha, beta and gamma; its threshold is the policy's business.
  """

  inner: Denoiser
  mask_id: int
  credit: Credit = Credit()

  @property
  def passes(self) -> int:
    """Returns the forward passes of a call."""
    return self.inner.passes

  @property
  def unit(self) -> int:
    return self.inner.unit

  @property
  def caches_finished(self) -> bool:
    """Whether `inner` does."""
    return self.inner.caches_finished

  def cache_finished(self, params, tokens, valid, start, size, memory=None):
    """Returns `inner`'s, and no credit."""
    inner = None if memory is None else memory[0]
    given = params, tokens, valid, start, size
    return self.inner.cache_finished(*given, inner), None

  def prefill(self, params, tokens, valid, start, size):
    logits, inner = self.inner.prefill(params, tokens, valid, start, size)
    return self._credited(logits, None, inner)

  def step(self, params, tokens, valid, start, size, carry):
    inner, credit = carry
    logits, inner = self.inner.step(params, tokens, valid, start, size, inner)
    return self._credited(logits, credit, inner)

  def _credited(self, logits, credit, inner):
    logits = logits.astype(jnp.float32)
    if credit is None:  # at a block's first step
      credit = jnp.zeros_like(logits)
    p = jax.nn.softmax(logits.at[..., self.mask_id].set(-jnp.inf))
    choice = jax.nn.one_hot(p.argmax(-1), p.shape[-1])
    earned = p.max(-1, keepdims=True) ** self.credit.gamma
    credit = self.credit.beta * credit + earned * choice
    return logits + self.credit.alpha * jnp.log1p(credit), (inner, credit)
