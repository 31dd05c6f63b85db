"""compressed-tensors: the tensors of one module, as vLLM and its tools have it.

Weights are `[out, in]`. `pack-quantized` codes are a stream of bits along the
inputs, in int32 words, without gaps: a code may straddle two words. The zero
points of groups are such a stream along the outputs. Half their range is taken
off codes. NVFP4's scale of a matrix divides: `code * scale / global`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from research.interop.quantized.compressed_config import Scheme
from research.quant.format import Format
from research.quant.formats.affine import Affine
from research.quant.formats.fp8 import FP8
from research.quant.formats.microscaling import Microscaling
from research.quant.formats.nvfp4 import NVFP4
from research.quant.layouts import bitstream, packing
from research.quant.numerics import minifloats
from research.quant.qtensor import QTensor
from research.typing import UserError

_MOST = 2**31
_FLOATS = ("float32", "bfloat16", "float16")
_UNUSED = ("input_scale", "input_zero_point", "input_global_scale")
"""What rounds activations by calibration, which is not done here."""

KV_SCALES = re.compile(
  r".*\.self_attn\.([kv]_proj\.output|[qkv])_(scale|zero_point)"
)
"""Tensors of a quantized KV cache, old spelling and new."""

NAMES = (
  *("weight", "weight_packed", "weight_scale", "weight_shape"),
  *("weight_zero_point", "weight_g_idx", "weight_global_scale"),
  *("weight_scale_2", "output_scale", "output_zero_point", *_UNUSED),
)

ELEMENTS = {
  "mxfp4-pack-quantized": "e2m1",
  "mxfp6-pack-quantized": "e2m3",
  "mxfp8-quantized": "e4m3",
}
"""What formats of microscaling have for elements."""


def from_tensors(
  tensors: Mapping[str, np.ndarray],
  scheme: Scheme,
  where: str = "module",
  of: str | None = None,
) -> QTensor:
  """Returns one matrix `[I, O]`; inverts `to_tensors`.

  Args:
    of: dtype of the decoded matrix; by default its scales', if that is one of
      a model's, else float32.

  Raises:
    UserError: a tensor is missing, unknown, or does not fit the others.
  """
  given = _Tensors(tensors, scheme, where)
  read = {"int": _from_int, "float": _from_fp8}[scheme.kind]
  if scheme.format in ELEMENTS:
    read = _from_mx
  elif scheme.format == "nvfp4-pack-quantized":
    read = _from_nvfp4
  w = read(given)
  scale = str(given.get("weight_scale").dtype)
  of = of or (scale if scale in _FLOATS else "float32")
  given.check_names()
  return dataclasses.replace(w, of=of)


class _Tensors:
  """The tensors of one module; a wrong one is a UserError that names it."""

  def __init__(self, tensors, scheme, where):
    self.tensors, self.scheme, self.where = tensors, scheme, where
    self.used = set()
    if "weight_scale_2" in tensors:
      raise UserError(
        f"{where}: weight_scale_2 is ModelOpt's scale of a matrix, the "
        "reciprocal of weight_global_scale; convert the checkpoint first"
      )

  def get(self, name: str, *kinds: str) -> np.ndarray:
    if name not in self.tensors:
      raise UserError(
        f"{self.where}: {name} is missing, which {self.scheme.format} has"
      )
    self.used.add(name)
    found = np.asarray(self.tensors[name])
    if kinds and str(found.dtype) not in kinds:
      raise self.wrong(name, found, " or ".join(kinds))
    return found

  def wrong(self, name: str, found: np.ndarray, expected: str) -> UserError:
    shape = list(found.shape)
    return UserError(
      f"{self.where}: {name} is {found.dtype} {shape}, expected {expected}"
    )

  def matrix(self, name: str, *kinds: str) -> np.ndarray:
    found = self.get(name, *kinds)
    if found.ndim != 2 or 0 in found.shape:
      raise self.wrong(name, found, "a matrix [out, in]")
    return found

  def shaped(self, name: str, shape: tuple[int, ...], *kinds: str):
    """Returns a tensor of a shape, or of one that differs by axes of one."""
    found = self.get(name, *kinds)
    if [n for n in found.shape if n != 1] != [n for n in shape if n != 1]:
      raise self.wrong(name, found, f"{list(shape)}, by the weight's shape")
    return found.reshape(shape)

  def scale(self, name: str, shape: tuple[int, ...], *kinds: str):
    """Returns scales, all of them finite and none negative."""
    found = self.shaped(name, shape, *(kinds or _FLOATS))
    numbers = found.astype(np.float32)
    if not np.isfinite(numbers).all() or (numbers < 0).any():
      raise UserError(
        f"{self.where}: {name} is not finite or is negative, expected scales"
      )
    return found

  def scales_shape(self, outputs: int, inputs: int) -> tuple[int, ...]:
    scheme = self.scheme
    if scheme.strategy == "tensor":
      return (1,)
    if scheme.strategy == "channel":
      return (outputs, 1)
    if scheme.strategy == "block":
      rows, columns = scheme.tile
      return (-(-outputs // rows), -(-inputs // columns))
    if inputs % scheme.group:
      raise UserError(
        f"{self.where}: {inputs} inputs are no multiple of the group of "
        f"{scheme.group}"
      )
    return (outputs, inputs // scheme.group)

  def check_names(self) -> None:
    unknown = sorted(set(self.tensors) - self.used - {*_UNUSED})
    zero = np.asarray(self.tensors.get("weight_zero_point", 1))
    if unknown == ["weight_zero_point"] and not zero.astype(bool).any():
      return  # older writers leave them there
    if unknown:
      raise UserError(
        f"{self.where}: {unknown[0]} is not a tensor of "
        f"{self.scheme.format} with this scheme"
      )


def _from_int(given: _Tensors) -> QTensor:
  scheme = given.scheme
  if scheme.format == "pack-quantized":
    outputs, inputs = _shape(given)
    words = (outputs, -(-inputs * scheme.bits // 32))
    packed = given.shaped("weight_packed", words, "int32")
    codes = bitstream.unpack(_transposed(packed), scheme.bits, inputs)
  else:
    codes = given.matrix("weight", "int8")
    outputs, inputs = codes.shape
    codes = _unsigned(given, "weight", codes).T
  shape = given.scales_shape(outputs, inputs)
  scale = given.scale("weight_scale", shape)
  block = scheme.group or inputs
  format = Affine(
    block=block,
    bits=scheme.bits,
    symmetric=scheme.symmetric,
    scale_dtype=str(scale.dtype),
  ).for_shape(inputs, outputs)
  order = None
  if scheme.act_order:
    order, stored = _order(given, inputs, block)
    codes = codes[stored]

  def grouped(x):
    return _transposed(np.broadcast_to(x, (outputs, inputs // block)))

  zero = None if scheme.symmetric else grouped(_zero(given, shape, outputs))
  parts = format.pack_parts(_blocks(codes, block), grouped(scale), zero)
  return _made(parts, format, inputs, outputs, order=order)


def _shape(given: _Tensors) -> tuple[int, int]:
  found = given.shaped("weight_shape", (2,), "int64", "int32")
  outputs, inputs = map(int, found)
  if min(outputs, inputs) < 1 or outputs * inputs > _MOST * 8:
    raise UserError(
      f"{given.where}: weight_shape says [{outputs}, {inputs}], expected the "
      "shape of the weight"
    )
  return outputs, inputs


def _unsigned(given: _Tensors, name: str, codes: np.ndarray) -> np.ndarray:
  """Returns signed codes, int8, with half their range added, uint8."""
  half = 1 << (given.scheme.bits - 1)
  if codes.min() < -half or codes.max() >= half:
    raise UserError(
      f"{given.where}: {name} has codes from {codes.min()} to {codes.max()}, "
      f"expected those of {given.scheme.bits} bits"
    )
  return (codes.astype(np.int16) + half).astype(np.uint8)


def _zero(given: _Tensors, shape: tuple[int, ...], outputs: int) -> np.ndarray:
  scheme = given.scheme
  if scheme.format == "pack-quantized" and scheme.strategy != "tensor":
    words = (-(-outputs * scheme.bits // 32), shape[1])
    packed = given.shaped("weight_zero_point", words, "int32")
    return bitstream.unpack(packed, scheme.bits, outputs)
  zero = given.shaped("weight_zero_point", shape, "int8")
  return _unsigned(given, "weight_zero_point", zero)


def _order(
  given: _Tensors, inputs: int, block: int
) -> tuple[np.ndarray | None, Any]:
  """Returns (order, input of each stored row) of groups of any inputs."""
  group = given.shaped("weight_g_idx", (inputs,), "int32", "int64")
  if (group == -1).all():  # never set: groups of neighbours
    return None, slice(None)
  count = inputs // block
  within = group.min() >= 0 and group.max() < count
  if not within or (np.bincount(group, minlength=count) != block).any():
    raise UserError(
      f"{given.where}: weight_g_idx does not give each of {count} groups "
      f"{block} inputs"
    )
  stored = np.argsort(group, kind="stable")
  if (stored == np.arange(inputs)).all():
    return None, slice(None)
  order = np.empty(inputs, np.int32)
  order[stored] = np.arange(inputs, dtype=np.int32)
  return order, stored


def _from_fp8(given: _Tensors) -> QTensor:
  scheme = given.scheme
  codes = given.matrix("weight", "float8_e4m3fn").view(np.uint8)
  outputs, inputs = codes.shape
  if (codes & 127 == minifloats.E4M3.nan).any():
    raise UserError(f"{given.where}: weight has values that are not numbers")
  shape = given.scales_shape(outputs, inputs)
  scale = given.scale("weight_scale", shape).T
  share, tile = scheme.strategy, (128, 128)
  if share in ("tensor", "channel"):
    scale = scale[0]
  else:
    share, tile = "tile", scheme.tile or (1, scheme.group)
  format = FP8(
    share=share,
    tile_inputs=tile[1],
    tile_outputs=tile[0],
    scale_dtype=str(scale.dtype),
  )
  parts = {"codes": _transposed(codes), "scale": np.array(scale, order="C")}
  return _made(parts, format, inputs, outputs)


def _from_mx(given: _Tensors) -> QTensor:
  scheme = given.scheme
  format = Microscaling(block=scheme.group, element=ELEMENTS[scheme.format])
  if format.bits == 8:
    codes = given.matrix("weight", "float8_e4m3fn").view(np.uint8)
  else:
    codes = _unpacked(given, format.bits)
  outputs, inputs = codes.shape
  shape = given.scales_shape(outputs, inputs)
  kinds = ("uint8", "float8_e8m0fnu")
  scale = given.shaped("weight_scale", shape, *kinds).view(np.uint8)
  if (scale == minifloats.NAN).any():
    raise UserError(f"{given.where}: weight_scale has one that is no number")
  blocks = _blocks(codes.T, format.block)
  parts = {
    "codes": packing.pack(blocks, format.bits),
    "scale": _transposed(scale),
  }
  return _made(parts, format, inputs, outputs)


def _from_nvfp4(given: _Tensors) -> QTensor:
  codes = _unpacked(given, 4)
  outputs, inputs = codes.shape
  shape = given.scales_shape(outputs, inputs)
  scale = given.scale("weight_scale", shape, "float8_e4m3fn")
  divisor = given.scale("weight_global_scale", (1,), "float32")
  if divisor[0] < 1:
    # Weights are below 448 * 6 over it: none are above 2688.
    raise UserError(
      f"{given.where}: weight_global_scale is {divisor[0]:.4g}, expected at "
      "least 1: it divides; this looks like the reciprocal, as ModelOpt's is"
    )
  format = NVFP4()
  parts = {
    "codes": packing.pack(_blocks(codes.T, format.block), 4),
    "scale": _transposed(scale.view(np.uint8)),
    "divisor": divisor[0],
  }
  return _made(parts, format, inputs, outputs)


def _unpacked(given: _Tensors, bits: int) -> np.ndarray:
  packed = given.matrix("weight_packed", "uint8")
  if packed.shape[1] % 4:
    raise given.wrong("weight_packed", packed, "whole groups")
  words = np.ascontiguousarray(packed).view("<i4")
  count = 8 * packed.shape[1] // bits
  return bitstream.unpack(_transposed(words), bits, count).T


def _blocks(codes: np.ndarray, block: int) -> np.ndarray:
  """Returns codes `[I, O]` as `[X, block, O]`."""
  return np.ascontiguousarray(codes).reshape(-1, block, codes.shape[1])


def _made(parts, format, inputs, outputs, **more) -> QTensor:
  parts = {name: np.asarray(x) for name, x in parts.items()}
  return QTensor(parts, format=format, inputs=inputs, outputs=outputs, **more)


def _transposed(x: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(x.T)


def scheme_of(w: QTensor, form: str | None = None) -> Scheme:
  """Returns the scheme of a matrix as it is.

  Raises:
    UserError: compressed-tensors has no such matrix.
  """
  if w.outliers is not None:
    raise UserError(
      f"compressed-tensors: {w.format.name} with outliers in full precision "
      "does not fit; quantize without them"
    )
  format = w.format
  if w.order is not None and not isinstance(format, Affine):
    raise _unfit(format, "order", "with rows out of their order")
  if isinstance(format, Affine):
    if not format.symmetric and format.zero != "int":
      raise _unfit(format, "zero", "with zeros that are no integers")
    whole = format.block == w.inputs and w.order is None
    return Scheme(
      form or "pack-quantized",
      format.bits,
      format.symmetric,
      "channel" if whole else "group",
      None if whole else format.block,
      act_order=w.order is not None,
    )
  if isinstance(format, FP8) and format.element == "e4m3":
    tile, group = (format.tile_outputs, format.tile_inputs), None
    share = "block" if format.share == "tile" else format.share
    return Scheme(
      "float-quantized",
      8,
      True,
      share,
      group,
      tile if share == "block" else None,
    )
  if isinstance(format, NVFP4) and format.block == 16:
    return Scheme("nvfp4-pack-quantized", 4, True, "tensor_group", 16)
  if isinstance(format, Microscaling) and format.block == 32:
    for form, element in ELEMENTS.items():
      if element == format.element:
        return Scheme(form, format.bits, group=32)
  raise _unfit(format, "format", "as it is")


def _unfit(format: Format, field: str, why: str) -> UserError:
  return UserError(
    f"compressed-tensors: {field}: {format.name} {why} does not fit; quantize "
    "to Affine with integer zeros, FP8 (e4m3), NVFP4 or Microscaling (e2m1, "
    "e2m3, e4m3)"
  )


def to_tensors(
  w: QTensor, scheme: Scheme | None = None
) -> dict[str, np.ndarray]:
  """Returns the tensors of one matrix by their names behind `P.`, lossless.

  Args:
    scheme: that its config will say; by default `scheme_of(w)`.

  Raises:
    UserError: compressed-tensors has no such matrix.
  """
  own = scheme_of(w)
  scheme = scheme or own
  if w.lead or w.axis != -2:
    raise UserError(
      f"compressed-tensors: found {list(w.shape)} with blocks along axis "
      f"{w.axis}, expected one matrix [inputs, outputs]"
    )
  parts = {name: np.asarray(x) for name, x in w.parts.items()}
  if isinstance(w.format, Affine):
    return _int_tensors(w, scheme)
  if isinstance(w.format, FP8):
    shape = {"tensor": (1,), "channel": (w.outputs, 1)}
    scale = parts["scale"].T
    return {
      "weight": _transposed(parts["codes"]).view(ml_dtypes.float8_e4m3fn),
      "weight_scale": scale.reshape(shape.get(w.format.share, scale.shape)),
    }
  bits, scale = (4, _transposed(parts["scale"]))
  if isinstance(w.format, Microscaling):
    bits = w.format.bits
  codes = packing.unpack(parts["codes"], bits).reshape(w.inputs, w.outputs)
  if bits == 8:
    codes = _transposed(codes).view(ml_dtypes.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}
  packed = _transposed(bitstream.pack(codes, bits)).view(np.uint8)
  if isinstance(w.format, Microscaling):
    return {"weight_packed": packed, "weight_scale": scale}
  return {
    "weight_packed": packed,
    "weight_scale": scale.view(ml_dtypes.float8_e4m3fn),
    "weight_global_scale": parts["divisor"].reshape(1),
  }


def _int_tensors(w: QTensor, scheme: Scheme) -> dict[str, np.ndarray]:
  format, half = w.format, 1 << (w.format.bits - 1)
  plain = format.normal_form(w.parts)
  codes = np.asarray(plain.codes)
  out: dict[str, Any] = {}
  if w.order is not None:
    order = np.asarray(w.order)
    codes = codes[order]
    out["weight_g_idx"] = (order // format.block).astype(np.int32)
  packed = scheme.format == "pack-quantized"
  if packed:
    out["weight_packed"] = _transposed(bitstream.pack(codes, format.bits))
    out["weight_shape"] = np.asarray([w.outputs, w.inputs], np.int64)
  else:
    signed = codes.astype(np.int16) - half
    out["weight"] = _transposed(signed.astype(np.int8))
  scale = _transposed(np.asarray(w.parts["scale"]))
  zero = None if format.symmetric else _transposed(np.asarray(plain.zero))
  if scheme.strategy == "tensor":
    scale = _same(scale, w, "scale")
    zero = None if zero is None else _same(zero, w, "zero")
  out["weight_scale"] = scale
  if zero is not None and packed and scheme.strategy != "tensor":
    out["weight_zero_point"] = bitstream.pack(zero, format.bits)
  elif zero is not None:
    out["weight_zero_point"] = (zero.astype(np.int16) - half).astype(np.int8)
  return out


def _same(x: np.ndarray, w: QTensor, name: str) -> np.ndarray:
  """Returns the one value of an array, `[1]`."""
  if (x != x.flat[0]).any():
    raise UserError(
      f"compressed-tensors: {name} of {w.format.name} differs within the "
      "matrix, and the strategy is 'tensor'; expected 'channel' or 'group'"
    )
  return x.reshape(-1)[:1]
