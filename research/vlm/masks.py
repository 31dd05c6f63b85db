"""What the tokens of a prompt see of each other; those of an answer are causal.

A policy is a function of a prompt's tokens and lengths, for
`generation.generate.chunks`.
"""

import dataclasses

import jax.numpy as jnp

from kernels_pallas.masks import Mask, image_blocks
from research.typing import Array, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Causal:
  """Every token sees those before it: LLaVA, SmolVLM, Qwen-VL, InternVL."""

  def __call__(
    self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
  ) -> Mask | None:
    """Returns None, which is causal."""
    del tokens, lengths
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BidirectionalPrompt:
  """Every token of the prompt sees all of it: PaliGemma (arXiv:2407.07726)."""

  def __call__(
    self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
  ) -> Mask:
    """Returns the mask of right-padded prompts."""
    positions = _positions(tokens, lengths)
    return Mask.prefix_lm(
      lengths, q_positions=positions, kv_positions=positions
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BidirectionalImages:
  """The tokens of an image see each other: Gemma 3 (arXiv:2503.19786).

  Attributes:
    image_token: id of the placeholder; a run of them is an image.
  """

  image_token: int

  def __call__(
    self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
  ) -> Mask:
    """Returns the mask of right-padded prompts."""
    here = tokens == self.image_token
    begins = here & ~jnp.pad(here[:, :-1], ((0, 0), (1, 0)))
    images = jnp.where(here, jnp.cumsum(begins, axis=-1), -1)
    inside = _positions(tokens, lengths) >= 0
    return image_blocks(images, segments=jnp.where(inside, 0, -1))


PromptMask = Causal | BidirectionalPrompt | BidirectionalImages


def _positions(tokens, lengths):
  at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  return jnp.where(at < lengths[:, None], at, -1)
