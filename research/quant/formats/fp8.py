"""FP8 (E4M3, E5M2) with scales per tensor, per channel or per tile.

Micikevicius et al. 2022 (arXiv:2209.05433). A scale maps the largest magnitude
of its weights to the format's largest number, 448 for E4M3. Tiles of 128 by 128
are those of DeepSeek-V3 (arXiv:2412.19437).
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.quant.format import Format, NormalForm, Parts
from research.quant.numerics import exact_division, minifloats
from research.ranges import OneOf, PositiveInt
from research.typing import Array, Float, UInt8


@dataclasses.dataclass(frozen=True, kw_only=True)
class FP8(Format):
  """Codes of an eight-bit float times a scale.

  Parts: codes uint8 `[..., I, O]`; scale `[...]`, `[..., O]`, or of tiles
  `[..., I / rows, O / columns]`, rounded up.

  Attributes:
    block: 1; scales do not belong to blocks along the inputs.
    element: `"e4m3"` or `"e5m2"`.
    share: weights that share a scale: `"tensor"`, `"channel"` (an output) or
      `"tile"`.
    tile_inputs, tile_outputs: sizes of a tile; the last ones may be smaller.
  """

  block: OneOf(1) = 1
  element: OneOf("e4m3", "e5m2") = "e4m3"
  share: OneOf("tensor", "channel", "tile") = "channel"
  tile_inputs: PositiveInt = 128
  tile_outputs: PositiveInt = 128
  scale_dtype: str = "float32"

  @property
  def kind(self) -> minifloats.MiniFloat:
    return minifloats.KINDS[self.element]

  @property
  def name(self) -> str:
    share = self.share
    if share == "tile":
      share = f"{self.tile_inputs}x{self.tile_outputs}"
    return f"fp8-{self.element}-{share}"

  @property
  def separable(self) -> bool:
    return self.share == "channel"

  def layout(self) -> dict[str, str]:
    tile = "..", ".o"
    scale = {"tensor": "", "channel": "o", "tile": tile[self.tile_outputs == 1]}
    return {"codes": "xo", "scale": scale[self.share]}

  def to_sliceable(self, parts: Parts) -> tuple[Format, Parts]:
    if self.share != "tile" or self.tile_outputs == 1:
      return self, parts
    outputs = parts["codes"].shape[-1]
    scale = jnp.repeat(parts["scale"], self.tile_outputs, axis=-1)
    one = dataclasses.replace(self, tile_outputs=1)
    return one, dict(parts) | {"scale": scale[..., :outputs]}

  def encode(
    self,
    w: Float[Array, "I O"] | np.ndarray,
    importance: Float[Array, " I"] | None = None,
  ) -> dict[str, Any]:
    del importance
    w = jnp.asarray(w).astype(jnp.float32)
    if self.share == "tile":
      rows, columns = self.tile_inputs, self.tile_outputs
      pad = ((0, -w.shape[0] % rows), (0, -w.shape[1] % columns))
      tiles = jnp.pad(w, pad).reshape(-(-w.shape[0] // rows), rows, -1, columns)
      top = abs(tiles).max((1, 3))
    else:
      top = abs(w).max(0 if self.share == "channel" else None)
    scale = jnp.where(top > 0, exact_division.divide(top, self.kind.max), 1.0)
    # Neither below the dtype's range, nor so small that XLA flushes it to 0.
    info = jnp.finfo(self.scale_dtype)
    least = max(float(info.smallest_subnormal), 2.0**-126)
    scale = jnp.maximum(scale, least).astype(self.scale_dtype)
    x = exact_division.divide(w, self._expand_scale(scale, *w.shape))
    return {"codes": minifloats.encode(x, self.kind), "scale": scale}

  def _expand_scale(
    self, scale: Any, inputs: int, outputs: int
  ) -> Float[Array, "..."]:
    """Returns the scales, float32, in a shape that broadcasts to `[I, O]`."""
    scale = jnp.asarray(scale).astype(jnp.float32)
    if self.share == "tensor":
      return scale[..., None, None]
    if self.share == "channel":
      return scale[..., None, :]
    scale = jnp.repeat(scale, self.tile_inputs, axis=-2)[..., :inputs, :]
    return jnp.repeat(scale, self.tile_outputs, axis=-1)[..., :outputs]

  def with_codes(
    self, parts: Parts, codes: UInt8[Array, "I O"]
  ) -> dict[str, Any]:
    return dict(parts) | {"codes": codes}

  def normal_form(self, parts: Parts) -> NormalForm:
    codes = jnp.asarray(parts["codes"])
    *lead, inputs, outputs = codes.shape
    scale, group = self._expand_scale(parts["scale"], inputs, outputs), inputs
    if self.share == "tile":
      group = math.gcd(inputs, self.tile_inputs)
      scale = scale[..., ::group, :]
    return NormalForm(
      codes=codes,
      scale=jnp.broadcast_to(scale, (*lead, inputs // group, outputs)),
      group=group,
      codebook=self.kind.finite,
      bits=8,
    )

  def decode(self, parts: Parts) -> Float[Array, "... I O"]:
    # By arithmetic rather than a gather from a table of 256.
    codes = jnp.asarray(parts["codes"])
    scale = self._expand_scale(parts["scale"], *codes.shape[-2:])
    return minifloats.decode(codes, self.kind) * scale
