"""Position-wise functions of logits, computed in chunks with recomputation.

`losses.chunked_cross_entropy` returns only the sum of the loss. Preference
objectives need the loss per row, and distillation needs the logits of two
models at once. Here, chunks of positions are computed one after another and
recomputed in the backward pass, so logits [B, T, V] are never materialised.
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
    f: a function of `parts` and of chunks [B, C, ...] of the arrays that treats
      each position independently.
    parts: inputs of every chunk, e.g. heads. Differentiable, like the arrays.
    *arrays: split along T.
    rows: batch times positions per chunk on a device.
  """
  again = jax.checkpoint(lambda parts, chunk: f(parts, *chunk))

  def chunked(parts, *arrays):
    length = arrays[0].shape[1]
    chunks = losses.split_rows(rows, *arrays)
    outputs = jax.lax.map(lambda chunk: again(parts, chunk), chunks)
    return jax.tree.map(lambda x: losses.join_rows(x, length), outputs)

  return collectives.map_tokens(chunked, parts, *arrays)


def fp32_logits(
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
  excluded: int | None = None,
  temperature: float = 1.0,
) -> Float[Array, "B T"]:
  """Returns log p(target) of each position.

  Args:
    rows: batch times positions per chunk on a device.
    excluded: a token that gets probability 0, or None.
  """

  def one(head, hidden, targets):
    logits = fp32_logits(model, head, hidden) / temperature
    logits = losses.exclude_token(logits, excluded)
    loss, _ = losses.token_losses(logits, targets)
    return -loss

  return map_positions(one, head_of(params), hidden, targets, rows=rows)
