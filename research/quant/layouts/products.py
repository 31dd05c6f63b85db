"""Matrix products with packed weights, which decode them on the fly.

Each function takes a weight with a method `stored()` that decodes it, and saves
only the packed form for the backward pass, which decodes it again. Large
matrices are decoded in slices of outputs, each multiplied before the next is
decoded. A step over many layers thus holds one small decoded matrix, or one
slice, at a time.
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
"""Bytes of a decoded float32 slice on CPU, sized for a core's cache."""

LARGE_PIECE = 32 << 20
"""Bytes of a decoded float32 slice on other platforms.

Half of it, in 16 bits, fits an H100's L2 cache or a TPU's VMEM and fills the
matrix units."""


@runtime_checkable
class Packed(Protocol):
  """A pytree that decodes to a matrix."""

  def stored(self) -> Float[Array, "... I O"]:
    """Returns the decoded matrix, float32."""


@runtime_checkable
class Sliceable(Packed, Protocol):
  """A packed matrix that can decode slices of its outputs."""

  @property
  def columns(self) -> int:
    """`I` of the decoded `[..., I, O]`."""

  @property
  def rows(self) -> int:
    """`O` of the decoded `[..., I, O]`."""

  @property
  def lead(self) -> tuple[int, ...]:
    """Sizes of the axes before `I`."""

  @property
  def sliceable(self) -> bool:
    """Whether `to_sliceable()` has `output_slice`."""

  def to_sliceable(self) -> "Sliceable":
    """Returns an equal matrix whose parts can be sliced by outputs."""

  def output_slice(self, i: Int[Array, ""], size: int) -> "Sliceable":
    """Returns outputs `[i size, (i + 1) size)`."""


@dataclasses.dataclass(frozen=True)
class OutputAxis:
  """Position of the matrix's output axis in an einsum.

  Attributes:
    kept: whether it is an axis of the result; otherwise it is an axis of `x`
      and contracted.
    axis: index of the axis in the result or in `x`.
  """

  kept: bool
  axis: int = -1


def output_axis(x: str, outputs: str, y: str) -> OutputAxis | None:
  """Returns the output axis in an einsum; None if it is in both or neither.

  Args:
    x, y: letters of the activations and of the result.
    outputs: letter of the matrix's outputs.
  """
  if (outputs in x) == (outputs in y):
    return None
  kept = outputs in y
  letters = y if kept else x
  at = letters.index(outputs)
  if "..." in letters[:at]:
    return OutputAxis(kept, at - len(letters))
  return OutputAxis(kept, at)


def piece_count(w: Any, target: int) -> int:
  """Returns the number of output slices in which to decode a matrix.

  Args:
    w: a matrix or a stack of matrices; a slice has the same outputs of each.
    target: bytes of a decoded slice; a matrix of up to four times as many is
      decoded at once.
  """
  if not isinstance(w, Sliceable) or not w.sliceable:
    return 1
  size = 4 * int(np.prod(w.lead, dtype=np.int64)) * w.columns * w.rows
  # Not if sharded: an output slice would be on some of the devices only.
  if size <= 4 * target or target_platform.may_be_sharded():
    return 1
  least = -(-size // target)
  # Slices have equal size; if no suitable divisor exists, decode at once.
  fits = (n for n in range(least, 4 * least) if w.rows % n == 0)
  return next(fits, 1)


Step = Callable[[Float[Array, "... I O"], Int[Array, ""]], Array]
"""(decoded output slice, its index) -> product with it."""


def _joined(f: Step, w: Sliceable, count: int, axis: int) -> Array:
  size = w.rows // count

  def one(i):
    return f(w.output_slice(i, size).stored(), i)

  each = jax.lax.map(one, jnp.arange(count))
  axis %= each.ndim - 1
  y = jnp.moveaxis(each, 0, axis)
  return y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])


def _summed(f: Step, w: Sliceable, count: int) -> Array:
  size = w.rows // count

  def one(i):
    return f(w.output_slice(i, size).stored(), i).astype(jnp.float32)

  # Under a shard_map, zeros would not have the product's type.
  first = one(jnp.int32(0))
  return jax.lax.fori_loop(1, count, lambda i, total: total + one(i), first)


def _part(x: Array, i: Int[Array, ""], count: int, axis: int) -> Array:
  size = x.shape[axis] // count
  return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=axis)


def _decoded(
  pieces: Callable[..., Array], whole: Callable[..., Array], w: Packed, *args
) -> Array:
  """Returns `pieces(w, *args, count=...)`, or `whole(w, *args)` if small.

  On CPU, slicing a tied head [576, 49152] takes 4 ms instead of 44 and 2 MB
  instead of 113 for one token.
  """
  cpu, other = piece_count(w, PIECE), piece_count(w, LARGE_PIECE)
  if cpu == other == 1:
    return whole(w, *args)

  def of(count):
    if count == 1:
      return whole
    return lambda w, *args: pieces(w.to_sliceable(), *args, count=count)

  if cpu == other:
    return of(cpu)(w, *args)
  return jax.lax.platform_dependent(w, *args, cpu=of(cpu), default=of(other))


def _times(x: Array, w: Sliceable, transposed: bool) -> Array:
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
  x: Float[Array, "*B X"], w: Sliceable, transposed: bool
) -> Float[Array, "*B Y"]:
  """Returns `x` times the stored matrix or its transpose, saving only `w`.

  Args:
    x: `[..., I]`, or `[..., O]` if transposed.
    w: packed matrix `[I, O]`.
    transposed: whether to contract `O`.

  Optimization barriers tie decoding to the activations: without them XLA may
  decode the weights of all layers before the loop over layers.
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
  along: OutputAxis | None = None,
) -> Float[Array, "..."]:
  """Returns `f(x, decoded w, *rest)`, saving only `w` and `rest`.

  Args:
    f: a function linear in `x`.
    *rest: arrays without gradients, such as sizes of groups.
    along: output axis of `w` in the product, for slicing; None decodes at
      once.
  """
  like = jax.typeof(x)  # under a shard_map it includes the varying axes
  kept = along is not None and along.kept

  def forwards(x, stored, rest):
    return f(x, stored.astype(like.dtype), *rest)

  def backwards(dy, stored, rest):
    # If outputs are contracted, dx of a slice covers the slice's part of x.
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
    w: one packed matrix per expert.
    axis: -2 if `w` is stored in its logical orientation, -1 if transposed.
  """

  def product(x, w, sizes):
    w = w if axis == -2 else jnp.swapaxes(w, -1, -2)
    return jax.lax.ragged_dot(x, w, sizes)

  return linear(product, x, w, sizes, along=OutputAxis(axis == -2))
