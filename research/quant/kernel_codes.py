"""Packed matrices as the kernels' layouts take them: codes, scales, offsets."""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.quantized_matmul.panels import AFFINE
from research.quant.qtensor import QTensor
from research.typing import Array, Int


def group(w: QTensor) -> int:
  """Returns how many inputs share a scale."""
  scale = jax.eval_shape(lambda w: w.plain().scale, w)
  return w.inputs // scale.shape[-2]


def bits(w: QTensor) -> int | None:
  """Returns how wide a code is for kernels, None if none is wide enough."""
  found = {}

  def look(w):
    plain = w.plain()
    found.update(bits=plain.bits, codebook=plain.codebook)
    return plain.codes

  jax.eval_shape(look, w)
  if found["bits"] <= 4:
    return 4
  return 8 if found["codebook"] is None else None


def source_of(w: QTensor) -> Int[Array, "... I"] | None:
  """Returns the matrix' row that each stored row is, None for its own."""
  if w.order is None:
    return None
  return jnp.argsort(w.order, axis=-1).astype(jnp.int32)


def normal(w: QTensor) -> tuple[Any, Any, Any, dict[str, Any]]:
  """Returns (codes, scale, offset, options), as kernels' layouts are packed."""
  plain = w.plain()
  one = isinstance(plain.zero, float)
  codes, offset, book = plain.codes, plain.offset, AFFINE
  if not one:
    offset = plain.shift()
  if plain.bits <= 4:
    if plain.codebook is not None:
      book = tuple(plain.codebook)
    book = tuple(code - plain.zero for code in book) if one else book
    book += (0.0,) * (16 - len(book))
  elif codes.dtype == jnp.uint8:
    # Codes of 8 bits are signed there; what was taken off is in the offset.
    least = int(plain.zero) if one else 128
    if plain.bits == 8 and least != 128:
      raise ValueError(f"a zero of {least} does not fit codes of 8 bits")
    codes = (codes.astype(jnp.int16) - least).astype(jnp.int8)
    if not one:
      offset = offset + least * plain.scale.astype(jnp.float32)
  return codes, plain.scale, offset, dict(group=plain.group, codebook=book)
