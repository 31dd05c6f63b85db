"""Base class of ggml's block types (GGUF), which encodes and decodes blocks.

A ggml type is a struct of scales and packed codes per block of a row. The parts
of a format are the struct's fields, byte for byte, with rows last. A file's
blocks and a `QTensor`'s arrays thus hold the same bits in another order, and
rows convert without decoding. Decoding (`normal_form`) works on NumPy and JAX
arrays. Encoding is in NumPy, since a compiler that fuses products and sums
gives other codes than the C reference.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from research.quant.format import Format, Parts
from research.quant.numerics import scale_search
from research.typing import Array, Float, Shaped, UserError

_COLUMNS, _PIECE = 512, 1 << 16
"""Outputs, and weights, per chunk of encoding, sized for a core's cache."""


class Field(NamedTuple):
  """One field of a block: an array of `count` numbers, or a scalar if 0."""

  name: str
  dtype: str
  count: int = 0

  @property
  def nbytes(self) -> int:
    return np.dtype(self.dtype).itemsize * (self.count or 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ggml(Format):
  """A block type of ggml; subclasses define its fields and their meaning."""

  kind: ClassVar[str] = ""
  fields: ClassVar[tuple[Field, ...]] = ()

  def __post_init__(self):
    super().__post_init__()
    if self.block != type(self).block:
      raise UserError(
        f"{self.kind}: block is {self.block}, expected {type(self).block}"
      )

  @property
  def name(self) -> str:
    return self.kind

  @property
  def traceable(self) -> bool:
    return False

  @property
  def nbytes(self) -> int:
    return sum(field.nbytes for field in self.fields)

  def layout(self) -> dict[str, str]:
    return {f.name: "x.o" if f.count else "xo" for f in self.fields}

  def split(self, raw: np.ndarray) -> dict[str, np.ndarray]:
    """Splits raw rows into parts.

    Args:
      raw: uint8 `[rows, X nbytes]`.

    Returns:
      views, `[X, rows]` or `[X, count, rows]`.
    """
    blocks = raw.reshape(raw.shape[0], -1, self.nbytes)
    out, at = {}, 0
    for field in self.fields:
      part = blocks[..., at : at + field.nbytes]
      at += field.nbytes
      if np.dtype(field.dtype).itemsize > 1:
        part = np.ascontiguousarray(part).view(field.dtype)
      else:
        part = part.view(field.dtype)
      part = part if field.count else part[..., 0]
      out[field.name] = np.moveaxis(part, 0, -1)
    return out

  def join(self, parts: Parts) -> np.ndarray:
    """Returns blocks, uint8 `[rows, X nbytes]`; inverts `split`."""
    pieces = []
    for field in self.fields:
      part = np.moveaxis(np.asarray(parts[field.name]), -1, 0)
      part = part if field.count else part[..., None]
      part = np.ascontiguousarray(part, np.dtype(field.dtype))
      pieces.append(part.view(np.uint8))
    blocks = np.concatenate(pieces, axis=-1)
    return blocks.reshape(blocks.shape[0], -1)

  def encode(
    self,
    w: Float[Array, "I O"] | np.ndarray,
    importance: Float[Array, " I"] | np.ndarray | None = None,
  ) -> dict[str, Any]:
    """Encodes one matrix to the bytes that the C reference gives.

    Args:
      importance: weight of each input's squared error, or None.

    Raises:
      UserError: a weight is not finite, or too large for the type's scales.
    """
    w = np.asarray(w)
    inputs, outputs = w.shape
    out = {
      f.name: np.empty(self._shape(f, inputs // self.block, outputs), f.dtype)
      for f in self.fields
    }
    weight = mean = None
    if importance is not None:
      weight = np.asarray(importance, np.float32).reshape(-1, self.block, 1)
      mean = _mean_square(w)
    columns = min(outputs, _COLUMNS)
    step = max(1, _PIECE // (self.block * columns))

    def one(piece: tuple[slice, slice]) -> None:
      x, o = piece
      found = self.blocks(
        self._piece(w, x, o),
        None if weight is None else weight[x],
        None if mean is None else mean[o],
      )
      for name, part in found.items():
        out[name][x, ..., o] = part[..., : o.stop - o.start]

    pieces = [
      (x, o)
      for o in _slices(outputs, columns)
      for x in _slices(inputs // self.block, step)
    ]
    if len(pieces) == 1:
      one(pieces[0])
    else:
      with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, pieces))
    for name, part in out.items():
      if part.dtype.kind == "f" and not np.isfinite(part).all():
        raise UserError(
          f"{self.kind}: {name} is beyond the range of {part.dtype}; the "
          f"largest weight is {np.abs(w).max():.3g}"
        )
    return out

  def _shape(self, field: Field, x: int, outputs: int) -> tuple[int, ...]:
    return (x, field.count, outputs) if field.count else (x, outputs)

  def _piece(self, w: np.ndarray, x: slice, o: slice) -> np.ndarray:
    """Returns the blocks `x` of the outputs `o`, `[X, block, O]`."""
    piece = w[x.start * self.block : x.stop * self.block, o]
    piece = np.ascontiguousarray(piece, np.float32)
    if not np.isfinite(piece).all():
      raise UserError(f"{self.kind} cannot hold weights that are not finite")
    if piece.shape[1] == 1:
      piece = np.repeat(piece, 2, axis=1)  # see `scale_search`
    return piece.reshape(-1, self.block, piece.shape[1])

  def with_codes(
    self, parts: Parts, codes: Shaped[Array, "I O"]
  ) -> dict[str, Any]:
    blocks = codes.reshape(-1, self.block, codes.shape[-1])
    return dict(parts) | self.pack_codes(blocks)

  def pack_codes(self, codes: Any) -> dict[str, Any]:
    """Packs codes of blocks `[X, block, O]` to parts.

    Arrays are NumPy's or JAX's, like the codes.
    """
    raise NotImplementedError

  def values(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the matrix `[..., I, O]` as `decode` does, but in NumPy."""
    # Scales of a damaged file may be NaN or infinite.
    with np.errstate(invalid="ignore", over="ignore"):
      plain = self.normal_form(parts)
      if plain.codebook is None:
        codes = plain.codes.astype(np.float32) - np.float32(plain.zero)
      else:
        codes = np.array(plain.codebook, np.float32)[plain.codes]
      *lead, inputs, outputs = codes.shape
      out = codes.reshape(*lead, -1, plain.group, outputs)
      out *= plain.scale.astype(np.float32)[..., None, :]
      if plain.offset is not None:
        out += plain.offset.astype(np.float32)[..., None, :]
    return out.reshape(*lead, inputs, outputs)

  def blocks(
    self,
    x: np.ndarray,
    weight: np.ndarray | None,
    mean: np.ndarray | None,
  ) -> dict[str, np.ndarray]:
    """Encodes blocks to parts.

    Args:
      x: float32 `[X, block, O]`, finite, O at least 2.
      weight: importance of the inputs `[X, block, 1]`, or None.
      mean: mean square of each output's weights, `[O]`, given with `weight`.
    """
    raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuperBlock(Ggml):
  """A type whose groups' scales are quantized themselves."""

  block: int = 256


def _slices(size: int, step: int) -> list[slice]:
  return [slice(i, min(i + step, size)) for i in range(0, size, step)]


def _mean_square(w: np.ndarray) -> np.ndarray:
  """Returns the mean square of each column `[O]`, summed in order."""
  w = np.asarray(w, np.float32)
  total = np.zeros(w.shape[1], np.float32)
  for row in w:
    total += row * row
  return total / np.float32(len(w))


def split_groups(x: Any, size: int) -> Any:
  """Returns `[X, block / size, size, O]`, the groups of each block."""
  return x.reshape(x.shape[0], -1, size, x.shape[-1])


def merge_groups(codes: np.ndarray) -> np.ndarray:
  """Returns codes of groups as codes of blocks, `[X, block, O]`."""
  return codes.reshape(codes.shape[0], -1, codes.shape[-1])


def error_weights(
  x: np.ndarray, weight: np.ndarray, size: int, factor: float = 2.0
) -> np.ndarray:
  """Returns weights of squared errors, shaped as `split_groups(x, size)`.

  importance * sqrt(factor * mean square of the block + x**2)
  """
  mean = scale_search.total(x * x) * np.float32(factor) / np.float32(x.shape[1])
  spread = np.sqrt(mean[:, None, :] + x * x)
  return split_groups(weight * spread, size)


def to_float16(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns `x` rounded to float16, as (float16, float32)."""
  with np.errstate(over="ignore"):
    rounded = x.astype(np.float16)
  return rounded, rounded.astype(np.float32)


def merge_blocks(x: Any) -> Any:
  """Returns `[..., X n, O]` from `[..., X, n, O]`."""
  return x.reshape(*x.shape[:-3], -1, x.shape[-1])
