"""Cross-entropy in chunks: the logits of a whole batch never exist.

A language model's logits [B, T, V] are its largest array by far. Here a scan
over chunks of positions computes a chunk's logits, their loss *and* the
gradient with respect to the hidden states (and to whatever of the head is being
learned) in the same pass: two matmuls a chunk where recomputation in the
backward pass needs three. The backward pass only scales what was saved.

Which parts of the head are differentiated is asked of JAX itself (symbolic
zeros): a frozen head pays for no gradient, a LoRA head only for its factors.
Under a mesh each device cuts its own rows and positions into chunks and adds
up its own gradient of the head; devices add theirs up once, after the last.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from research import weights
from research.nn import collectives
from research.optim import ranges
from research.typing import Array, Float, Int, Shaped

Logits = Callable[[Any, Float[Array, "B T D"]], Float[Array, "B T V"]]
"""(head, hidden) -> logits, a final soft-cap included."""


@dataclasses.dataclass(frozen=True)
class TokenLoss:
  """The loss of one position.

    (1 - s) * -log p(target) + s * mean over v of -log p(v) + z * logZ^2

  Attributes:
    z_loss: z, pulls the logits' log-normaliser to 0 (PaLM, section 5).
    smoothing: s, label smoothing (Szegedy et al. 2016, section 7).
    rows: logits rows (positions times batch) that a device holds at a time.
    sparse: whether many targets have weight 0, so that it pays to put the
      others together and to form no logits for the rest.
  """

  z_loss: float | int = 0.0
  smoothing: float | int = 0.0
  rows: int = 256
  sparse: bool = False

  def __post_init__(self):
    ranges.non_negative("TokenLoss", z_loss=self.z_loss)
    ranges.share("TokenLoss", smoothing=self.smoothing)
    ranges.positive("TokenLoss", rows=self.rows)


def linear_head(eq: str, softcap: float | None = None) -> Logits:
  """Returns `logits(head, hidden)` for a head that is one Weight.

  Args:
    eq: `"btd,dv->btv"` for a head [D, V], `"btd,vd->btv"` for a tied
      embedding [V, D].
    softcap: bound c of c * tanh(logits / c), or None.
  """

  def logits(head, hidden):
    out = weights.einsum(eq, hidden, head)
    return out if softcap is None else softcap * jnp.tanh(out / softcap)

  return logits


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
  # A masked sum fuses forward and backward; a gather's gradient is a scatter.
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


def without(
  logits: Float[Array, "*B V"], token: int | None
) -> Float[Array, "*B V"]:
  """Returns logits that give a token no probability; all as they are for None.

  That token's is finite, so that gradients of the others are.
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
  """Returns `(loss_sum, correct_sum)`, both weighted, without full logits.

  Differentiable in `head`, `hidden` and `weight`; `correct_sum` has no
  gradient.

  Args:
    logits: a pure function that closes over no traced array.
    head: whatever `logits` needs: a Weight, or a tree of them.
    hidden: final hidden states.
    targets: token ids; those with weight 0 may be anything below V.
    weight: weight of each target in the sum.
    loss: the loss of a position, and the size of a chunk.
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
  """Returns the arrays as one row, targets that count first."""
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
  """Returns where sums over chunks begin, on each device that has some."""
  return jnp.zeros_like(hidden, shape=(), dtype=jnp.float32)


def _chunk_loss(logits, loss, head, hidden, weight, targets):
  losses, correct = token_losses(logits(head, hidden), targets, loss)
  return (losses * weight).sum(), (losses, (correct * weight).sum())


def _forward(logits, loss, head, hidden, weight, targets):
  # Each argument is a CustomVJPPrimal: its value, and whether the caller
  # differentiates with respect to it.
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
  scale = cotangents[0]  # the second is of `correct_sum`, which is constant
  if isinstance(scale, jax.custom_derivatives.SymbolicZero):
    scale = jnp.zeros((), jnp.float32)
  d_head, d_hidden, d_weight = jax.tree.map(
    lambda x: (x * scale).astype(x.dtype), saved
  )
  return d_head, d_hidden, d_weight, None


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)


def split_rows(rows: int, *arrays: Shaped[Array, "B T ..."]):
  """Returns the arrays as chunks along T, [chunks, B, rows / B, ...]."""
  batch, length = arrays[0].shape[:2]
  size = min(length, max(1, rows // batch))
  chunks = -(-length // size)

  def split(x):
    tail = [(0, 0)] * (x.ndim - 2)
    # Padded weights are 0, so that padding adds nothing to any sum.
    x = jnp.pad(x, [(0, 0), (0, chunks * size - length), *tail])
    x = x.reshape(batch, chunks, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  return tuple(split(x) for x in arrays)


def join_rows(x: Shaped[Array, "X B C ..."], length: int):
  """Returns `split_rows`'s inverse, [B, T, ...]."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
