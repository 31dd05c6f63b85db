"""Functions of logits, position by position, when sums alone do not do.

`losses.chunked_cross_entropy` knows only the loss's sum; preferences need it
row by row, distillation looks at two models' logits at once. Here chunks of
positions are computed one after another, and again in the backward pass, so
that no logits [B, T, V] exist in either.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.nn import collectives
from research.nn.output_head import head_of
from research.nn.transformer import Transformer
from research.training.objectives import losses
from research.typing import Array, Float, Int, Params, Shaped


def map_positions(
  f: Callable[..., Any],
  parts: Any,
  *arrays: Shaped[Array, "B T ..."],
  rows: int = 256,
) -> Any:
  """Returns `f(parts, *arrays)`, a tree of [B, T, ...], chunk by chunk.

  Args:
    f: a function of `parts` and of the arrays' chunks [B, C, ...] that treats
      each position alone.
    parts: what every chunk needs, e.g. heads. Differentiable, as the arrays.
    *arrays: cut along T.
    rows: positions times batch that a device holds at a time.
  """
  again = jax.checkpoint(lambda parts, chunk: f(parts, *chunk))

  def chunked(parts, *arrays):
    length = arrays[0].shape[1]
    chunks = losses.split_rows(rows, *arrays)
    found = jax.lax.map(lambda chunk: again(parts, chunk), chunks)
    return jax.tree.map(lambda x: losses.join_rows(x, length), found)

  return collectives.map_tokens(chunked, parts, *arrays)


def logits_of(
  model: Transformer, head: Params, hidden: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
  """Returns logits in float32."""
  out = model.apply({"params": head}, hidden, method="logits")
  return out.astype(jnp.float32)


def log_probs(
  model: Transformer,
  params: Params,
  hidden: Float[Array, "B T D"],
  targets: Int[Array, "B T"],
  rows: int = 256,
  never: int | None = None,
) -> Float[Array, "B T"]:
  """Returns log p(target) of each position.

  Args:
    model: whose head is used.
    params: its parameters.
    hidden: the states that predict `targets`.
    targets: the truth.
    rows: positions times batch that a device holds at a time.
    never: a token without probability, or None.
  """

  def one(head, hidden, targets):
    logits = losses.without(logits_of(model, head, hidden), never)
    loss, _ = losses.token_losses(logits, targets)
    return -loss

  return map_positions(one, head_of(params), hidden, targets, rows=rows)
