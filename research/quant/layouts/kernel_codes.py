"""Converts packed matrices to the operands of kernel layouts.

The operands are codes, scales and offsets."""

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.quantized_matmul.cpu.panels import AFFINE
from research.quant.format import NormalForm
from research.quant.qtensor import QTensor
from research.typing import Array, Int


@dataclasses.dataclass(frozen=True)
class Kind:
  """Properties of a packed matrix that decide which layouts support it.

  Attributes:
    bits: bits of a code in the layout, 4 or 8.
    group: number of inputs that share a scale.
  """

  bits: int
  group: int


def kind(w: QTensor) -> Kind | None:
  """Returns the kind of `kernel_operands(w)`; None if no kernel supports it.

  Kernels support neither outlier rows nor codebooks of more than 16 values.
  """
  if w.outliers is not None:
    return None
  found = []

  def look(w):
    plain = w.normal_form()
    if plain.codebook is None or _is_narrow(plain):
      found.append(Kind(4 if _is_narrow(plain) else 8, plain.group))
    return plain.codes

  jax.eval_shape(look, w)
  return found[0] if found else None


def source_rows(w: QTensor) -> Int[Array, "... I"] | None:
  """Returns the index in the matrix of each stored row; None if unpermuted."""
  if w.order is None:
    return None
  return jnp.argsort(w.order, axis=-1).astype(jnp.int32)


def kernel_operands(w: QTensor) -> tuple[Any, Any, Any, dict[str, Any]]:
  """Returns (codes, scale, offset, options) for packing a kernel's layout.

  Args:
    w: a packed matrix with a `kind`.
  """
  plain = w.normal_form()
  codes, offset, book = plain.codes, plain.offset, AFFINE
  one = isinstance(plain.zero, float)
  if _is_narrow(plain):
    if plain.codebook is not None:
      book = tuple(plain.codebook)
    book = tuple(code - plain.zero for code in book) if one else book
    book += (0.0,) * (16 - len(book))
    offset = offset if one else plain.shift()
  else:
    # 8-bit codes are signed in kernels. The offset compensates the value that
    # is subtracted from them, unless it equals the zero point.
    least = _least(plain)
    if codes.dtype == jnp.uint8:
      codes = (codes.astype(jnp.int16) - least).astype(jnp.int8)
    if not one or plain.zero != least:
      offset = least * plain.scale.astype(jnp.float32)
      shift = plain.shift()
      offset = offset if shift is None else shift + offset
  return codes, plain.scale, offset, dict(group=plain.group, codebook=book)


def _is_narrow(plain: NormalForm) -> bool:
  return plain.bits <= 4 and plain.codes.dtype == jnp.uint8


def _least(plain: NormalForm) -> int:
  """Returns the value to subtract from codes of over 4 bits to sign them."""
  if plain.codes.dtype == jnp.int8:
    return 0
  zero = plain.zero
  whole = isinstance(zero, float) and zero.is_integer()
  if whole and 2**plain.bits - 128 <= zero <= 128:
    return int(zero)
  return 128


def name(w: QTensor) -> str:
  """Returns the name of `w` in warnings."""
  return f"{w.format.name}{' with outliers' if w.outliers is not None else ''}"


def warn_unsupported(
  layout: str, device: str, names: Iterable[str], cost: str
) -> None:
  """Warns about packed matrices without a kernel; Python shows it once.

  Args:
    names: names of the matrices' formats; none for no warning.
    cost: phrase that says how much slower they are than which others.
  """
  names = ", ".join(sorted(names))
  if names:
    warnings.warn(
      f"{layout}: no kernel for {device} multiplies {names}; such matrices are "
      f"decoded for every product, {cost}",
      RuntimeWarning,
      stacklevel=3,
    )
