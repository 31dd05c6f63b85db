"""NVFP4: blocks of 16 E2M1 floats with an E4M3 scale, and a global scale.

NVIDIA 2025 (arXiv:2509.25149). A weight is `code * (scale / divisor)`. The
divisor, `448 * 6 / max|w|` per matrix, maps block scales into the range of
E4M3, in which the scales of small weights would otherwise underflow. ModelOpt
stores the reciprocal of the divisor; compressed-tensors stores the divisor, as
here.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.quant.format import Format, NormalForm, Parts
from research.quant.layouts import packing
from research.quant.numerics import exact_division, minifloats
from research.quant.numerics.minifloats import E2M1, E4M3
from research.ranges import Between
from research.typing import Array, Float, UInt8

_MAX = E4M3.max * E2M1.max


@dataclasses.dataclass(frozen=True, kw_only=True)
class NVFP4(Format):
  """E2M1 codes, with a scale per block and a divisor per matrix.

  Parts: codes uint8 `[..., X, 8, O]` packed by `packing`; scale, codes of
  E4M3, uint8 `[..., X, O]`; divisor, float32 `[...]`.

  Attributes:
    block: weights per scale, 16 in the standard.
    search: number of scale codes below and above the nearest to try as well,
      for the least squared error. 5 includes mapping the largest weight to 4
      instead of 6 (Cook et al. 2025, arXiv:2512.02010).
    divided: whether there is a divisor other than 1.
  """

  block: int = 16
  search: Between(0, 16) = 0
  divided: bool = True

  def __post_init__(self):
    super().__post_init__()
    packing.check(self.block, 4, "NVFP4")

  @property
  def name(self) -> str:
    return "nvfp4" if self.divided else "nvfp4-undivided"

  def layout(self) -> dict[str, str]:
    return {"codes": "x.o", "scale": "xo", "divisor": ""}

  def divisor(self, w: Float[Array, "*B"]) -> Float[Array, ""]:
    """Returns the divisor of a matrix of any shape; 1 for zeros."""
    if not self.divided:
      return jnp.ones((), jnp.float32)
    top = abs(w.astype(jnp.float32)).max()
    # Smaller magnitudes count as 0: the divisor could overflow, or XLA flush.
    least = jnp.float32(2.0**-114)
    return jnp.where(top > least, _MAX / jnp.maximum(top, least), 1.0)

  def grid(
    self, w: Float[Array, "*B S O"], divisor: Float[Array, ""] | None = None
  ) -> tuple[UInt8[Array, "*B O"], Float[Array, ""]]:
    """Returns the scales' codes of groups of `S` weights, and the divisor."""
    w = w.astype(jnp.float32)
    if divisor is None:
      divisor = self.divisor(w)
    scale = divisor * exact_division.divide(abs(w).max(-2), E2M1.max)
    # Clip to the smallest positive scale, so that no block gets scale 0.
    scale = jnp.clip(scale, E4M3.values[1], E4M3.max)
    return minifloats.encode(scale, E4M3), divisor

  def codes(
    self,
    w: Float[Array, "*B S O"],
    scale: UInt8[Array, "*B O"],
    divisor: Float[Array, ""],
  ) -> UInt8[Array, "*B S O"]:
    step = minifloats.decode(scale, E4M3) / divisor
    x = exact_division.divide(w.astype(jnp.float32), step[..., None, :])
    return minifloats.encode(x, E2M1)

  def values(
    self,
    codes: UInt8[Array, "*B S O"],
    scale: UInt8[Array, "*B O"],
    divisor: Float[Array, ""],
  ) -> Float[Array, "*B S O"]:
    step = minifloats.decode(scale, E4M3) / divisor
    return minifloats.decode(codes, E2M1) * step[..., None, :]

  def parts(
    self,
    codes: Array,
    scale: UInt8[Array, "*B O"],
    divisor: Float[Array, ""],
  ) -> dict[str, Any]:
    packed = packing.pack(codes.astype(jnp.uint8), 4)
    return {"codes": packed, "scale": scale, "divisor": divisor}

  def encode(
    self,
    w: Float[Array, "I O"] | np.ndarray,
    importance: Float[Array, " I"] | None = None,
  ) -> dict[str, Any]:
    w = jnp.asarray(w).astype(jnp.float32)
    groups = w.reshape(-1, self.block, w.shape[1])
    scale, divisor = self.grid(groups)
    if self.search:
      weigh = None
      if importance is not None:
        weigh = importance.reshape(-1, self.block, 1)
      scale = self._best(groups, scale, divisor, weigh)
    return self.parts(self.codes(groups, scale, divisor), scale, divisor)

  def _best(self, groups, scale, divisor, weigh) -> UInt8[Array, "X O"]:
    """Returns the code near `scale` with the least squared error."""

    def moved(move):
      code = jnp.clip(scale.astype(jnp.int32) + move, 1, E4M3.top)
      return jnp.where(scale == E4M3.nan, scale, code.astype(jnp.uint8))

    def error(move):
      code = moved(move)
      off = self.values(self.codes(groups, code, divisor), code, divisor)
      # Multiply by the divisor, so that squares stay in the range of float32.
      off = ((off - groups) * divisor) ** 2
      return (off if weigh is None else off * weigh).sum(-2)

    moves = minifloats.nearest_first(self.search)
    return moved(moves[jnp.argmin(jax.lax.map(error, moves), axis=0)])

  def with_codes(
    self, parts: Parts, codes: UInt8[Array, "I O"]
  ) -> dict[str, Any]:
    blocks = codes.reshape(-1, self.block, codes.shape[-1])
    return dict(parts) | {"codes": packing.pack(blocks, 4)}

  def normal_form(self, parts: Parts) -> NormalForm:
    codes = packing.unpack(parts["codes"], 4)
    scale = minifloats.decode(jnp.asarray(parts["scale"]), E4M3)
    *lead, x, size, outputs = codes.shape
    return NormalForm(
      codes=codes.reshape(*lead, x * size, outputs),
      scale=scale / jnp.asarray(parts["divisor"])[..., None, None],
      group=size,
      codebook=E2M1.values,
    )
