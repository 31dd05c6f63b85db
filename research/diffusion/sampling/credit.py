"""Credit: what a place was likely to be at earlier steps counts as well.

Ma et al. 2025 (dInfer, arXiv:2510.08666): a token that has been a place's first
choice step after step has earned some credit, and is filled earlier. It changes
logits, not what a policy does with them, so it is a denoiser around a denoiser,
and goes with any policy.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from research.diffusion.sampling.denoiser import Denoiser, passes
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Credited:
  """Logits plus `alpha log(1 + M)`, where M, for each place and token, is

    M <- beta M,   M[first choice] += p(first choice) ** gamma

  at each step of a block, from 0.

  Attributes:
    inner: the denoiser.
    mask_id: of the mask, which is never a first choice.
    alpha, beta, gamma: see above.
  """

  inner: Denoiser
  mask_id: int
  alpha: float = 0.7
  beta: float = 0.8
  gamma: float = 0.2

  def __post_init__(self):
    if self.alpha < 0 or not 0 <= self.beta < 1 or self.gamma < 0:
      raise UserError(
        f"Credited: alpha is {self.alpha}, beta {self.beta} and gamma "
        f"{self.gamma}, expected at least 0, and beta below 1"
      )

  @property
  def passes(self) -> int:
    """Returns the forward passes of a call."""
    return passes(self.inner)

  @property
  def remember(self):
    """`inner`'s, and no credit; there is none if `inner` has none."""
    return functools.partial(self._remembered, self.inner.remember)

  def _remembered(
    self, remember, params, tokens, valid, start, size, memory=None
  ):
    inner = None if memory is None else memory[0]
    return remember(params, tokens, valid, start, size, inner), None

  def first(self, params, tokens, valid, start, size):
    logits, inner = self.inner.first(params, tokens, valid, start, size)
    return self._credited(logits, None, inner)

  def again(self, params, tokens, valid, start, size, carry):
    inner, credit = carry
    logits, inner = self.inner.again(params, tokens, valid, start, size, inner)
    return self._credited(logits, credit, inner)

  def _credited(self, logits, credit, inner):
    logits = logits.astype(jnp.float32)
    if credit is None:  # at a block's first step
      credit = jnp.zeros_like(logits)
    p = jax.nn.softmax(logits.at[..., self.mask_id].set(-jnp.inf))
    choice = jax.nn.one_hot(p.argmax(-1), p.shape[-1])
    earned = p.max(-1, keepdims=True) ** self.gamma
    credit = self.beta * credit + earned * choice
    return logits + self.alpha * jnp.log1p(credit), (inner, credit)
