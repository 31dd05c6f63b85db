"""Products with packed matrices, decoded where they are used and never kept.

Each function takes a matrix that decodes itself (`stored()`) and saves only
its packed form for the backward pass, which decodes it once more. A large one
is never decoded as a whole: its outputs come piece by piece, each multiplied
before the next is decoded. So a step over many layers holds one small decoded
matrix, or a piece of one, at a time.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.common import target_platform
from research.typing import Array, Float, Int

PIECE = 2 << 20
"""Bytes of a piece of a large matrix, decoded: a core's cache holds it."""

LARGE_PIECE = 32 << 20
"""The same on other platforms: half of it, in 16 bits, stays in an H100's L2
cache or a TPU's VMEM, and fills its matrix units."""


@runtime_checkable
class Packed(Protocol):
  """A pytree that decodes itself."""

  def stored(self) -> Float[Array, "... I O"]:
    """Returns the decoded matrix, float32."""


@runtime_checkable
class Sliced(Packed, Protocol):
  """One that may decode some of its outputs alone."""

  @property
  def columns(self) -> int:
    """Returns `I` of the decoded `[..., I, O]`."""

  @property
  def rows(self) -> int:
    """Returns `O`."""

  @property
  def lead(self) -> tuple[int, ...]:
    """Returns the axes before `I`."""

  @property
  def sliceable(self) -> bool:
    """Whether `piece` is to be had of `by_output()`."""

  def by_output(self) -> "Sliced":
    """Returns the same matrix, each part of it that of some outputs."""

  def piece(self, i: Int[Array, ""], size: int) -> "Sliced":
    """Returns outputs `[i size, (i + 1) size)`."""


@dataclasses.dataclass(frozen=True)
class Along:
  """Where a matrix' outputs are in a product with it.

  Attributes:
    kept: whether they are an axis of the product; else one of `x`, and summed
      over.
    axis: which.
  """

  kept: bool
  axis: int = -1


def along(x: str, outputs: str, y: str) -> Along | None:
  """Returns where the outputs are in an einsum; None where in both or neither.

  Args:
    x, y: the letters of what goes in and comes out.
    outputs: their letter.
  """
  if (outputs in x) == (outputs in y):
    return None
  kept = outputs in y
  letters = y if kept else x
  at = letters.index(outputs)
  if "..." in letters[:at]:
    return Along(kept, at - len(letters))
  return Along(kept, at)


def piece_count(w: Any, target: int) -> int:
  """Returns into how many pieces of whole outputs a large matrix decodes.

  Args:
    w: maybe a stack of matrices, of which a piece has the same outputs.
    target: bytes of a piece; what is at most four of them is decoded whole.
  """
  if not isinstance(w, Sliced) or not w.sliceable:
    return 1
  size = 4 * int(np.prod(w.lead, dtype=np.int64)) * w.columns * w.rows
  # Cut over devices, a slice of the outputs would lie on some of them.
  if size <= 4 * target or target_platform.is_cut():
    return 1
  least = -(-size // target)
  # Equal pieces, unless the rows divide into none of about the right size.
  fits = (n for n in range(least, 4 * least) if w.rows % n == 0)
  return next(fits, 1)


Step = Callable[[Float[Array, "... I O"], Int[Array, ""]], Array]
"""(decoded outputs, which piece they are) -> a product with them."""


def _joined(f: Step, w: Sliced, count: int, axis: int) -> Array:
  """Returns the pieces' products side by side along an axis of each."""
  size = w.rows // count

  def one(i):
    return f(w.piece(i, size).stored(), i)

  each = jax.lax.map(one, jnp.arange(count))
  axis %= each.ndim - 1
  y = jnp.moveaxis(each, 0, axis)
  return y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])


def _summed(f: Step, w: Sliced, count: int) -> Array:
  """Returns the sum of the pieces' products, float32."""
  size = w.rows // count

  def one(i):
    return f(w.piece(i, size).stored(), i).astype(jnp.float32)

  # Under a shard_map, zeros would not have the type of a product.
  first = one(jnp.int32(0))
  return jax.lax.fori_loop(1, count, lambda i, total: total + one(i), first)


def _part(x: Array, i: Int[Array, ""], count: int, axis: int) -> Array:
  """Returns piece `i` of `count` of an axis."""
  size = x.shape[axis] // count
  return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=axis)


def _decoded(
  pieces: Callable[..., Array], whole: Callable[..., Array], w: Packed, *args
) -> Array:
  """Returns `pieces(w, *args, count=...)`, or `whole` of a small matrix.

  On CPU a tied head [576, 49152] takes 4 ms instead of 44 and 2 MB instead of
  113 for one token.
  """
  cpu, other = piece_count(w, PIECE), piece_count(w, LARGE_PIECE)
  if cpu == other == 1:
    return whole(w, *args)

  def of(count):
    if count == 1:
      return whole
    return lambda w, *args: pieces(w.by_output(), *args, count=count)

  if cpu == other:
    return of(cpu)(w, *args)
  return jax.lax.platform_dependent(w, *args, cpu=of(cpu), default=of(other))


def _times(x: Array, w: Sliced, transposed: bool) -> Array:
  """Returns `x` times the stored matrix or its transpose."""
  x, w = jax.lax.optimization_barrier((x, w))
  eq = "...o,io->...i" if transposed else "...i,io->...o"

  def whole(w, x):
    return jnp.einsum(eq, x, w.stored().astype(x.dtype))

  def pieces(w, x, count):
    def kept(w, i):
      del i
      return jnp.einsum(eq, x, w.astype(x.dtype))

    def summed(w, i):
      part, w = _part(x, i, count, -1), w.astype(x.dtype)
      return jnp.einsum(eq, part, w, preferred_element_type=jnp.float32)

    if transposed:
      return _summed(summed, w, count).astype(x.dtype)
    return _joined(kept, w, count, -1)

  return _decoded(pieces, whole, w, x)


@functools.partial(jax.custom_vjp, nondiff_argnames=("transposed",))
def matmul(
  x: Float[Array, "*B X"], w: Sliced, transposed: bool
) -> Float[Array, "*B Y"]:
  """Returns `x` times the stored matrix or its transpose, saving only `w`.

  Args:
    x: `[..., I]`, or `[..., O]` where transposed.
    w: stands for `[I, O]`.
    transposed: whether `O` is summed over.

  The barriers tie the decoding to the activations: without them XLA may
  decode the weights of all layers ahead of the loop over layers.
  """
  return _times(x, w, transposed)


def _matmul_forward(x, w, transposed):
  return _times(x, w, transposed), w


def _matmul_backward(transposed, w, dy):
  return _times(dy, w, not transposed), None


matmul.defvjp(_matmul_forward, _matmul_backward)


def linear(
  f: Callable[..., Array],
  x: Float[Array, "..."],
  w: Packed,
  *rest: Array,
  along: Along | None = None,
) -> Float[Array, "..."]:
  """Returns `f(x, stored w, *rest)`, saving only `w` and `rest`.

  Args:
    f: linear in `x`.
    x: activations.
    w: decoded in the dtype of `x`.
    *rest: what has no gradient, such as the sizes of groups.
    along: where the outputs of `w` are; None has it decoded whole.
  """
  like = jax.typeof(x)  # under a shard_map also which devices' x differ
  kept = along is not None and along.kept

  def forwards(x, stored, rest):
    return f(x, stored.astype(like.dtype), *rest)

  def backwards(dy, stored, rest):
    # Of outputs that are summed over, only a piece's are of this gradient.
    size, of = stored.shape[-1], like
    if along is not None and not kept:
      axis = along.axis % like.ndim
      shape = (*like.shape[:axis], size, *like.shape[axis + 1 :])
      of = like.update(shape=shape)
    (dx,) = jax.linear_transpose(lambda x: forwards(x, stored, rest), of)(dy)
    return dx

  def run(step, x, w, rest, joins):
    x, w = jax.lax.optimization_barrier((x, w))

    def whole(w, x, rest):
      return step(x, w.stored(), rest)

    def pieces(w, x, rest, count):
      if joins:
        return _joined(lambda s, _: step(x, s, rest), w, count, along.axis)
      parts = functools.partial(_part, x, count=count, axis=along.axis)
      total = _summed(lambda s, i: step(parts(i), s, rest), w, count)
      return total.astype(like.dtype)

    if along is None:
      return whole(w, x, rest)
    return _decoded(pieces, whole, w, x, rest)

  @jax.custom_vjp
  def product(x, w, rest):
    return run(forwards, x, w, rest, kept)

  def forward(x, w, rest):
    return product(x, w, rest), (w, rest)

  def backward(saved, dy):
    w, rest = saved
    return run(backwards, dy, w, rest, not kept), None, None

  product.defvjp(forward, backward)
  return product(x, w, rest)


def ragged_dot(
  x: Float[Array, "T I"], w: Packed, sizes: Int[Array, "E"], axis: int
) -> Float[Array, "T O"]:
  """Returns each row of `x` times its expert's matrix, saving only `w`.

  Args:
    x: rows sorted by expert.
    w: stands for one matrix an expert, as stored.
    sizes: how many rows belong to each expert.
    axis: -2 if `w` is stored in its logical order, -1 if transposed.
  """

  def product(x, w, sizes):
    w = w if axis == -2 else jnp.swapaxes(w, -1, -2)
    return jax.lax.ragged_dot(x, w, sizes)

  return linear(product, x, w, sizes, along=Along(axis == -2))
