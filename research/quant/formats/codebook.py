"""4-bit codebook quantization as in QLoRA: NF4, FP4, AF4, double quantization.

Dettmers et al. 2023 (arXiv:2305.14314): each block of 64 weights has 4-bit
codes, times its largest magnitude. With double quantization these magnitudes,
minus their mean, are 8-bit codes, with a second-level magnitude per 256 of
them: 4.127 bits per weight. Blocks run along the rows of torch's `[out, in]`,
separately for each matrix. Numbers equal those of bitsandbytes bit for bit
(except for the mean, which is summed in another order).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.optim.adam8bit import dynamic_map
from research.quant.format import Format, NormalForm, Parts
from research.quant.numerics import codebooks
from research.ranges import OneOf
from research.typing import Array, Float, UInt8, UserError

NESTED = 256
"""Block magnitudes per second-level magnitude in double quantization."""

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Supported block sizes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codebook(Format):
  """Codes of a codebook, times a magnitude per block.

  Parts: codes uint8 `[..., X, block / 2, O]`, low nibbles the block's first
  half, high nibbles the second; top, the largest magnitudes `[..., X, O]` in
  float32 or as 8-bit codes; with double quantization also nested, float32
  `[..., blocks / 256]` in the order of rows of `[O, I]`, and mean `[...]`.

  Attributes:
    block: weights per magnitude, one of `BLOCKS`.
    nested: magnitudes per second-level magnitude, 256; 0 for no double
      quantization.
  """

  block: OneOf(*BLOCKS) = 64
  kind: OneOf(*codebooks.CODEBOOKS) = "nf4"
  nested: OneOf(0, NESTED) = NESTED

  @property
  def name(self) -> str:
    return f"{self.kind}-b{self.block}{'-dq' if self.nested else ''}"

  @property
  def group_local(self) -> bool:
    return not self.nested

  def layout(self) -> dict[str, str]:
    layout = {"codes": "x.o", "top": "xo"}
    return layout | ({"nested": ".", "mean": ""} if self.nested else {})

  def for_shape(self, inputs: int, outputs: int) -> "Codebook":
    if inputs % self.block == 0:
      return self
    mine = dataclasses.asdict(self)
    return FlatCodebook(**mine | {"inputs": inputs, "outputs": outputs})

  def encode(
    self,
    w: Float[Array, "I O"] | np.ndarray,
    importance: Float[Array, " I"] | None = None,
  ) -> dict[str, Any]:
    del importance
    xp = np if isinstance(w, np.ndarray) else jnp
    flat = w.T.reshape(-1).astype(np.float32)
    top, unit = codebooks.magnitudes(flat, self.block)
    # Pad an odd number of codes with the code of zero.
    codes = codebooks.nearest(xp.pad(unit, (0, unit.size % 2)), self.kind)
    parts = {}
    if self.nested:
      mean = top.mean(dtype=np.float32)
      parts["nested"], unit = codebooks.magnitudes(top - mean, self.nested)
      parts["mean"] = mean
      top = codebooks.nearest_of(unit, dynamic_map(True))
    return self._placed(codes, top, *w.shape) | parts

  def _placed(self, codes, top, inputs, outputs) -> dict[str, Any]:
    """Returns the parts of codes and top in the order of rows of `[O, I]`."""
    x = inputs // self.block
    codes = codes.reshape(outputs, x, 2, self.block // 2).transpose(1, 2, 3, 0)
    codes = codes[:, 0] | (codes[:, 1] << 4)
    return {"codes": codes, "top": top.reshape(outputs, x).T}

  def grid(self, w: Float[Array, "*B S O"]) -> tuple[Float[Array, "*B O"]]:
    return (abs(w).max(-2),)

  def codes(
    self, w: Float[Array, "*B S O"], top: Float[Array, "*B O"]
  ) -> UInt8[Array, "*B S O"]:
    unit = w * codebooks.inverse(top)[..., None, :]
    return codebooks.nearest(jnp.clip(unit, -1, 1), self.kind)

  def values(
    self, codes: UInt8[Array, "*B S O"], top: Float[Array, "*B O"]
  ) -> Float[Array, "*B S O"]:
    found = codebooks.lookup(codes, codebooks.table(self.kind))
    return found * top[..., None, :]

  def parts(
    self, codes: UInt8[Array, "X S O"], top: Float[Array, "X O"]
  ) -> dict[str, Any]:
    """Returns the parts of one matrix, without double quantization."""
    whole = codes.reshape(-1, codes.shape[-1])
    return self.with_codes({"top": top}, whole)

  def with_codes(
    self, parts: Parts, codes: UInt8[Array, "I O"]
  ) -> dict[str, Any]:
    flat = codes.T.reshape(-1)
    flat = jnp.pad(flat, (0, flat.size % 2))
    placed = self._placed(flat, jnp.zeros(parts["top"].size), *codes.shape)
    return dict(parts) | {"codes": placed["codes"]}

  def to_sliceable(self, parts: Parts) -> tuple[Format, Parts]:
    """Returns it without double quantization, with float32 magnitudes."""
    if not self.nested:
      return self, parts
    plain = dataclasses.replace(self, nested=0)
    return plain, {"codes": parts["codes"], "top": self.magnitudes(parts)}

  def magnitudes(self, parts: Parts) -> Float[Array, "..."]:
    """Returns the blocks' largest magnitudes, float32, shaped as `top`."""
    top = parts["top"]
    if not self.nested:
      return jnp.asarray(top)
    place = self._places(top)
    values = jnp.take(jnp.asarray(dynamic_map(True)), top.astype(int))
    scaled = values * parts["nested"][..., place // self.nested]
    mean = parts["mean"][(..., *(None,) * place.ndim)]
    # The barrier rounds the product before the sum, as in bitsandbytes.
    return jax.lax.optimization_barrier(scaled) + mean

  def _places(self, top) -> np.ndarray:
    x, outputs = top.shape[-2:]
    return np.arange(outputs) * x + np.arange(x)[:, None]

  def normal_form(self, parts: Parts) -> NormalForm:
    codes = parts["codes"]
    both = jnp.concatenate([codes & 15, codes >> 4], axis=-2)
    *lead, x, _, outputs = both.shape
    return NormalForm(
      codes=both.reshape(*lead, x * self.block, outputs),
      scale=self.magnitudes(parts),
      group=self.block,
      codebook=codebooks.CODEBOOKS[self.kind],
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlatCodebook(Codebook):
  """Codebook format for blocks that do not divide the inputs and cross rows.

  Parts: codes `[..., bytes]` and top `[..., blocks]` in bitsandbytes' own
  order: rows of `[O, I]`, one after the other, high nibbles first.

  Attributes:
    inputs, outputs: I, O.
  """

  inputs: int = 0
  outputs: int = 0

  @property
  def sliceable(self) -> bool:
    return False

  @property
  def separable(self) -> bool:
    return False

  def to_sliceable(self, parts: Parts) -> tuple[Format, Parts]:
    return self, parts  # not sliceable: a block spans several outputs

  @property
  def group_local(self) -> bool:
    return False

  def layout(self) -> dict[str, str]:
    return super().layout() | {"codes": ".", "top": "."}

  def for_shape(self, inputs: int, outputs: int) -> "FlatCodebook":
    if (inputs, outputs) != (self.inputs, self.outputs):
      raise UserError(
        f"{self.name}: made for [{self.inputs}, {self.outputs}], found "
        f"[{inputs}, {outputs}]"
      )
    return self

  def _placed(self, codes, top, inputs, outputs) -> dict[str, Any]:
    return {"codes": (codes[::2] << 4) | codes[1::2], "top": top}

  def _places(self, top) -> np.ndarray:
    return np.arange(top.shape[-1])

  def normal_form(self, parts: Parts) -> NormalForm:
    codes = parts["codes"]
    pairs = jnp.stack([codes >> 4, codes & 15], axis=-1)
    size = self.inputs * self.outputs
    found = pairs.reshape(*codes.shape[:-1], -1)[..., :size]
    top = self.magnitudes(parts)[..., np.arange(size) // self.block]

    def turned(x):
      shape = (*x.shape[:-1], self.outputs, self.inputs)
      return jnp.swapaxes(x.reshape(shape), -1, -2)

    return NormalForm(
      codes=turned(found),
      scale=turned(top),
      group=1,
      codebook=codebooks.CODEBOOKS[self.kind],
    )
