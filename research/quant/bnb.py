"""bitsandbytes' 4-bit tensors, as its state dicts and safetensors have them.

A module `P` has `P.weight`, two codes a byte, high nibble first, along the rows
of `[out, in]`; its magnitudes and tables under `P.weight.*`, and the rest as
JSON in the bytes of `P.weight.quant_state.bitsandbytes__nf4`.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from research.quant import codebooks
from research.quant.formats.codebook import (
  BLOCKS,
  NESTED,
  Codebook,
  FlatCodebook,
)
from research.quant.qtensor import QTensor
from research.training.adam8bit import dynamic_map
from research.typing import UserError

_STATE = "quant_state.bitsandbytes__"
_DTYPES = ("float32", "bfloat16", "float16")
_MOST_JSON = 4096


def to_state_dict(w: QTensor) -> dict[str, np.ndarray]:
  """Returns the tensors of one matrix by their names behind `P.`.

  Args:
    w: one matrix `[I, O]`.
  """
  name, parts, format = "weight", {}, w.format
  parts[name] = _bytes(w)[:, None]
  top = np.asarray(w.parts["top"])
  flat = isinstance(format, FlatCodebook)
  parts[f"{name}.absmax"] = (top if flat else top.T).reshape(-1)
  parts[f"{name}.quant_map"] = codebooks.table(format.kind)
  said: dict[str, Any] = dict(
    quant_type=format.kind,
    blocksize=format.block,
    dtype=w.of,
    shape=[w.outputs, w.inputs],
  )
  if format.nested:
    parts[f"{name}.nested_absmax"] = np.asarray(w.parts["nested"])
    parts[f"{name}.nested_quant_map"] = dynamic_map(True)
    said |= dict(
      nested_blocksize=NESTED,
      nested_dtype="float32",
      nested_offset=float(w.parts["mean"]),
    )
  text = json.dumps(said).encode()
  parts[f"{name}.{_STATE}{format.kind}"] = np.frombuffer(text, np.uint8)
  return parts


def _bytes(w: QTensor) -> np.ndarray:
  """Returns the codes as bitsandbytes packs them, uint8 `[bytes]`."""
  codes = np.asarray(w.parts["codes"])
  if isinstance(w.format, FlatCodebook):
    return codes
  codes = np.concatenate([codes & 15, codes >> 4], axis=-2)
  codes = codes.transpose(2, 0, 1).reshape(-1, 2)
  return (codes[:, 0] << 4) | codes[:, 1]


def from_state_dict(
  tensors: Mapping[str, np.ndarray], where: str = "state dict"
) -> QTensor:
  """Returns one matrix; inverts `to_state_dict`.

  Args:
    tensors: of one module, by their names behind `P.`.
    where: they come from, for messages.

  Raises:
    UserError: a tensor is missing or does not fit the others.
  """
  said = _said(tensors, where)
  kind, block = said["quant_type"], said["blocksize"]
  outputs, inputs = said["shape"]
  total = inputs * outputs
  count = -(-total // block)
  codes = _tensor(tensors, "weight", (-(-total // 2),), where)
  parts: dict[str, Any] = {}
  if "nested_offset" in said:
    top = _tensor(tensors, "weight.absmax", (count,), where)
    shape = (-(-count // NESTED),)
    parts["nested"] = _tensor(
      tensors, "weight.nested_absmax", shape, where, "float32"
    )
    _equal(tensors, "weight.nested_quant_map", dynamic_map(True), where)
    parts["mean"] = np.float32(said["nested_offset"])
  else:
    top = _tensor(tensors, "weight.absmax", (count,), where, "float32")
  _equal(tensors, "weight.quant_map", codebooks.table(kind), where)
  if inputs % block == 0:
    x, half = inputs // block, block // 2
    apart = np.stack([codes >> 4, codes & 15], -1).reshape(outputs, x, block)
    apart = apart.transpose(1, 2, 0)
    codes = apart[:, :half] | (apart[:, half:] << 4)
    top = top.reshape(outputs, x).T
  nested = NESTED if "nested" in parts else 0
  format = Codebook(kind=kind, block=block, nested=nested)
  return QTensor(
    {"codes": codes, "top": top} | parts,
    format=format.fitted(inputs, outputs),
    inputs=inputs,
    outputs=outputs,
    of=said["dtype"],
  )


def _said(tensors: Mapping[str, np.ndarray], where: str) -> dict[str, Any]:
  names = [k for k in tensors if k.startswith(f"weight.{_STATE}")]
  if len(names) != 1:
    raise UserError(
      f"{where}: {len(names)} tensors weight.{_STATE}*, expected one: not a "
      "4-bit tensor of bitsandbytes"
    )
  raw = np.asarray(tensors[names[0]])
  if raw.dtype != np.uint8 or raw.ndim != 1 or raw.size > _MOST_JSON:
    raise UserError(
      f"{where}: {names[0]} is {raw.dtype} {list(raw.shape)}, expected a short "
      "JSON text as uint8"
    )
  try:
    said = json.loads(raw.tobytes().decode())
  except (ValueError, RecursionError) as error:
    raise UserError(f"{where}: {names[0]}: not JSON: {error}") from error
  if not isinstance(said, dict):
    raise UserError(f"{where}: {names[0]}: expected a JSON object")
  shape = said.get("shape")
  checks = {
    "quant_type": said.get("quant_type") in codebooks.CODEBOOKS
    and names[0].endswith(f"__{said['quant_type']}"),
    "blocksize": type(said.get("blocksize")) is int
    and said["blocksize"] in BLOCKS,
    "dtype": said.get("dtype") in _DTYPES,
    "shape": isinstance(shape, list)
    and len(shape) == 2
    and all(type(n) is int and n > 0 for n in shape),
    "nested_blocksize": said.get("nested_blocksize", NESTED) == NESTED,
    "nested_dtype": said.get("nested_dtype", "float32") == "float32",
    "nested_offset": isinstance(said.get("nested_offset", 0.0), float | int)
    and math.isfinite(said.get("nested_offset", 0.0)),
  }
  for field, good in checks.items():
    if not good:
      found = str(said.get(field))[:60]
      raise UserError(f"{where}: {names[0]}: {field} is {found}")
  return said


def _tensor(tensors, name, shape, where, dtype="uint8") -> np.ndarray:
  """Returns a tensor, flat, if it is what the JSON makes it."""
  found = tensors.get(name)
  size = math.prod(shape)
  if found is None:
    raise UserError(f"{where}: {name} is missing")
  found = np.asarray(found)
  if str(found.dtype) != dtype or found.size != size:
    raise UserError(
      f"{where}: {name} is {found.dtype} {list(found.shape)}, expected "
      f"{dtype} of {size} elements by its quant_state"
    )
  return found.reshape(-1)


def _equal(tensors, name, want, where) -> None:
  found = _tensor(tensors, name, want.shape, where, "float32")
  # Some backends round their tables; which values are meant is known.
  if not np.allclose(found, want, atol=1e-4):
    raise UserError(f"{where}: {name}: not the values that codes stand for")
