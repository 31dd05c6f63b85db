"""Microscaling: 32 small floats or integers that share a power of two.

Rouhani et al. 2023 (arXiv:2310.10537), the OCP's MX formats: MXFP4, MXFP6,
MXFP8 and MXINT8. A block's scale is a byte, an exponent without sign or zero
(E8M0), so that scaling is exact; which power a block gets differs between
implementations, see `minifloats.block_exponent`. On normal numbers MXFP4 errs
0.112 of their deviation by the rule `even`, 0.115 by `floor`, 0.116 by `rceil`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.quant.format import Format, Parts, Plain
from research.quant.layouts import packing
from research.quant.numerics import minifloats
from research.typing import Array, Float, UInt8, UserError

INT8 = minifloats.MiniFloat("int8", 1, 6, 1, 0x7F)
"""Signed integers over 64 are floats of one exponent bit, on the same grid."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Microscaling(Format):
  """Codes of small floats times a power of two a block.

  Parts: codes uint8 `[..., X, bytes, O]` as `packing` has them, those of
  `"int8"` int8; scale, the exponents less -127, uint8 `[..., X, O]`.

  Attributes:
    block: weights that share a power of two, 32 in the standard.
    element: `"e2m1"`, `"e2m3"`, `"e3m2"`, `"e4m3"`, `"e5m2"` or `"int8"`.
    rule: of the power, `"floor"`, `"ceil"`, `"rceil"` or `"even"`.
    search: powers below and above the rule's that are tried as well; kept is
      the one of the least squared error.
  """

  block: int = 32
  element: str = "e2m1"
  rule: str = "even"
  search: int = 0

  def __post_init__(self):
    kinds, rules = (*minifloats.KINDS, "int8"), minifloats.RULES
    checks = {
      "element": (self.element in kinds, f"one of {', '.join(kinds)}"),
      "rule": (self.rule in rules, f"one of {', '.join(rules)}"),
      "search": (0 <= self.search <= 8, "0 to 8"),
    }
    for name, (good, expected) in checks.items():
      if not good:
        found = getattr(self, name)
        raise UserError(
          f"Microscaling: {name} is {found!r}, expected {expected}"
        )
    packing.check(self.block, self.bits, "Microscaling")

  @property
  def kind(self) -> minifloats.MiniFloat:
    """Returns what elements are."""
    return minifloats.KINDS.get(self.element, INT8)

  @property
  def bits(self) -> int:
    """Returns the bits of an element."""
    return self.kind.bits

  @property
  def name(self) -> str:
    if self.element == "int8":
      return "mxint8"
    short = {"e2m1": "mxfp4", "e4m3": "mxfp8"}
    return short.get(self.element, f"mxfp{self.bits}-{self.element}")

  @property
  def local(self) -> bool:
    return True

  def layout(self) -> dict[str, str]:
    return {"codes": "x.o", "scale": "xo"}

  def grid(self, w: Float[Array, "*B S O"]) -> tuple[UInt8[Array, "*B O"]]:
    """Returns the scale's byte of each group of `S` weights, by the rule."""
    top = abs(w.astype(jnp.float32)).max(-2)
    return (minifloats.block_exponent(top, self.kind, self.rule),)

  def codes(
    self, w: Float[Array, "*B S O"], scale: UInt8[Array, "*B O"]
  ) -> Array:
    """Returns the nearest elements' codes."""
    x = minifloats.divided_by_scale(w.astype(jnp.float32), scale[..., None, :])
    return minifloats.encode(x, self.kind)

  def values(
    self, codes: Array, scale: UInt8[Array, "*B O"]
  ) -> Float[Array, "*B S O"]:
    """Returns what codes stand for."""
    x = minifloats.decode(codes.astype(jnp.uint8), self.kind)
    return x * minifloats.block_scale(scale)[..., None, :]

  def parts(self, codes: Array, scale: UInt8[Array, "*B O"]) -> dict[str, Any]:
    """Returns the arrays that are kept of codes on a grid."""
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
    """Returns the byte near `scale` whose error is least."""
    # Over its scale, so that no square is beyond float32.
    x = minifloats.divided_by_scale(groups, scale[..., None, :])

    def error(move):
      byte = jnp.full(scale.shape, minifloats.BIAS + move, jnp.uint8)
      off = (self.values(self.codes(x, byte), byte) - x) ** 2
      return (off if weigh is None else off * weigh).sum(-2)

    moves = minifloats.nearest_first(self.search)
    best = moves[jnp.argmin(jax.lax.map(error, moves), axis=0)]
    byte = jnp.clip(scale.astype(jnp.int32) + best, 0, minifloats.NAN - 1)
    return jnp.where(scale == minifloats.NAN, scale, byte.astype(jnp.uint8))

  def plain(self, parts: Parts) -> Plain:
    codes, codebook = parts["codes"], None
    scale = minifloats.block_scale(jnp.asarray(parts["scale"]))
    if self.element == "int8":
      scale = scale / 64
    elif self.element == "e2m3":
      # Multiples of an eighth, up to 60 of them: integers.
      values = minifloats.decode(packing.unpack(codes, 6), self.kind)
      codes, scale = (8 * values).astype(jnp.int8), scale / 8
    else:
      codes, codebook = packing.unpack(codes, self.bits), self.kind.finite
    *lead, x, size, outputs = codes.shape
    return Plain(
      codes=codes.reshape(*lead, x * size, outputs),
      scale=scale.astype(jnp.bfloat16),  # exact, of a power of two
      group=size,
      codebook=codebook,
      bits=4 if self.bits == 4 else 8,
    )

  def decode(self, parts: Parts) -> Float[Array, "... I O"]:
    if self.element not in ("e3m2", "e4m3", "e5m2"):
      return super().decode(parts)
    # By arithmetic: nothing gathers from a table of 256.
    codes = packing.unpack(parts["codes"], self.bits)
    values = self.values(codes, jnp.asarray(parts["scale"]))
    *lead, x, size, outputs = values.shape
    return values.reshape(*lead, x * size, outputs)
