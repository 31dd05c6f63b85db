"""bitsandbytes' tensors, as its state dicts and safetensors have them.

In 4 bits, a module `P` has `P.weight`, two codes a byte, high nibble first,
along the rows of `[out, in]`; its magnitudes and tables under `P.weight.*`, and
the rest as JSON in the bytes of `P.weight.quant_state.bitsandbytes__nf4`. In 8
bits it has `P.weight`, int8 `[out, in]`, `P.SCB`, the magnitude of each output,
and `P.weight_format`, which is 0.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.io.fields import Fields
from research.optim.adam8bit import dynamic_map
from research.quant.formats.codebook import (
  BLOCKS,
  NESTED,
  Codebook,
  FlatCodebook,
)
from research.quant.formats.int8 import Int8
from research.quant.numerics import codebooks
from research.quant.qtensor import QTensor
from research.typing import UserError

METHOD = "bitsandbytes"
MAGNITUDES = "SCB"
STATE = ".weight.quant_state.bitsandbytes__"
"""Keys by which a module of 8 bits, or of 4, is recognised."""

FLAGS = ("load_in_4bit", "load_in_8bit")
"""Fields by which a config without `quant_method` is recognised."""

THRESHOLD = 6.0
"""`llm_int8_threshold` where a config leaves it out."""

_FIELDS = {
  *("quant_method", *FLAGS, *(f"_{name}" for name in FLAGS)),
  *("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
  *("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"),
  *("llm_int8_threshold", "llm_int8_has_fp16_weight"),
  *("llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload"),
}
"""Of a config; types, nesting and skipped modules are asked of the tensors."""

_STATE = STATE.removeprefix(".weight.")
_DTYPES = ("float32", "bfloat16", "float16")
_MOST_JSON = 4096


@dataclasses.dataclass(frozen=True)
class Scheme:
  """What a `quantization_config` says.

  Attributes:
    bits: of a code, 4 or 8.
    threshold: magnitude of an input that is not rounded, where codes have 8
      bits; 0 for none.
  """

  bits: int
  threshold: float = THRESHOLD


def parse(values: Mapping[str, Any], where: str) -> Scheme:
  """Returns what a `quantization_config` says.

  Raises:
    UserError: a field is wrong, or means what is not supported.
  """
  fields = Fields(values, where, dict(llm_int8_threshold=THRESHOLD))
  fields.known(_FIELDS)
  four, eight = map(fields.flag, FLAGS)
  if four == eight:
    raise fields.wrong("load_in_4bit", "it or load_in_8bit to be true")
  if four and fields.get("bnb_4bit_quant_type") not in ("nf4", "fp4", None):
    raise fields.wrong("bnb_4bit_quant_type", "'nf4' or 'fp4'")
  if fields.flag("llm_int8_has_fp16_weight"):
    raise fields.wrong("llm_int8_has_fp16_weight", "false")
  threshold = fields.get("llm_int8_threshold")
  if type(threshold) not in (int, float) or not 0 <= threshold < math.inf:
    raise fields.wrong("llm_int8_threshold", "a number of at least 0")
  return Scheme(4 if four else 8, float(threshold))


def config(
  kind: str,
  nested: bool,
  of: str,
  skipped: Sequence[str] = (),
  threshold: float = THRESHOLD,
) -> dict[str, Any]:
  """Returns the `quantization_config`; `parse` reads it."""
  common = dict(quant_method=METHOD, llm_int8_skip_modules=[*skipped] or None)
  if kind == "int8":
    eight = dict(load_in_8bit=True, load_in_4bit=False)
    return common | eight | dict(llm_int8_threshold=threshold)
  return common | dict(
    load_in_8bit=False,
    load_in_4bit=True,
    bnb_4bit_quant_type=kind,
    bnb_4bit_use_double_quant=nested,
    bnb_4bit_compute_dtype=of,
    bnb_4bit_quant_storage="uint8",
  )


def to_tensors(w: QTensor, where: str = "module") -> dict[str, np.ndarray]:
  """Returns the tensors of one matrix by their names behind `P.`.

  Raises:
    UserError: bitsandbytes has no such matrix.
  """
  format, field = w.format, None
  if w.lead or w.axis != -2:
    field, found = "axis", f"{list(w.shape)}, blocks along {w.axis}"
  elif w.order is not None or w.outliers is not None:
    field, found = "order", "rows out of their order, or apart"
  elif isinstance(format, Int8):
    codes = np.ascontiguousarray(np.asarray(w.parts["codes"]).T)
    return {
      "weight": codes,
      MAGNITUDES: np.asarray(w.parts["top"]),
      "weight_format": np.asarray(0, np.uint8),
    }
  elif not isinstance(format, Codebook) or format.kind not in ("nf4", "fp4"):
    field, found = "format", format.name
  if field:
    raise UserError(
      f"{where}: {field} does not fit: found {found}; expected codes of nf4 or "
      "fp4, or 8-bit integers with a magnitude an output"
    )
  return to_state_dict(w)


def to_state_dict(w: QTensor) -> dict[str, np.ndarray]:
  """Returns the tensors of one matrix by their names behind `P.`.

  Args:
    w: one matrix `[I, O]` in a codebook's format.
  """
  name, parts, format = "weight", {}, w.format
  parts[name] = _bytes(w)[:, None]
  top = np.asarray(w.parts["top"])
  flat = isinstance(format, FlatCodebook)
  parts[f"{name}.absmax"] = (top if flat else top.T).reshape(-1)
  parts[f"{name}.quant_map"] = codebooks.table(format.kind)
  state: dict[str, Any] = dict(
    quant_type=format.kind,
    blocksize=format.block,
    dtype=w.of,
    shape=[w.outputs, w.inputs],
  )
  if format.nested:
    parts[f"{name}.nested_absmax"] = np.asarray(w.parts["nested"])
    parts[f"{name}.nested_quant_map"] = dynamic_map(True)
    state |= dict(
      nested_blocksize=NESTED,
      nested_dtype="float32",
      nested_offset=float(w.parts["mean"]),
    )
  text = json.dumps(state).encode()
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


def from_tensors(
  tensors: Mapping[str, np.ndarray], where: str = "module"
) -> QTensor:
  """Returns one matrix `[I, O]`; inverts `to_tensors`.

  Raises:
    UserError: a tensor is missing or does not fit the others.
  """
  if MAGNITUDES not in tensors:
    return from_state_dict(tensors, where)
  codes = np.asarray(tensors.get("weight"))
  if codes.dtype != np.int8 or codes.ndim != 2 or not codes.size:
    raise UserError(
      f"{where}: weight is {codes.dtype} {list(codes.shape)}, expected int8 "
      "[out, in]"
    )
  outputs, inputs = codes.shape
  top = _tensor(tensors, MAGNITUDES, (outputs,), where, "float32")
  form = np.asarray(tensors.get("weight_format", 0))
  if form.size != 1 or form.reshape(-1)[0] != 0:
    raise UserError(
      f"{where}: weight_format is {str(form)[:60]}, expected 0, codes by rows"
    )
  return QTensor(
    {"codes": np.ascontiguousarray(codes.T), "top": top},
    format=Int8(),
    inputs=inputs,
    outputs=outputs,
  )


def from_state_dict(
  tensors: Mapping[str, np.ndarray], where: str = "state dict"
) -> QTensor:
  """Returns one matrix; inverts `to_state_dict`.

  Raises:
    UserError: a tensor is missing or does not fit the others.
  """
  state, tensors = _state(tensors, where), _as_bytes(tensors)
  kind, block = state["quant_type"], state["blocksize"]
  outputs, inputs = state["shape"]
  total = inputs * outputs
  count = -(-total // block)
  codes = _tensor(tensors, "weight", (-(-total // 2),), where)
  parts: dict[str, Any] = {}
  if "nested_offset" in state:
    top = _tensor(tensors, "weight.absmax", (count,), where)
    shape = (-(-count // NESTED),)
    parts["nested"] = _tensor(
      tensors, "weight.nested_absmax", shape, where, "float32"
    )
    _equal(tensors, "weight.nested_quant_map", dynamic_map(True), where)
    parts["mean"] = np.float32(state["nested_offset"])
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
    format=format.for_shape(inputs, outputs),
    inputs=inputs,
    outputs=outputs,
    of=state["dtype"],
  )


def _state(tensors: Mapping[str, np.ndarray], where: str) -> dict[str, Any]:
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
    state = json.loads(raw.tobytes().decode())
  except (ValueError, RecursionError) as error:
    raise UserError(f"{where}: {names[0]}: not JSON: {error}") from error
  if not isinstance(state, dict):
    raise UserError(f"{where}: {names[0]}: expected a JSON object")
  shape = state.get("shape")
  checks = {
    "quant_type": state.get("quant_type") in codebooks.CODEBOOKS
    and names[0].endswith(f"__{state['quant_type']}"),
    "blocksize": type(state.get("blocksize")) is int
    and state["blocksize"] in BLOCKS,
    "dtype": state.get("dtype") in _DTYPES,
    "shape": isinstance(shape, list)
    and len(shape) == 2
    and all(type(n) is int and n > 0 for n in shape),
    "nested_blocksize": state.get("nested_blocksize", NESTED) == NESTED,
    "nested_dtype": state.get("nested_dtype", "float32") == "float32",
    "nested_offset": isinstance(state.get("nested_offset", 0.0), float | int)
    and math.isfinite(state.get("nested_offset", 0.0)),
  }
  for field, good in checks.items():
    if not good:
      found = str(state.get(field))[:60]
      raise UserError(f"{where}: {names[0]}: {field} is {found}")
  return state


def _as_bytes(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns tensors whose codes are bytes, whatever they were stored as."""
  out = dict(tensors)
  found = np.asarray(out.get("weight", ()))
  # Other types are for what shards floats alone; bfloat16's kind is "V".
  if found.size and found.dtype.kind in "fV" and found.itemsize in (2, 4):
    out["weight"] = np.ascontiguousarray(found).reshape(-1).view(np.uint8)
  return out


def _tensor(tensors, name, shape, where, dtype="uint8") -> np.ndarray:
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
