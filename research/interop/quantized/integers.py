"""What GPTQ's and AWQ's files can say of a matrix: integers on even grids.

    weight[i, o] = (code[i, o] - zero[g, o]) * scale[g, o],  g = group[i]

Scales are float16 and zeros are codes. A packed matrix of any format that is
such a grid in its normal form goes out as it is, ggml's Q4_0 and Q8_0 too.
"""

import dataclasses

import numpy as np

from research.quant.format import NormalForm
from research.quant.qtensor import QTensor
from research.typing import UserError


@dataclasses.dataclass(frozen=True)
class Integers:
  """A matrix, rows in the order of its inputs.

  Attributes:
    codes: uint8 `[I, O]`.
    zero: uint8 `[G, O]`.
    scale: float16 `[G, O]`.
    group: int32 `[I]`, of each input.
    size: inputs of a group.
    bits: of a code.
  """

  codes: np.ndarray
  zero: np.ndarray
  scale: np.ndarray
  group: np.ndarray
  size: int
  bits: int

  @property
  def symmetric(self) -> bool:
    """Whether all zeros are the middle code."""
    return bool((self.zero == 1 << (self.bits - 1)).all())

  @property
  def ordered(self) -> bool:
    """Whether groups are of neighbours."""
    return bool((np.diff(self.group) >= 0).all())


def to_integers(w: QTensor, where: str) -> Integers:
  """Returns one matrix `[I, O]` as integers, without loss.

  Raises:
    UserError: it is no such grid; the message names the field.
  """
  if w.lead or w.axis != -2:
    raise _unfit(where, "axis", f"{list(w.shape)}, blocks along {w.axis}")
  if w.outliers is not None:
    raise _unfit(where, "outliers", "rows in full precision")
  plain = w.normal_form()
  if plain.codebook is not None:
    raise _unfit(
      where, "codebook", f"codes of {w.format.name}, on no even grid"
    )
  if plain.offset is not None and np.asarray(plain.offset).any():
    raise _unfit(where, "offset", f"{w.format.name}, numbers added to groups")
  codes, zero = _unsigned(np.asarray(plain.codes), plain, where)
  scale = np.asarray(plain.scale)
  with np.errstate(over="ignore"):
    stored = scale.astype(np.float16)
  off = stored.astype(scale.dtype) != scale
  if off.any():
    raise _unfit(
      where, "scale", f"{scale.dtype}, {off.mean():.0%} of them no float16"
    )
  group = np.arange(w.inputs, dtype=np.int32) // plain.group
  if w.order is not None:
    order = np.asarray(w.order)
    codes, group = codes[order], group[order]
  return Integers(codes, zero, stored, group, plain.group, plain.bits)


def _unsigned(
  codes: np.ndarray, plain: NormalForm, where: str
) -> tuple[np.ndarray, np.ndarray]:
  """Returns codes and zeros `[G, O]`, both uint8, of `plain.bits` bits."""
  shape = (codes.shape[0] // plain.group, codes.shape[1])
  zero = np.broadcast_to(np.asarray(plain.zero, np.float32), shape)
  top = (1 << plain.bits) - 1
  if codes.dtype == np.int8:
    half = 1 << (plain.bits - 1)
    codes = (codes.astype(np.int16) + half).astype(np.uint8)
    zero = zero + half
  whole = np.round(zero)
  if (whole != zero).any() or whole.min() < 0 or whole.max() > top:
    raise _unfit(where, "zero", f"not all are whole numbers from 0 to {top}")
  return codes, whole.astype(np.uint8)


def _unfit(where: str, field: str, found: str) -> UserError:
  return UserError(
    f"{where}: {field} does not fit: found {found}; expected integer codes "
    "and zeros with float16 scales"
  )
