"""Token rows as a batch, without a pipeline: for scripts, tests and studies.

A pipeline (`research.data.pipeline`) packs, shuffles and repeats documents;
here each row is one document, and the batch is what one packs as
`packing.one_per_row`.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.typing import Array, Int, UserError


def batch_of(
  tokens: Int[Any, "B T"] | Sequence[Any],
  loss_mask: Any = None,
  begin: int | Int[Any, "B"] | None = None,
) -> dict[str, Array]:
  """Returns the batch in which each row is a document of its own.

  Its keys are those that objectives read: `tokens`, `targets`, `positions` and
  `segments`, int32 [B, T], the last two -1 for padding; `weights`, float32
  [B, T]. The target of a position is the token after it; the last token of a
  row has no target, so its weight is 0.

  Args:
    tokens: ids, an array; or one list of ids for each row, of any lengths,
      which are padded on the right to the longest.
    loss_mask: which tokens are targets, or their weights, broadcast to [B, T];
      by default all. The first token of a row is no target without `begin`.
    begin: a token before each row, one for all rows or one for each. The last
      token of a row is then no input, so the row stays as long as it is, and
      every token is a target.

  Raises:
    UserError: there are no rows, or no tokens in them.
  """
  rows, real = _padded(tokens)
  weights = real * jnp.asarray(
    1.0 if loss_mask is None else loss_mask, jnp.float32
  )
  if begin is None:
    inputs, targets, weights = rows, _next(rows), _next(weights)
    targets = jnp.where(_next(real), targets, 0)
  else:
    first = jnp.broadcast_to(jnp.asarray(begin, jnp.int32), len(rows))
    inputs = jnp.concatenate([first[:, None], rows[:, :-1]], axis=1)
    targets = rows
  padding = jnp.int32(-1)
  return {
    "tokens": inputs,
    "targets": targets,
    "positions": jnp.where(real, jnp.arange(rows.shape[1]), padding),
    "segments": jnp.where(real, jnp.int32(0), padding),
    "weights": weights,
  }


def _next(x: Array) -> Array:
  """Returns each row from its second place on, with a 0 at the end."""
  return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))


def _padded(tokens: Any) -> tuple[Array, Array]:
  """Returns rows [B, T] of ids, and which of these are no padding."""
  if not hasattr(tokens, "ndim"):
    sizes = [len(row) for row in tokens]
    rows = np.zeros((len(sizes), max(sizes, default=0)), np.int32)
    for row, ids in zip(rows, tokens, strict=True):
      row[: len(ids)] = ids
    real = np.arange(rows.shape[1]) < np.array(sizes, np.int32)[:, None]
  else:
    rows, real = tokens, np.ones(tokens.shape, bool)
  if not all(rows.shape):
    raise UserError(
      f"batch_of: found rows of shape {list(rows.shape)}, expected at least one"
      " row and one token: lists of ids, or an array [B, T]"
    )
  return jnp.asarray(rows, jnp.int32), jnp.asarray(real)
