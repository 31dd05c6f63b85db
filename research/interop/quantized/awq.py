"""AWQ's checkpoints, as AutoAWQ and its readers have them.

In the version "gemm", a module `P` of `[out, in]` has `P.qweight`, int32
`[in, out / 8]`, eight outputs a word in an order of its own (`bitstream.AWQ`);
`P.qzeros` `[G, out / 8]`, the same; and `P.scales` `[G, out]`. In "gemv", which
is read but not written, rows are outputs: `P.qweight` `[out, in / 8]`, low
nibbles first; `P.qzeros` `[out, Z]` and `P.scales` `[out, 8 Z]`, padded.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from research.interop.quantized import gptq
from research.interop.quantized.integers import Integers
from research.io.fields import Fields
from research.quant.formats.affine import Affine
from research.quant.layouts import bitstream
from research.quant.qtensor import QTensor
from research.typing import UserError

METHOD = "awq"
MARK = "qweight"
NAMES = ("qweight", "qzeros", "scales")

_VERSION = ("version", "format", "checkpoint_format")
"""Fields that name the layout: of AutoAWQ, of transformers, of gptqmodel."""

_FIELDS = {
  *gptq.FIELDS,
  *("zero_point", "version"),
  *("do_fuse", "fuse_max_seq_len", "modules_to_fuse"),
}

_SCALES = ("float16", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
  """How all modules of a checkpoint are kept.

  Attributes:
    group: inputs that share a scale, 0 for all of them.
    version: `"gemm"` or `"gemv"`.
  """

  group: int = 128
  version: str = "gemm"


def parse(values: Mapping[str, Any], where: str) -> Scheme:
  """Returns what a `quantization_config` or quant_config.json says.

  Raises:
    UserError: a field is wrong, or means what is not supported.
  """
  old = {"w_bit": "bits", "q_group_size": "group_size"}
  given = {old.get(name, name): x for name, x in values.items()}
  fields = Fields(given, where, dict(group_size=128, zero_point=True))
  fields.known(_FIELDS)
  fields.neutral(gptq.NEUTRAL | {"desc_act": (None, False)})
  if fields.integer("bits") != 4:
    raise fields.wrong("bits", "4")
  names = [x for x in _VERSION if fields.get(x) is not None]
  versions = [str(fields.get(name)).lower() for name in names] or ["gemm"]
  for name, version in zip(names, versions, strict=False):
    if version not in ("gemm", "gemv"):
      raise fields.wrong(name, "'gemm' or 'gemv'")
    if version != versions[0]:
      raise fields.wrong(name, f"{versions[0]!r} as {names[0]}")
  if fields.get("backend") == "llm-awq":
    raise fields.wrong("backend", "any other: its layout is not supported")
  # Of symmetric grids gptqmodel says false, and stores their zeros even so.
  fields.flag("zero_point")
  group = fields.get("group_size")
  if group != -1:
    group = fields.integer("group_size")
  return Scheme(group=max(group, 0), version=versions[0])


def config(scheme: Scheme) -> dict[str, Any]:
  """Returns the `quantization_config`; `parse` inverts it."""
  return {
    "quant_method": METHOD,
    "bits": 4,
    "group_size": scheme.group or -1,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
  }


def from_tensors(
  tensors: Mapping[str, np.ndarray], scheme: Scheme, where: str = "module"
) -> QTensor:
  """Returns one matrix `[I, O]`; inverts `to_tensors`.

  Raises:
    UserError: a tensor is missing or does not fit the others.
  """
  given = _Tensors(tensors, where)
  if scheme.version == "gemv":
    codes, zero, scale = _gemv(given, scheme.group)
  else:
    codes, zero, scale = _gemm(given, scheme.group)
  inputs, outputs = codes.shape
  groups = len(scale)
  format = Affine(
    block=inputs // groups, bits=4, scale_dtype=str(scale.dtype)
  ).for_shape(inputs, outputs)
  return QTensor(
    format.pack_parts(codes.reshape(groups, -1, outputs), scale, zero),
    format=format,
    inputs=inputs,
    outputs=outputs,
  )


@dataclasses.dataclass(frozen=True)
class _Tensors:
  """The tensors of one module; a wrong one is a UserError that names it."""

  tensors: Mapping[str, np.ndarray]
  where: str

  def matrix(
    self, name: str, kinds: tuple[str, ...], shape: tuple[int, int] | None
  ) -> np.ndarray:
    """Returns a matrix of one of some dtypes, and of a shape if it is given."""
    found = self.tensors.get(name)
    if found is None:
      raise UserError(f"{self.where}: {name} is missing")
    good = found.ndim == 2 and found.size and str(found.dtype) in kinds
    if not good or (shape is not None and found.shape != shape):
      raise UserError(
        f"{self.where}: {name} is {found.dtype} {list(found.shape)}, expected "
        f"{' or '.join(kinds)} {list(shape) if shape else 'of two axes'}, by "
        "qweight and the group"
      )
    return np.asarray(found)

  def groups(self, inputs: int, group: int) -> int:
    group = group or inputs
    if inputs % group:
      raise UserError(
        f"{self.where}: {inputs} inputs are no multiple of the group of {group}"
      )
    return inputs // group


_WORDS = ("int32", "uint32")

_Parts = tuple[np.ndarray, np.ndarray, np.ndarray]


def _gemm(given: _Tensors, group: int) -> _Parts:
  """Returns codes `[I, O]`, zeros and scales `[G, O]`."""
  packed = given.matrix("qweight", _WORDS, None)
  inputs, words = packed.shape
  groups = given.groups(inputs, group)
  zero = given.matrix("qzeros", _WORDS, (groups, words))
  scale = given.matrix("scales", _SCALES, (groups, 8 * words))
  return bitstream.unpack_awq(packed), bitstream.unpack_awq(zero), scale


def _gemv(given: _Tensors, group: int) -> _Parts:
  """Returns the same of the version whose rows are outputs."""
  packed = given.matrix("qweight", _WORDS, None)
  outputs, inputs = packed.shape[0], 8 * packed.shape[1]
  groups = given.groups(inputs, group)
  zero = given.matrix("qzeros", _WORDS, None)
  # As many words as kernels read; groups end before.
  words = max(zero.shape[1], -(-groups // 8))
  zero = given.matrix("qzeros", _WORDS, (outputs, words))
  scale = given.matrix("scales", _SCALES, (outputs, 8 * words))

  def along(x, count):
    return bitstream.unpack(np.ascontiguousarray(x.T), 4, count)

  scale = np.ascontiguousarray(scale.T)[:groups]
  return along(packed, inputs), along(zero, 8 * words)[:groups], scale


def to_tensors(w: Integers, where: str = "module") -> dict[str, np.ndarray]:
  """Returns the tensors of one matrix by their names behind `P.`.

  Raises:
    UserError: this format cannot hold it.
  """
  if w.bits != 4:
    raise UserError(f"{where}: bits does not fit: found {w.bits}, expected 4")
  if not w.ordered:
    raise UserError(
      f"{where}: order does not fit: found groups of scattered inputs "
      "(desc_act), expected groups of neighbours"
    )
  if w.codes.shape[1] % 8:
    raise UserError(
      f"{where}: shape does not fit: found {w.codes.shape[1]} outputs, "
      "expected a multiple of 8"
    )
  return {
    "qweight": bitstream.pack_awq(w.codes),
    "qzeros": bitstream.pack_awq(w.zero),
    "scales": w.scale,
  }
