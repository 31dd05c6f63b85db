"""Packed weights in panels of 16 outputs: the layout of the CPU kernel.

A vector register holds 16 outputs, one per lane, so a product needs no sum
across lanes; a 32-bit word of a lane holds 8, 4, 2 or 1 consecutive inputs.
Decoding a token then reads memory once, in order, and decodes in registers
(`panels.cc`). Any 16-entry codebook (NF4, AF4, FP4, IQ4), affine 4 bits, 8
bits, bfloat16 and float32 share the layout:

  weight[i, o] = scale[i // group, o] * code[i, o] + offset[i // group, o]

where a 4-bit code stands for its codebook entry. An integer zero point `z`
common to all groups becomes a codebook `c - z`; one per group becomes the
offset `-scale * z`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Num

from kernels_pallas.common import arguments

LANES = 16
"""Outputs per panel."""

AFFINE = tuple(float(code) for code in range(16))
"""The codebook in which each code is its own value."""

_SCALES = ("float32", "float16", "bfloat16")

_BITS = {"uint8": 4, "int8": 8, "bfloat16": 16, "float32": 32}
"""Bits per code in memory, by the dtype in `pack` and `unpack`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Panels:
  """A matrix `[I, O]` in panels, with any leading axes; see `pack`.

  Attributes:
    words: uint32 `[..., P, I' bits / 32, 16]`, `I'` the inputs padded to whole
      groups, `P` panels of 16 outputs, the last one zero-padded.
    scale: `[..., P, I' / group, 16]`, or None.
    offset: the same shape, or None.
    inputs, outputs: `I`, `O`.
    bits: per code, 4, 8, 16 or 32.
    group: inputs that share a scale; all of them without scales.
    codebook: values of 4-bit codes, else empty.
  """

  words: Any
  scale: Any
  offset: Any
  inputs: int = dataclasses.field(metadata=dict(static=True))
  outputs: int = dataclasses.field(metadata=dict(static=True))
  bits: int = dataclasses.field(metadata=dict(static=True))
  group: int = dataclasses.field(metadata=dict(static=True))
  codebook: tuple[float, ...] = dataclasses.field(
    default=(), metadata=dict(static=True)
  )

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.words.shape[:-3], self.inputs, self.outputs)

  @property
  def padded(self) -> int:
    """Returns the number of inputs with padding."""
    return self.words.shape[-2] * (32 // self.bits)


def pack(
  codes: Num[Array, "... I O"] | np.ndarray,
  scale: Float[Array, "... X O"] | np.ndarray | None = None,
  offset: Float[Array, "... X O"] | np.ndarray | None = None,
  *,
  group: int | None = None,
  codebook: Sequence[float] = AFFINE,
) -> Panels:
  """Returns the matrix in panels; `unpack` inverts it exactly.

  Args:
    codes: uint8 below 16 (4 bits), int8 (8 bits), or weights in bfloat16 or
      float32 (16 or 32 bits), which have no scale.
    scale: of groups of inputs, in float32, float16 or bfloat16.
    offset: added to a group's weights; may have another dtype than the scale.
    group: inputs per scale, a multiple of 8 (4 bits) or 4 (8 bits); by default
      `I / X`. The last group may be shorter.
    codebook: 16 values of the 4-bit codes.

  Raises:
    ValueError: types or shapes do not match.
  """
  bits = _BITS.get(str(codes.dtype))
  if bits is None or codes.ndim < 2 or 0 in codes.shape:
    raise ValueError(
      f"codes: found {codes.dtype} {codes.shape}, expected uint8 (4 bits), "
      "int8 (8 bits), bfloat16 or float32, [..., inputs, outputs]"
    )
  if bits == 4:
    check_range(codes)
  *lead, inputs, outputs = codes.shape
  per_word = 32 // bits
  if scale is None:
    group = -(-inputs // per_word) * per_word
  group = _check_scales(codes, scale, offset, group, per_word)
  if bits == 4 and (len(codebook) != 16 or not np.isfinite(codebook).all()):
    raise ValueError(f"codebook: found {codebook}, expected 16 finite numbers")
  groups = -(-inputs // group)
  raw = jnp.asarray(codes)
  if bits > 4:
    raw = jax.lax.bitcast_convert_type(raw, f"uint{bits}")
  raw = _in_panels(raw.astype(jnp.uint32), groups * group)
  raw = raw.reshape(*raw.shape[:-2], -1, per_word, LANES)
  shifts = bits * jnp.arange(per_word, dtype=jnp.uint32)[:, None]
  return Panels(
    words=jnp.sum(raw << shifts, axis=-2, dtype=jnp.uint32),
    scale=None if scale is None else _in_panels(jnp.asarray(scale), groups),
    offset=None if offset is None else _in_panels(jnp.asarray(offset), groups),
    inputs=inputs,
    outputs=outputs,
    bits=bits,
    group=group,
    codebook=tuple(map(float, codebook)) if bits == 4 else (),
  )


def check_range(codes: Num[Array, "... I O"] | np.ndarray) -> None:
  """Raises ValueError if codes, where known, are not of 4 bits."""
  if not arguments.has_values(codes):
    return
  with jax.ensure_compile_time_eval():
    most = int(codes.max())
  if most > 15:
    raise ValueError(f"codes: found {most}, expected 4 bits, 0 to 15")


def _check_scales(codes, scale, offset, group, per_word) -> int:
  """Returns the number of inputs per scale."""
  *lead, inputs, outputs = codes.shape
  if scale is None and offset is not None:
    raise ValueError("offset: given without a scale")
  floats = jnp.issubdtype(codes.dtype, jnp.floating)
  if floats and scale is not None:
    raise ValueError(f"scale: found one, but {codes.dtype} weights have none")
  if not floats and scale is None:
    raise ValueError(f"scale: missing, needed by {codes.dtype} codes")
  if group is None:
    group = inputs // max(scale.shape[-2], 1)
    if scale.ndim < 2 or inputs % scale.shape[-2]:
      raise ValueError(
        f"scale: found {scale.shape}, expected a divisor of {inputs} inputs on "
        "axis -2; or give group"
      )
  if group < 1 or group % per_word:
    raise ValueError(
      f"group: found {group}, expected a positive multiple of {per_word}"
    )
  want = (*lead, -(-inputs // group), outputs)
  for name, part in (("scale", scale), ("offset", offset)):
    if part is not None and (part.shape, str(part.dtype) in _SCALES) != (
      want,
      True,
    ):
      raise ValueError(
        f"{name}: found {part.dtype} {part.shape}, expected {want} in one of "
        f"{', '.join(_SCALES)}"
      )
  return group


def _in_panels(x: Array, rows: int) -> Array:
  """Reshapes `[..., I, O]` to zero-padded `[..., P, rows, 16]`."""
  *lead, inputs, outputs = x.shape
  pad = ((0, 0),) * len(lead)
  x = jnp.pad(x, (*pad, (0, rows - inputs), (0, -outputs % LANES)))
  return jnp.swapaxes(x.reshape(*lead, rows, -1, LANES), -3, -2)


def _whole(x: Array, inputs: int, outputs: int) -> Array:
  """Inverts `_in_panels`."""
  x = jnp.swapaxes(x, -3, -2)
  return x.reshape(*x.shape[:-2], -1)[..., :inputs, :outputs]


def _codes(w: Panels) -> Array:
  """Returns codes `[..., P, I', 16]`, uint8, int8, bfloat16 or float32."""
  per_word = 32 // w.bits
  shifts = w.bits * jnp.arange(per_word, dtype=jnp.uint32)[:, None]
  codes = w.words[..., None, :] >> shifts
  codes = codes.reshape(*w.words.shape[:-2], -1, w.words.shape[-1])
  if w.bits == 4:
    return (codes & 15).astype(jnp.uint8)
  codes = codes.astype(f"uint{w.bits}")
  kinds = {bits: name for name, bits in _BITS.items()}
  return jax.lax.bitcast_convert_type(codes, kinds[w.bits])


def unpack(
  w: Panels,
) -> tuple[
  Num[Array, "... I O"],
  Float[Array, "... X O"] | None,
  Float[Array, "... X O"] | None,
]:
  """Returns `(codes, scale, offset)` as given to `pack`."""
  groups = -(-w.inputs // w.group)

  def part(x):
    return None if x is None else _whole(x, groups, w.outputs)

  codes = _whole(_codes(w), w.inputs, w.outputs)
  return codes, part(w.scale), part(w.offset)


def concatenate(parts: Sequence[Panels]) -> Panels | None:
  """Concatenates matrices `[I, O]` to `[I, O1 + O2 + ...]`, without repacking.

  Returns None if they differ in anything but their outputs, or if one other
  than the last ends inside a panel.
  """

  def kind(w: Panels):
    leaves, names = jax.tree.flatten(dataclasses.replace(w, outputs=0))
    shapes = [(*x.shape[:-3], *x.shape[-2:], str(x.dtype)) for x in leaves]
    return names, shapes

  same = all(kind(w) == kind(parts[0]) for w in parts)
  if not same or any(w.outputs % LANES for w in parts[:-1]):
    return None

  def joined(*arrays):
    return jnp.concatenate(arrays, axis=-3)

  outputs = sum(w.outputs for w in parts)
  alike = [dataclasses.replace(w, outputs=outputs) for w in parts]
  return jax.tree.map(joined, *alike)


def values(w: Panels) -> Float[Array, "... I lanes"]:
  """Returns the dequantized float32 weights in panels, with padding."""
  codes = _codes(w)
  if w.bits == 4:
    codes = _looked_up(codes, w.codebook)
  x = codes.astype(jnp.float32)
  if w.scale is None:
    return x
  whole = x.shape
  x = x.reshape(*whole[:-2], -1, w.group, whole[-1])
  x *= w.scale.astype(jnp.float32)[..., None, :]
  if w.offset is not None:
    x += w.offset.astype(jnp.float32)[..., None, :]
  return x.reshape(whole)


def _looked_up(codes: Integer[Array, "..."], codebook: Sequence[float]):
  """Returns each code's entry, float32; by arithmetic if consecutive."""
  first = codebook[0]
  if all(entry == first + i for i, entry in enumerate(codebook)):
    return codes.astype(jnp.float32) + jnp.float32(first)
  return jnp.take(jnp.asarray(codebook, jnp.float32), codes.astype(jnp.int32))


def dense(w: Panels) -> Float[Array, "... I O"]:
  """Returns the dequantized float32 matrix."""
  return _whole(values(w), w.inputs, w.outputs)


def take(w: Panels, ids: Int[Array, "..."]) -> Float[Array, "... I"]:
  """Returns columns `ids` of a matrix, float32; decodes only those."""
  flat = ids.reshape(-1)

  def lane(part):
    return part[flat // LANES, :, flat % LANES][..., None]

  found = values(jax.tree.map(lane, w))[..., : w.inputs, 0]
  return found.reshape(*ids.shape, w.inputs)
