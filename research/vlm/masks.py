"""What the tokens of a prompt see of each other; those of an answer are causal.

A policy is a function of a prompt's tokens and lengths, for
`generation.generate.chunks`; its `of_rows` is the same for rows that are
learned, for `NextToken.mask`.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from kernels_pallas.masks import (
  Mask,
  bidirectional_tokens,
  image_blocks,
  prefix_blocks,
)
from research.nn import flops
from research.training.objectives import objective
from research.training.objectives.objective import Batch
from research.typing import Array, Bool, Int, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Causal:
  """Every token sees those before it: LLaVA, SmolVLM, Qwen-VL, InternVL."""

  def __call__(
    self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
  ) -> Mask | None:
    """Returns None, which is causal."""
    del tokens, lengths
    return None

  def of_rows(self, batch: Batch) -> Mask:
    return objective.causal_mask(batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BidirectionalPrompt:
  """Every token of the prompt sees all of it: PaliGemma (arXiv:2407.07726)."""

  def __call__(
    self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
  ) -> Mask:
    positions = _positions(tokens, lengths)
    return Mask.prefix_lm(
      lengths, q_positions=positions, kv_positions=positions
    )

  def by_index(
    self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
  ) -> Mask:
    """Returns the same mask for pages; see `by_index`."""
    return prefix_blocks(lengths, tokens.shape[1])

  def of_rows(self, batch: Batch) -> Mask:
    """Returns the mask of packed rows, whose prompts are not learned."""
    return objective.prefix_mask(batch)


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
    inside = _positions(tokens, lengths) >= 0
    images = _runs(tokens == self.image_token)
    return image_blocks(images, segments=jnp.where(inside, 0, -1))

  def by_index(
    self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
  ) -> Mask:
    """Returns the same mask for pages; see `by_index`."""
    del lengths
    return image_blocks(_runs(tokens == self.image_token))

  def of_rows(self, batch: Batch) -> Mask:
    images = _runs(batch["tokens"] == self.image_token)
    return image_blocks(images, segments=batch["segments"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class BidirectionalVision:
  """All tokens of all images see each other: Molmo 2 (arXiv:2601.10611).

  Those around an image's features count as the image's.

  Attributes:
    tokens: ids of the placeholder and of the tokens around it.
  """

  tokens: tuple[int, ...]

  def __call__(
    self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
  ) -> Mask:
    inside = _positions(tokens, lengths) >= 0
    segments = jnp.where(inside, 0, -1)
    return bidirectional_tokens(self._marked(tokens) & inside, segments)

  def of_rows(self, batch: Batch) -> Mask:
    marked = self._marked(batch["tokens"])
    return bidirectional_tokens(marked, batch["segments"])

  def _marked(self, tokens: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    return jnp.isin(tokens, jnp.asarray(self.tokens, tokens.dtype))


PromptMask = (
  Causal | BidirectionalPrompt | BidirectionalImages | BidirectionalVision
)


def prompt_context(mask: PromptMask | None, tokens: int) -> flops.Context:
  """Returns the pairs of a prompt's tokens that see each other, for costs.

  Tokens of images that see each other beside a causal prompt count as causal.
  """
  if isinstance(mask, BidirectionalPrompt):
    return flops.Dense(tokens, tokens)
  return flops.Causal(0, tokens)


def by_index(mask: PromptMask) -> Callable[..., Mask | None] | None:
  """Returns a policy's masks without segments, as intervals of indices.

  A cache that appends tokens, such as pages, leaves padding out by itself. None
  for causal.

  Raises:
    UserError: the mask has more intervals than fit one (Molmo 2's).
  """
  if isinstance(mask, Causal):
    return None
  if isinstance(mask, BidirectionalVision):
    raise UserError(
      "pages: found the mask BidirectionalVision, whose keys are numbered"
      " anew, expected one by the order of tokens; generate without pages"
    )
  return mask.by_index


def _runs(here: Bool[Array, "B T"]) -> Int[Array, "B T"]:
  """Numbers runs of marked tokens; -1 elsewhere."""
  begins = here & ~jnp.pad(here[:, :-1], ((0, 0), (1, 0)))
  return jnp.where(here, jnp.cumsum(begins, axis=-1), -1)


def _positions(tokens, lengths):
  at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  return jnp.where(at < lengths[:, None], at, -1)
