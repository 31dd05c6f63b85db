"""GGUF's 4, 5 and 8 bit blocks as a weight: never decoded as a whole.

Every product decodes the matrix it needs, next to where it is used, and the
backward pass decodes it again (as QLoRA does, Dettmers et al. 2023,
arXiv:2305.14314, section 3): what lives between is the blocks alone.

A block is 32 weights along the contracted axis of ggml's row: `scale * (code -
zero)`, or `scale * code + offset`. The in-block axis takes the blocked axis'
place and the blocks `X` stand before it, so that what is contiguous in memory
is contiguous in the decoded matrix:

  matrix [I, O], axis -2:     codes [X, 16, O], scale and offset [X, O]
  embedding [V, D], axis -1:  codes [V, X, 16], scale and offset [V, X]
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.interop import gguf_types
from research.typing import Array, Float, Int, PRNGKey

BLOCK = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockTensor:
  """A matrix in ggml's blocks; frozen: no gradient reaches its parts.

  Attributes:
    codes: uint8, in-block axis of 16: low nibbles are the block's first 16
      codes, high nibbles the others; int8 of 32 for 8 bits.
    scale: float16.
    offset: float16, or None where codes have a zero instead.
    high: uint8, in-block axis of 4: bit `j` is the fifth bit of code `j`; or
      None.
    kind: ggml's name of the type.
    axis: which logical axis is blocked, -2 or -1.
  """

  codes: Any
  scale: Any
  offset: Any = None
  high: Any = None
  kind: str = dataclasses.field(default="Q4_1", metadata=dict(static=True))
  axis: int = dataclasses.field(default=-2, metadata=dict(static=True))

  @property
  def shape(self) -> tuple[int, ...]:
    shape = list(self.scale.shape)
    shape[self.axis] *= BLOCK
    return tuple(shape)

  @property
  def ndim(self) -> int:
    return len(self.scale.shape)

  @property
  def dtype(self) -> Any:
    return np.dtype(np.float32)

  def dense(self) -> Float[Array, "..."]:
    """Returns the float32 matrix, bitwise what ggml decodes to."""
    codes = self._codes().astype(jnp.float32)
    values = codes - gguf_types.TYPES[self.kind].zero
    values *= jnp.expand_dims(self.scale.astype(jnp.float32), self.axis)
    if self.offset is not None:
      # The product of 5 and 11 bits is exact, so fusing them changes nothing.
      values += jnp.expand_dims(self.offset.astype(jnp.float32), self.axis)
    return values.reshape(self.shape)

  def _codes(self) -> Array:
    """Returns the codes, their in-block axis of 32 at `axis`."""
    if self.codes.dtype == jnp.int8:
      return self.codes
    codes = jnp.concatenate([self.codes & 15, self.codes >> 4], axis=self.axis)
    if self.high is None:
      return codes
    shifts = jnp.arange(8, dtype=jnp.uint8)
    shifts = shifts if self.axis == -1 else shifts[:, None]
    bits = (jnp.expand_dims(self.high, self.axis) >> shifts) & 1
    return codes | bits.reshape(codes.shape) << 4

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `einsum(eq, x, w)` over either axis, in the dtype of `x`."""
    return _product(lambda x, w: jnp.einsum(eq, x, w), x, self)

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns rows of an embedding, float32; only those are decoded."""
    if self.axis != -1:
      return jnp.take(self.dense(), ids, axis=0)
    return jax.tree.map(lambda part: jnp.take(part, ids, axis=0), self).dense()

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    """Returns each row of `x` times its expert's matrix."""
    return _product(jax.lax.ragged_dot, x, self, sizes)

  def axes(self, names: tuple[str | None, ...]) -> "BlockTensor":
    """Blocks keep the name of the axis they cut; the in-block axis has none."""
    scale = (None,) * (self.ndim - len(names)) + tuple(names)
    at = len(scale) + self.axis + 1
    codes = (*scale[:at], None, *scale[at:])
    return dataclasses.replace(
      self,
      codes=codes,
      scale=scale,
      offset=None if self.offset is None else scale,
      high=None if self.high is None else codes,
    )

  def bind(
    self, *, key: PRNGKey | None, ids: Int[Array, "B"] | None
  ) -> "BlockTensor":
    """Returns itself: nothing here depends on the batch."""
    return self

  def squeeze(self) -> "BlockTensor":
    """Returns itself without a leading axis of one."""
    return jax.tree.map(lambda part: part.reshape(part.shape[1:]), self)


def _product(
  f: Callable[..., Array], x: Array, w: BlockTensor, *rest: Array
) -> Array:
  """Returns `f(x, dense w, *rest)`, linear in `x`, saving only the blocks.

  The barriers tie the decoding to the activations: without them XLA may
  decode the weights of all layers ahead of the loop over layers.
  """
  like = jax.ShapeDtypeStruct(x.shape, x.dtype)

  @jax.custom_vjp
  def product(x, w, rest):
    x, w = jax.lax.optimization_barrier((x, w))
    return f(x, w.dense().astype(x.dtype), *rest)

  def forward(x, w, rest):
    return product(x, w, rest), (w, rest)

  def backward(saved, dy):
    w, rest = saved
    dy, w = jax.lax.optimization_barrier((dy, w))
    dense = w.dense().astype(like.dtype)
    (dx,) = jax.linear_transpose(lambda x: f(x, dense, *rest), like)(dy)
    return dx, None, None

  product.defvjp(forward, backward)
  return product(x, w, rest)


def packs(kind: str, shape: Sequence[int]) -> bool:
  """Whether a tensor of ggml type `kind` can be kept as a `BlockTensor`."""
  return len(shape) == 2 and gguf_types.TYPES[kind].bits is not None


def from_ggml(
  kind: str, matrices: Sequence[np.ndarray], axis: int
) -> BlockTensor:
  """Returns matrices of one type behind a leading axis, `[n, ...]`.

  Args:
    kind: ggml's name of the type, one that `packs`.
    matrices: blocks of each, uint8 `[rows, bytes of a row]`.
    axis: -2 if ggml's rows are the logical columns (`[in, out]` from
      `[out, in]`), -1 if they are the logical rows (an embedding).
  """
  ggml = gguf_types.TYPES[kind]
  parts = [gguf_types.split(ggml, raw) for raw in matrices]

  def leaf(name: str) -> Array | None:
    if getattr(parts[0], name) is None:
      return None
    turned = [_turn(getattr(part, name), axis) for part in parts]
    return jnp.asarray(np.stack(turned))

  return BlockTensor(
    leaf("codes"), leaf("scale"), leaf("offset"), leaf("high"), kind, axis
  )


def _turn(part: np.ndarray, axis: int) -> np.ndarray:
  """Moves ggml's rows to the end where they are the logical columns."""
  return part if axis == -1 else np.moveaxis(part, 0, -1)


def to_ggml(w: BlockTensor) -> np.ndarray:
  """Returns the blocks as ggml stores them, uint8 `[..., rows, bytes]`.

  Args:
    w: any leaf; byte for byte what it was made from.
  """
  ggml = gguf_types.TYPES[w.kind]
  lead = w.shape[:-2]

  def part(x: Any, inner: int) -> np.ndarray | None:
    if x is None:
      return None
    x = np.asarray(x)
    if w.axis == -2:
      x = np.moveaxis(x, -1, len(lead))
    return x.reshape(-1, *x.shape[x.ndim - 1 - inner :])

  raw = gguf_types.join(
    ggml,
    gguf_types.Parts(
      part(w.codes, 1), part(w.high, 1), part(w.scale, 0), part(w.offset, 0)
    ),
  )
  rows = w.shape[w.axis + 1 if w.axis == -2 else -2]
  return raw.reshape(*lead, rows, -1)
