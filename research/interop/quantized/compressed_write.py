"""The tensors of one module as compressed-tensors names them."""

from typing import Any

import ml_dtypes
import numpy as np

from research.interop.quantized.compressed_config import Scheme
from research.interop.quantized.compressed_tensors import ELEMENTS, turned
from research.quant.format import Format
from research.quant.formats.affine import Affine
from research.quant.formats.fp8 import FP8
from research.quant.formats.microscaling import Microscaling
from research.quant.formats.nvfp4 import NVFP4
from research.quant.layouts import bitstream, packing
from research.quant.qtensor import QTensor
from research.typing import UserError


def scheme_of(w: QTensor, form: str | None = None) -> Scheme:
  """Returns the scheme of a matrix as it is.

  Args:
    w: one matrix.
    form: of integers, `"int-quantized"` instead of `"pack-quantized"`.

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
    w: one matrix `[I, O]`.
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
      "weight": turned(parts["codes"]).view(ml_dtypes.float8_e4m3fn),
      "weight_scale": scale.reshape(shape.get(w.format.share, scale.shape)),
    }
  bits, scale = (4, turned(parts["scale"]))
  if isinstance(w.format, Microscaling):
    bits = w.format.bits
  codes = packing.unpack(parts["codes"], bits).reshape(w.inputs, w.outputs)
  if bits == 8:
    codes = turned(codes).view(ml_dtypes.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}
  packed = turned(bitstream.pack(codes, bits)).view(np.uint8)
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
    out["weight_packed"] = turned(bitstream.pack(codes, format.bits))
    out["weight_shape"] = np.asarray([w.outputs, w.inputs], np.int64)
  else:
    signed = codes.astype(np.int16) - half
    out["weight"] = turned(signed.astype(np.int8))
  scale = turned(np.asarray(w.parts["scale"]))
  zero = None if format.symmetric else turned(np.asarray(plain.zero))
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
      f"compressed-tensors: {name} of {w.format.name} is not one of the whole "
      "matrix, as the strategy 'tensor' says; expected 'channel' or 'group'"
    )
  return x.reshape(-1)[:1]
