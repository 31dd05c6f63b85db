"""Chunked cross-entropy: never materialises the logits of a whole batch.

The logits [B, T, V] are by far the largest array of a language model. Here, a
scan over chunks of positions computes a chunk's logits, its loss *and* the
gradients with respect to the hidden states (and the trained part of the head)
in the same pass. That takes two matmuls per chunk; recomputation in the
backward pass would need three. The backward pass only scales the saved
gradients.

JAX's symbolic zeros tell which parts of the head are differentiated: a frozen
head costs no gradient, a LoRA head only those of its factors. Under a mesh,
each device splits its own rows and positions into chunks and accumulates its
own gradient of the head, which is summed over devices once, after the last
chunk.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from research.nn import collectives
from research.ranges import NonNegativeFloat, PositiveInt, Ranged, Share
from research.typing import Array, Float, Int, Shaped

Logits = Callable[[Any, Float[Array, "B T D"]], Float[Array, "B T V"]]
"""(head, hidden) -> logits, including a final soft cap."""


@dataclasses.dataclass(frozen=True)
class TokenLoss(Ranged):
  """The loss of one position, and the size of a chunk.

    (1 - s) * -log p(target) + s * mean over v of -log p(v) + z * logZ^2

  Attributes:
    z_loss: z, pulls the log-normaliser of the logits to 0 (PaLM, section 5).
    smoothing: s, label smoothing (Szegedy et al. 2016, section 7).
    rows: rows of logits (batch times positions) per chunk on a device.
    sparse: whether many targets have weight 0. Then the others are gathered
      first, and no logits are computed for the rest.
  """

  z_loss: NonNegativeFloat = 0.0
  smoothing: Share = 0.0
  rows: PositiveInt = 256
  sparse: bool = False


def token_losses(
  logits: Float[Array, "*B V"],
  targets: Int[Array, "*B"],
  loss: TokenLoss = TokenLoss(),
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
  """Returns `(loss, correct)` of each position, float32.

  `correct` is 1 where the target has the largest logit (a tie counts).
  """
  logits = logits.astype(jnp.float32)
  top = jax.lax.stop_gradient(logits.max(-1))
  log_z = top + jnp.log(jnp.exp(logits - top[..., None]).sum(-1))
  # A masked sum fuses in both passes; the gradient of a gather is a scatter.
  vocabulary = jnp.arange(logits.shape[-1])
  hit = vocabulary == targets[..., None]
  target = jnp.where(hit, logits, 0).sum(-1)
  out = log_z - target
  if loss.smoothing:
    spread = log_z - logits.mean(-1)
    out = (1 - loss.smoothing) * out + loss.smoothing * spread
  if loss.z_loss:
    out = out + loss.z_loss * log_z**2
  return out, (target >= top).astype(jnp.float32)


def exclude_token(
  logits: Float[Array, "*B V"], token: int | None
) -> Float[Array, "*B V"]:
  """Returns logits that give `token` zero probability; unchanged for None.

  Uses a large finite value, so that all gradients stay finite.
  """
  return logits if token is None else logits.at[..., token].set(-1e9)


def chunked_cross_entropy(
  logits: Logits,
  head: Any,
  hidden: Float[Array, "B T D"],
  targets: Int[Array, "B T"],
  weight: Float[Array, "B T"],
  loss: TokenLoss = TokenLoss(),
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Returns `(loss_sum, correct_sum)`, both weighted, chunk by chunk.

  Differentiable in `head`, `hidden` and `weight`; `correct_sum` has no
  gradient.

  Args:
    logits: a pure function that closes over no traced array.
    head: the parameters of `logits`: a Weight, or a tree of Weights.
    targets: token ids; those with weight 0 may be any id below V.
  """
  leaves, structure = jax.tree.flatten(head)

  def of_leaves(leaves, hidden):
    return logits(jax.tree.unflatten(structure, leaves), hidden)

  def sums(leaves, *arrays):
    if loss.sparse:
      arrays = _together(*arrays)
    return _chunked(of_leaves, loss, leaves, *arrays)

  return collectives.sum_over_tokens(
    sums, tuple(leaves), hidden, weight, targets
  )


def _together(hidden, weight, targets):
  """Flattens the arrays to one row, targets with nonzero weight first."""
  flat = [x.reshape(1, -1, *x.shape[2:]) for x in (hidden, weight, targets)]
  order = jnp.argsort(flat[1][0] == 0, stable=True)
  return tuple(jnp.take(x, order, axis=1) for x in flat)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(logits, loss, head, hidden, weight, targets):
  def one(chunk):
    value, (_, correct) = _chunk_loss(logits, loss, head, *chunk)
    return value, correct

  def body(sums, chunk):
    value, correct = _unless_empty(loss, one, chunk)
    return (sums[0] + value, sums[1] + correct), None

  zero = _zero(hidden)
  chunks = split_rows(loss.rows, hidden, weight, targets)
  return jax.lax.scan(body, (zero, zero), chunks)[0]


def _unless_empty(loss, f, chunk):
  """Returns `f(chunk)`, or zeros for a sparse chunk without any weight."""
  if not loss.sparse:
    return f(chunk)

  def nothing(chunk):
    zero = _zero(chunk[0])
    return jax.tree.map(
      lambda x: jnp.broadcast_to(zero.astype(x.dtype), x.shape),
      jax.eval_shape(f, chunk),
    )

  return jax.lax.cond(jnp.any(chunk[1] != 0), f, nothing, chunk)


def _zero(hidden):
  """Returns a zero scalar that varies over devices like `hidden`."""
  return jnp.zeros_like(hidden, shape=(), dtype=jnp.float32)


def _chunk_loss(logits, loss, head, hidden, weight, targets):
  losses, correct = token_losses(logits(head, hidden), targets, loss)
  return (losses * weight).sum(), (losses, (correct * weight).sum())


def _forward(logits, loss, head, hidden, weight, targets):
  # Each argument is a CustomVJPPrimal: a value, and whether it is
  # differentiated (`perturbed`).
  learned = [x.value for x in head if x.perturbed]

  def value(learned, *chunk):
    some = iter(learned)
    full = tuple(next(some) if x.perturbed else x.value for x in head)
    return _chunk_loss(logits, loss, full, *chunk)

  def one(chunk):
    return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(
      learned, *chunk
    )

  def body(carry, chunk):
    (total, (losses, correct)), (d_head, d_hidden) = _unless_empty(
      loss, one, chunk
    )
    return jax.tree.map(jnp.add, carry, (total, correct, d_head)), (
      d_hidden,
      losses,
    )

  zero = _zero(hidden.value)
  chunks = split_rows(loss.rows, hidden.value, weight.value, targets.value)
  (loss_sum, correct_sum, d_head), (d_hidden, losses) = jax.lax.scan(
    body, (zero, zero, jax.tree.map(jnp.zeros_like, learned)), chunks
  )
  some = iter(d_head)
  d_head = tuple(next(some) if x.perturbed else None for x in head)
  length = hidden.value.shape[1]
  saved = (d_head, join_rows(d_hidden, length), join_rows(losses, length))
  return (loss_sum, correct_sum), saved


def _backward(logits, loss, saved, cotangents):
  scale = cotangents[0]  # the second one belongs to `correct_sum`: constant
  if isinstance(scale, jax.custom_derivatives.SymbolicZero):
    scale = jnp.zeros((), jnp.float32)
  d_head, d_hidden, d_weight = jax.tree.map(
    lambda x: (x * scale).astype(x.dtype), saved
  )
  return d_head, d_hidden, d_weight, None


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)


def split_rows(rows: int, *arrays: Shaped[Array, "B T ..."]):
  """Splits arrays into chunks along T: [chunks, B, rows / B, ...]."""
  batch, length = arrays[0].shape[:2]
  size = min(length, max(1, rows // batch))
  chunks = -(-length // size)

  def split(x):
    tail = [(0, 0)] * (x.ndim - 2)
    # Padded weights are 0, so padding does not contribute to any sum.
    x = jnp.pad(x, [(0, 0), (0, chunks * size - length), *tail])
    x = x.reshape(batch, chunks, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  return tuple(split(x) for x in arrays)


def join_rows(x: Shaped[Array, "X B C ..."], length: int):
  """Joins chunks to [B, T, ...]; the inverse of `split_rows`."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
