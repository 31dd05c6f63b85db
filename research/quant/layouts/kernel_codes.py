"""Packed matrices as the kernels' layouts take them: codes, scales, offsets."""

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.quantized_matmul.cpu.panels import AFFINE
from research.quant.format import Plain
from research.quant.qtensor import QTensor
from research.typing import Array, Int


@dataclasses.dataclass(frozen=True)
class Kind:
  """What of a packed matrix decides which layout holds it.

  Attributes:
    bits: of a code there, 4 or 8.
    group: inputs that share a scale.
  """

  bits: int
  group: int


def kind(w: QTensor) -> Kind | None:
  """Returns what `normal` makes of `w`, None for what no kernel holds.

  Those are rows in other precision and codebooks of more than 16 values.
  """
  if w.outliers is not None:
    return None
  found = []

  def look(w):
    plain = w.plain()
    if plain.codebook is None or _is_narrow(plain):
      found.append(Kind(4 if _is_narrow(plain) else 8, plain.group))
    return plain.codes

  jax.eval_shape(look, w)
  return found[0] if found else None


def source_of(w: QTensor) -> Int[Array, "... I"] | None:
  """Returns the matrix' row that each stored row is, None for its own."""
  if w.order is None:
    return None
  return jnp.argsort(w.order, axis=-1).astype(jnp.int32)


def normal(w: QTensor) -> tuple[Any, Any, Any, dict[str, Any]]:
  """Returns (codes, scale, offset, options), as kernels' layouts are packed.

  Args:
    w: of some `kind`.
  """
  plain = w.plain()
  codes, offset, book = plain.codes, plain.offset, AFFINE
  one = isinstance(plain.zero, float)
  if _is_narrow(plain):
    if plain.codebook is not None:
      book = tuple(plain.codebook)
    book = tuple(code - plain.zero for code in book) if one else book
    book += (0.0,) * (16 - len(book))
    offset = offset if one else plain.shift()
  else:
    # Codes of 8 bits are signed there; what was taken off is in the offset,
    # unless it is the zero itself.
    least = _least(plain)
    if codes.dtype == jnp.uint8:
      codes = (codes.astype(jnp.int16) - least).astype(jnp.int8)
    if not one or plain.zero != least:
      offset = least * plain.scale.astype(jnp.float32)
      shift = plain.shift()
      offset = offset if shift is None else shift + offset
  return codes, plain.scale, offset, dict(group=plain.group, codebook=book)


def _is_narrow(plain: Plain) -> bool:
  return plain.bits <= 4 and plain.codes.dtype == jnp.uint8


def _least(plain: Plain) -> int:
  """Returns what is taken off codes of more than 4 bits to make them signed."""
  if plain.codes.dtype == jnp.int8:
    return 0
  zero = plain.zero
  whole = isinstance(zero, float) and zero.is_integer()
  if whole and 2**plain.bits - 128 <= zero <= 128:
    return int(zero)
  return 128


def name(w: QTensor) -> str:
  """Returns what warnings call `w`."""
  return f"{w.format.name}{' with outliers' if w.outliers is not None else ''}"


def tell(layout: str, device: str, names: Iterable[str], cost: str) -> None:
  """Warns of packed matrices that no kernel multiplies; Python says it once.

  Args:
    layout: which leaves them, a word.
    device: plural, whose kernels.
    names: of the matrices' formats.
    cost: how much slower than what they are.
  """
  names = ", ".join(sorted(names))
  if names:
    warnings.warn(
      f"{layout}: no kernel for {device} multiplies {names}; such matrices are "
      f"decoded for every product, {cost}",
      RuntimeWarning,
      stacklevel=3,
    )
