"""A matrix in 4-bit codes of a codebook, as QLoRA keeps its base.

Dettmers et al. 2023 (arXiv:2305.14314): each block of 64 weights is 4-bit codes
times its largest magnitude; those magnitudes, less their mean, are 8-bit codes
themselves, 256 to a second-level magnitude: 4.127 bits a weight. Blocks run
along the rows of torch's `[out, in]`, each matrix by itself; numbers are bit by
bit those of bitsandbytes (but for the mean, whose sum has another order).

In memory the outputs come last and a block's codes before them, so that
decoding runs along whole vectors. Products decode the matrix next to where it
is used, the backward pass again (`research.quant.products`).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import weights
from research.quant import codebooks, products
from research.training.adam8bit import dynamic_map
from research.typing import Array, Float, Int, PRNGKey, UserError

NESTED = 256
"""Magnitudes that share a second-level one, where there are two levels."""

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights that may share a magnitude."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
  """A packed matrix `[..., I, O]`; frozen: no gradient reaches its parts.

  Attributes:
    codes: uint8 `[..., X, block / 2, O]` for I = X block, low nibbles the
      block's first half, high nibbles the other. Where blocks do not divide I,
      `[..., bytes]` in bitsandbytes' own order: rows of `[O, I]`, one after
      the other, high nibbles first.
    top: largest magnitudes `[..., X, O]`, or `[..., blocks]`; float32, or
      their 8-bit codes.
    nested: second-level magnitudes, float32 `[..., blocks / 256]` in the order
      of rows of `[O, I]`; None with one level.
    mean: of the magnitudes, float32 `[...]`; None with one level.
    kind: of the codebook, `"nf4"` or `"fp4"`.
    block: weights that share a magnitude.
    inputs, outputs: I, O.
    of: dtype that numbers are rounded to, the one they were packed from.
  """

  codes: Any
  top: Any
  nested: Any = None
  mean: Any = None
  kind: str = dataclasses.field(default="nf4", metadata=dict(static=True))
  block: int = dataclasses.field(default=64, metadata=dict(static=True))
  inputs: int = dataclasses.field(default=0, metadata=dict(static=True))
  outputs: int = dataclasses.field(default=0, metadata=dict(static=True))
  of: str = dataclasses.field(default="float32", metadata=dict(static=True))

  def __post_init__(self):
    if self.kind not in codebooks.CODEBOOKS:
      raise UserError(
        f"packed weight: kind is {self.kind!r}, expected one of "
        f"{', '.join(codebooks.CODEBOOKS)}"
      )
    if self.block < 2 or self.block % 2:
      raise UserError(
        f"packed weight: block is {self.block}, expected an even number"
      )

  @property
  def flat(self) -> bool:
    """Whether blocks run across rows, in bitsandbytes' own order."""
    return self.inputs % self.block != 0

  @property
  def lead(self) -> tuple[int, ...]:
    """The axes over matrices."""
    return tuple(self.codes.shape[: -1 if self.flat else -3])

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.lead, self.inputs, self.outputs)

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def dtype(self) -> Any:
    return jnp.dtype(self.of)

  @property
  def columns(self) -> int:
    """Returns `I`."""
    return self.inputs

  @property
  def rows(self) -> int:
    """Returns `O`."""
    return self.outputs

  def codes_apart(self) -> Array:
    """Returns the codes, `[..., I, O]`, or of flat ones `[..., I O]`."""
    if self.flat:
      pairs = jnp.stack([self.codes >> 4, self.codes & 15], axis=-1)
      found = pairs.reshape(*self.lead, -1)
      return found[..., : self.inputs * self.outputs]
    both = jnp.concatenate([self.codes & 15, self.codes >> 4], axis=-2)
    return both.reshape(self.shape)

  def magnitudes(self) -> Float[Array, "..."]:
    """Returns the blocks' largest magnitudes, float32, in the form of `top`."""
    if self.nested is None:
      return jnp.asarray(self.top)
    count = self.top.shape[-1]
    if self.flat:
      place, mean = np.arange(count), self.mean[..., None]
    else:
      x = self.top.shape[-2]
      place = np.arange(count) * x + np.arange(x)[:, None]
      mean = self.mean[..., None, None]
    values = jnp.take(jnp.asarray(dynamic_map(True)), self.top.astype(int))
    scaled = values * self.nested[..., place // NESTED]
    # Rounded before the sum, as in bitsandbytes: fused, it would not be.
    return jax.lax.optimization_barrier(scaled) + mean

  def stored(self) -> Float[Array, "... I O"]:
    """Returns the decoded matrix, bitwise what bitsandbytes decodes to."""
    values = codebooks.lookup(self.codes_apart(), codebooks.table(self.kind))
    top = self.magnitudes()
    if not self.flat:
      *lead, x, o = top.shape
      values = values.reshape(*lead, x, self.block, o) * top[..., None, :]
      return values.reshape(self.shape).astype(self.dtype)
    place = np.arange(self.inputs * self.outputs) // self.block
    values = (values * top[..., place]).astype(self.dtype)
    values = values.reshape(*self.lead, self.outputs, self.inputs)
    return jnp.swapaxes(values, -1, -2)

  def dense(self) -> Float[Array, "..."]:
    """Returns the matrix, in the dtype that it was packed from."""
    return self.stored()

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `einsum(eq, x, w)` over either axis, in the dtype of `x`."""
    return products.linear(lambda x, w: jnp.einsum(eq, x, w), x, self)

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns rows; all are decoded."""
    return jnp.take(self.dense(), ids, axis=0)

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    """Returns each row of `x` times its expert's matrix."""
    return products.ragged_dot(x, self, sizes, -2)

  def axes(self, names: tuple[str | None, ...]) -> "QTensor":
    """Blocks keep the name of the inputs; what is flat is never cut."""
    *lead, first, second = names
    own = {
      "codes": (*lead, first, None, second),
      "top": (*lead, first, second),
      "nested": (*lead, None),
      "mean": tuple(lead),
    }
    if self.flat:
      own |= {"codes": (*lead, None), "top": (*lead, None)}
    parts = {
      name: weights.axes(getattr(self, name), axes)
      for name, axes in own.items()
    }
    return dataclasses.replace(self, **parts)

  def bind(
    self, *, key: PRNGKey | None, ids: Int[Array, "B"] | None
  ) -> "QTensor":
    """Returns itself: nothing here depends on the batch."""
    return self


def pack(
  w: Float[Array, "... I O"] | np.ndarray,
  kind: str = "nf4",
  block: int = 64,
  nested: int = NESTED,
) -> QTensor:
  """Returns a matrix, or each of a stack of them, packed.

  Args:
    w: finite. An array of NumPy is packed by NumPy, to the same bits.
    kind: of the codebook.
    block: weights that share a magnitude, a power of two.
    nested: magnitudes that share a second-level one, 256; 0 for one level.

  Raises:
    UserError: bitsandbytes has no such blocks.
  """
  if block not in BLOCKS:
    raise UserError(f"block is {block}, expected a power of two, 32 to 4096")
  if nested not in (0, NESTED):
    raise UserError(f"nested is {nested}, expected {NESTED}, or 0 for none")
  one = functools.partial(_pack, kind=kind, block=block, nested=nested)
  lead = w.shape[:-2]
  if not lead:
    return one(w)
  matrices = w.reshape(-1, *w.shape[-2:])
  if isinstance(w, np.ndarray):
    packed = jax.tree.map(lambda *x: np.stack(x), *map(one, matrices))
  else:
    # One at a time: what a matrix takes while it is packed is not kept.
    packed = jax.lax.map(one, matrices)
  return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), packed)


def _pack(w: Any, kind: str, block: int, nested: int) -> QTensor:
  xp = np if isinstance(w, np.ndarray) else jnp
  inputs, outputs = w.shape
  top, unit = codebooks.magnitudes(w.T.reshape(-1).astype(np.float32), block)
  # An odd number of codes is filled up with that of zero.
  odd = unit.size % 2 if inputs % block else 0
  codes = codebooks.nearest(xp.pad(unit, (0, odd)), kind)
  second = mean = None
  if nested:
    mean = top.mean(dtype=np.float32)
    second, unit = codebooks.magnitudes(top - mean, nested)
    top = codebooks.divided(unit, dynamic_map(True))
  if inputs % block:
    codes = (codes[::2] << 4) | codes[1::2]
  else:
    x = inputs // block
    top = top.reshape(outputs, x).T
    codes = codes.reshape(outputs, x, 2, block // 2).transpose(1, 2, 3, 0)
    codes = codes[:, 0] | (codes[:, 1] << 4)
  return QTensor(
    codes, top, second, mean, kind, block, inputs, outputs, str(w.dtype)
  )
