"""OCP microscaling (MX) formats: MXFP4, MXFP6, MXFP8 and MXINT8.

Rouhani et al. 2023 (arXiv:2310.10537). Blocks of 32 minifloats or integers
share a scale, an E8M0 exponent byte, so that scaling is exact. Implementations
choose a block's exponent differently, see `minifloats.block_exponent`. On
normally distributed numbers the error of MXFP4, relative to their standard
deviation, is 0.112 with the rule `even`, 0.115 with `floor`, 0.116 with
`rceil`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.quant.format import Format, NormalForm, Parts
from research.quant.layouts import packing
from research.quant.numerics import minifloats
from research.ranges import Between, OneOf
from research.typing import Array, Float, UInt8

INT8 = minifloats.MiniFloat("int8", 1, 6, 1, 0x7F)
"""MXINT8 elements, integers / 64, as floats with one exponent bit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Microscaling(Format):
  """Codes of minifloats or integers, with a power of two per block.

  Parts: codes uint8 `[..., X, bytes, O]` packed by `packing`, int8 for
  `"int8"`; scale, the exponents plus 127, uint8 `[..., X, O]`.

  Attributes:
    block: weights per block, 32 in the standard.
    element: `"e2m1"`, `"e2m3"`, `"e3m2"`, `"e4m3"`, `"e5m2"` or `"int8"`.
    rule: rule of the exponent, `"floor"`, `"ceil"`, `"rceil"` or `"even"`.
    search: number of exponents below and above the rule's to try as well, for
      the least squared error.
  """

  block: int = 32
  element: OneOf(*minifloats.KINDS, "int8") = "e2m1"
  rule: OneOf(*minifloats.RULES) = "even"
  search: Between(0, 8) = 0

  def __post_init__(self):
    super().__post_init__()
    packing.check(self.block, self.bits, "Microscaling")

  @property
  def kind(self) -> minifloats.MiniFloat:
    return minifloats.KINDS.get(self.element, INT8)

  @property
  def bits(self) -> int:
    return self.kind.bits

  @property
  def name(self) -> str:
    if self.element == "int8":
      return "mxint8"
    short = {"e2m1": "mxfp4", "e4m3": "mxfp8"}
    return short.get(self.element, f"mxfp{self.bits}-{self.element}")

  @property
  def group_local(self) -> bool:
    return True

  def layout(self) -> dict[str, str]:
    return {"codes": "x.o", "scale": "xo"}

  def grid(self, w: Float[Array, "*B S O"]) -> tuple[UInt8[Array, "*B O"]]:
    """Returns the scale byte of each group of `S` weights, by `rule`."""
    top = abs(w.astype(jnp.float32)).max(-2)
    return (minifloats.block_exponent(top, self.kind, self.rule),)

  def codes(
    self, w: Float[Array, "*B S O"], scale: UInt8[Array, "*B O"]
  ) -> Array:
    x = minifloats.divide_by_scale(w.astype(jnp.float32), scale[..., None, :])
    return minifloats.encode(x, self.kind)

  def values(
    self, codes: Array, scale: UInt8[Array, "*B O"]
  ) -> Float[Array, "*B S O"]:
    x = minifloats.decode(codes.astype(jnp.uint8), self.kind)
    return x * minifloats.block_scale(scale)[..., None, :]

  def parts(self, codes: Array, scale: UInt8[Array, "*B O"]) -> dict[str, Any]:
    codes = codes.astype(jnp.uint8)
    if self.element == "int8":
      size = (codes & 127).astype(jnp.int8)
      return {"codes": jnp.where(codes > 127, -size, size), "scale": scale}
    return {"codes": packing.pack(codes, self.bits), "scale": scale}

  def encode(
    self,
    w: Float[Array, "I O"] | np.ndarray,
    importance: Float[Array, " I"] | None = None,
  ) -> dict[str, Any]:
    w = jnp.asarray(w).astype(jnp.float32)
    groups = w.reshape(-1, self.block, w.shape[1])
    weigh = None
    if importance is not None:
      weigh = importance.reshape(-1, self.block, 1)
    (scale,) = self.grid(groups)
    if self.search:
      scale = self._best(groups, scale, weigh)
    return self.parts(self.codes(groups, scale), scale)

  def _best(self, groups, scale, weigh) -> UInt8[Array, "X O"]:
    """Returns the byte near `scale` with the least squared error."""
    # Divide by the scale, so that squares do not overflow float32.
    x = minifloats.divide_by_scale(groups, scale[..., None, :])

    def error(move):
      byte = jnp.full(scale.shape, minifloats.BIAS + move, jnp.uint8)
      off = (self.values(self.codes(x, byte), byte) - x) ** 2
      return (off if weigh is None else off * weigh).sum(-2)

    moves = minifloats.nearest_first(self.search)
    best = moves[jnp.argmin(jax.lax.map(error, moves), axis=0)]
    byte = jnp.clip(scale.astype(jnp.int32) + best, 0, minifloats.NAN - 1)
    return jnp.where(scale == minifloats.NAN, scale, byte.astype(jnp.uint8))

  def normal_form(self, parts: Parts) -> NormalForm:
    codes, codebook = parts["codes"], None
    scale = minifloats.block_scale(jnp.asarray(parts["scale"]))
    if self.element == "int8":
      scale = scale / 64
    elif self.element == "e2m3":
      # E2M3 values are multiples of 1/8, up to 60/8: use integers.
      values = minifloats.decode(packing.unpack(codes, 6), self.kind)
      codes, scale = (8 * values).astype(jnp.int8), scale / 8
    else:
      codes, codebook = packing.unpack(codes, self.bits), self.kind.finite
    *lead, x, size, outputs = codes.shape
    return NormalForm(
      codes=codes.reshape(*lead, x * size, outputs),
      scale=scale.astype(jnp.bfloat16),  # exact for a power of two
      group=size,
      codebook=codebook,
      bits=4 if self.bits == 4 else 8,
    )

  def decode(self, parts: Parts) -> Float[Array, "... I O"]:
    if self.element not in ("e3m2", "e4m3", "e5m2"):
      return super().decode(parts)
    # By arithmetic rather than a gather from a table of 256.
    codes = packing.unpack(parts["codes"], self.bits)
    values = self.values(codes, jnp.asarray(parts["scale"]))
    *lead, x, size, outputs = values.shape
    return values.reshape(*lead, x * size, outputs)
