"""What becomes of a batch of rows before it is masked.

Shapes are static, so rows are never made shorter or longer: what is beyond a
length turns into padding, what is to be seen of padding into tokens.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from research.ranges import NonNegativeInt, PositiveInt, Ranged, Share
from research.training.objectives.objective import Batch
from research.typing import PRNGKey

_PURPOSE = 1009
"""Folded into a batch's key, beyond what the objectives split it into."""


@runtime_checkable
class BatchTransform(Protocol):
  """A batch instead of another; `key` is None in evaluation."""

  def __call__(self, batch: Batch, key: PRNGKey | None) -> Batch: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomTruncation(Ranged):
  """Now and then a whole batch is cut to one random length.

  LLaDA (arXiv:2502.09992, section 2.2): 1% of batches, 1 to T tokens, so that
  short rows are known too. Never in evaluation.

  Attributes:
    chance: of a batch.
  """

  chance: Share = 0.01

  def __call__(self, batch: Batch, key: PRNGKey | None) -> Batch:
    """Returns the batch, what is cut off as padding."""
    if key is None:
      return batch
    length = batch["tokens"].shape[-1]
    first, second = jax.random.split(jax.random.fold_in(key, _PURPOSE))
    kept = jax.random.randint(second, (), 1, length + 1)
    now = jax.random.uniform(first, ()) < self.chance
    here = jnp.arange(length) < jnp.where(now, kept, length)
    return dict(batch) | {
      "segments": jnp.where(here, batch["segments"], -1),
      "positions": jnp.where(here, batch["positions"], -1),
      "weights": jnp.where(here, batch["weights"], 0.0),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class PadWithEOS(Ranged):
  """Rows are filled up with their end, which is learned as an answer is.

  LLaDA's fine-tuning (arXiv:2502.09992, appendix B.1): this is how a model of
  a fixed number of masks says that it is done. Ends may be masked, are seen and
  count; an answer's length is its own and theirs. Without this value the rest
  of a row is padding, which nothing sees, and an answer has one end.

  For rows of one example, as `packing.one_per_row` lays them: what fills a row
  belongs to its last document.

  Attributes:
    end: the token.
    multiple: rows become as long as the longest of the batch (LLaDA), rounded
      up to this; T for rows all of which are full, a block's tokens for block
      diffusion.
    per_row: each row is rounded up by itself, whatever the others are.
  """

  end: NonNegativeInt
  multiple: PositiveInt = 1
  per_row: bool = False

  def __call__(self, batch: Batch, key: PRNGKey | None) -> Batch:
    """Returns the batch with ends where padding was."""
    del key
    segments = batch["segments"]
    length = segments.shape[-1]
    place = jnp.arange(length)
    size = (segments >= 0).sum(-1, keepdims=True)
    wanted = size if self.per_row else size.max()
    wanted = -(-wanted // self.multiple) * self.multiple
    # Rows without any document, which fill up a batch, stay empty.
    new = (place >= size) & (place < wanted) & (size > 0)
    last = segments.max(-1, keepdims=True)
    start = jnp.argmax(segments == last, axis=-1, keepdims=True)
    target = jnp.pad(new, ((0, 0), (0, 1)))[:, 1:]
    return dict(batch) | {
      "tokens": jnp.where(new, self.end, batch["tokens"]),
      "targets": jnp.where(target, self.end, batch["targets"]),
      "segments": jnp.where(new, last, segments),
      "positions": jnp.where(new, place - start, batch["positions"]),
      "weights": jnp.where(target, 1.0, batch["weights"]),
    }
