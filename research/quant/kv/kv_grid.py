"""KV cache quantization (KIVI): encodes and decodes keys or values.

KIVI (Liu et al. 2024, arXiv:2402.02750): a group stores its minimum and its
scale in 16 bits each, and codes of `bits` bits. Keys have a few channels that
are large for every token, so a group of keys is one channel of neighbouring
tokens. Values have none, so their group is neighbouring channels of one token,
which can be packed at once.

`int8` and `fp8` are symmetric, with a float32 scale per group. A group of
channels is then the token's whole head, as in `decode_attention.pages`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.decode_attention import pages
from research.quant.layouts import packing
from research.quant.numerics import hadamard
from research.typing import Array, Float, UserError

SYMMETRIC = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
"""Symmetric kinds, with a scale and no minimum."""

BITS = (2, 4, 8, 16, *SYMMETRIC)
"""Supported bits per number; 16 means the cache's dtype, unquantized."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
  """Encoded numbers of `S` tokens with `H` channels, with leading axes.

  Attributes:
    codes: `[..., S, bytes]` for groups of channels; `[..., X, bytes, H]` for
      groups of tokens, S = X group; the numbers themselves, `[..., S, H]`, if
      unquantized.
    scale: `[..., S, H / group]` or `[..., X, H]`; None if unquantized.
    low: minimum of each group, as `scale`; None for symmetric grids.
  """

  codes: Any
  scale: Any = None
  low: Any = None


@dataclasses.dataclass(frozen=True)
class Grid:
  """Quantizer of keys or of values.

  Attributes:
    bits: one of `BITS`.
    per_channel: whether a group is tokens of one channel.
    group: numbers per group; ignored by `int8` and `fp8` per token.
    rotated: whether heads are rotated by a Hadamard matrix first.
  """

  bits: int | str = 4
  per_channel: bool = False
  group: int = 32
  rotated: bool = False
  scale_dtype: str = "float16"

  @property
  def unquantized(self) -> bool:
    return self.bits == 16

  @property
  def packs_blocks(self) -> bool:
    """Whether several tokens are packed together."""
    return self.per_channel and not self.unquantized

  def check(self, dim: int, what: str) -> None:
    """Raises UserError unless heads of `dim` channels can be packed."""
    if self.unquantized or (self.bits in SYMMETRIC and not self.per_channel):
      return
    if not self.per_channel and dim % self.group:
      raise UserError(
        f"{what}: a group of {self.group} channels does not divide heads of "
        f"{dim}: take one of {math.gcd(dim, self.group)}"
      )
    if self.bits not in SYMMETRIC:
      packing.check(self.group, self.bits, f"{what}: a group")

  def bits_per_number(self, dim: int) -> float:
    """Returns bits per packed number, with its share of scale and minimum."""
    if self.bits in SYMMETRIC:
      return 8 + 32 / (self.group if self.per_channel else dim)
    return self.bits + 16 * jnp.dtype(self.scale_dtype).itemsize / self.group

  def encode(self, x: Float[Array, "*B S H"]) -> Packed:
    """Encodes numbers of S tokens; S is a multiple of groups of tokens."""
    if self.unquantized:
      return Packed(x)
    x = x.astype(jnp.float32)
    x = hadamard.rotate(x) if self.rotated else x
    groups = self._grouped(x)
    if self.bits in SYMMETRIC:
      dtype = SYMMETRIC[self.bits]
      codes, scale = pages.quantize(groups.swapaxes(-1, -2), dtype)
      codes = self._joined(codes.swapaxes(-1, -2))
      return Packed(codes, self._scales(scale))
    codes, scale, low = encode(groups, self.bits, self.scale_dtype)
    codes = packing.pack(codes, self.bits)
    return Packed(self._joined(codes), *map(self._scales, (scale, low)))

  def decode(self, packed: Packed) -> Float[Array, "*B S H"]:
    """Decodes numbers, to float32 unless unquantized."""
    codes, scale, low = packed.codes, packed.scale, packed.low
    if self.unquantized:
      return codes
    *lead, tokens, channels = codes.shape
    if not self.per_channel:
      codes = codes.reshape(*lead, tokens, scale.shape[-1], -1, 1)
      scale = scale[..., None]
      low = None if low is None else low[..., None]
    if low is not None:
      codes = packing.unpack(codes, self.bits)
    x = codes.astype(jnp.float32) * scale.astype(jnp.float32)[..., None, :]
    if low is not None:
      x = x + low.astype(jnp.float32)[..., None, :]
    if self.per_channel:
      x = x.reshape(*lead[:-1], -1, channels)
    else:
      x = x.reshape(*lead, tokens, -1)
    return hadamard.rotate(x, inverse=True) if self.rotated else x

  def empty(self, lead: tuple[int, ...], slots: int, dim: int, dtype: Any):
    like = jax.ShapeDtypeStruct((*lead, slots, dim), dtype)
    shapes = jax.eval_shape(self.encode, like)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  def tokens(self, packed: Packed) -> int:
    if self.packs_blocks:
      return packed.codes.shape[-3] * self.group
    return packed.codes.shape[-2]

  def _grouped(self, x):
    *lead, tokens, dim = x.shape
    if self.per_channel:
      return x.reshape(*lead, tokens // self.group, self.group, dim)
    size = dim if self.bits in SYMMETRIC else self.group
    return x.reshape(*lead, tokens, dim // size, size, 1)

  def _joined(self, codes):
    if self.per_channel:
      return codes
    return codes.reshape(*codes.shape[:-3], -1)

  def _scales(self, x):
    return x if self.per_channel else x[..., 0]


def encode(
  x: Float[Array, "*B N M"], bits: int, dtype: str = "float16"
) -> tuple[Array, Array, Array]:
  """Returns codes `[..., N, M]`, scales and minima `[..., M]`.

  Codes are computed from the stored, rounded scale and minimum, which reduces
  the effect of their rounding. A group of equal numbers has scale 1.

  Args:
    x: groups of N numbers, float32.
  """
  most = float(jnp.finfo(dtype).max)
  low = jnp.min(x, axis=-2)
  scale = (jnp.max(x, axis=-2) - low) / (2**bits - 1)
  low, scale = (jnp.clip(y, -most, most).astype(dtype) for y in (low, scale))
  scale = jnp.where(scale == 0, 1, scale).astype(dtype)
  apart = x - low.astype(jnp.float32)[..., None, :]
  codes = jnp.round(apart / scale.astype(jnp.float32)[..., None, :])
  return jnp.clip(codes, 0, 2**bits - 1).astype(jnp.uint8), scale, low
