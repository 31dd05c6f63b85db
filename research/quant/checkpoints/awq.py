"""AWQ's checkpoints, as AutoAWQ and its readers have them (version "gemm").

A module `P` of `[out, in]` has `P.qweight`, int32 `[in, out / 8]`, eight
outputs a word in an order of its own (`bitstream.AWQ`); `P.qzeros`
`[G, out / 8]`, the same; and `P.scales` `[G, out]`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from research.interop.fields import Fields
from research.quant import bitstream
from research.quant.checkpoints.integers import Integers
from research.quant.formats.affine import Affine
from research.quant.qtensor import QTensor
from research.typing import UserError

METHOD = "awq"
MARK = "qweight"
NAMES = ("qweight", "qzeros", "scales")

_SCALES = ("float16", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
  """How all modules of a checkpoint are kept.

  Attributes:
    group: inputs that share a scale, 0 for all of them.
  """

  group: int = 128


def parse(values: Mapping[str, Any], where: str) -> Scheme:
  """Returns what a `quantization_config` or quant_config.json says.

  Args:
    values: the JSON object.
    where: it comes from, for messages.

  Raises:
    UserError: a field is wrong, or means what is not supported.
  """
  old = {"w_bit": "bits", "q_group_size": "group_size"}
  given = {old.get(name, name): x for name, x in values.items()}
  fields = Fields(
    given, where, dict(group_size=128, version="gemm", zero_point=True)
  )
  if fields.integer("bits") != 4:
    raise fields.wrong("bits", "4")
  version = fields.get("version")
  if not isinstance(version, str) or version.lower() != "gemm":
    raise fields.wrong("version", "'gemm'")
  if fields.get("zero_point") is not True:
    raise fields.wrong("zero_point", "true")
  group = fields.get("group_size")
  if group != -1:
    group = fields.integer("group_size")
  return Scheme(group=max(group, 0))


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

  Args:
    tensors: of one module, by their names behind `P.`, its bias aside.
    scheme: by its config.
    where: they come from, for messages.

  Raises:
    UserError: a tensor is missing or does not fit the others.
  """

  def tensor(name, shape, *kinds):
    found = tensors.get(name)
    if found is None:
      raise UserError(f"{where}: {name} is missing")
    if found.shape != shape or str(found.dtype) not in kinds:
      raise UserError(
        f"{where}: {name} is {found.dtype} {list(found.shape)}, expected "
        f"{' or '.join(kinds)} {list(shape)} by qweight and groups of {group}"
      )
    return np.asarray(found)

  shape = np.asarray(tensors["qweight"]).shape
  inputs, words = shape if len(shape) == 2 else (0, 0)
  group = scheme.group or inputs
  if not inputs or not words or inputs % group:
    raise UserError(
      f"{where}: qweight has shape {list(shape)}, expected [inputs, outputs / "
      f"8], inputs a multiple of the group of {group}"
    )
  outputs, groups = 8 * words, inputs // group
  kinds = ("int32", "uint32")
  codes = bitstream.unpack_awq(tensor("qweight", shape, *kinds))
  zero = bitstream.unpack_awq(tensor("qzeros", (groups, words), *kinds))
  scale = tensor("scales", (groups, outputs), *_SCALES)
  format = Affine(block=group, bits=4, scale_dtype=str(scale.dtype))
  return QTensor(
    format.kept(codes.reshape(groups, group, outputs), scale, zero),
    format=format.fitted(inputs, outputs),
    inputs=inputs,
    outputs=outputs,
  )


def to_tensors(w: Integers, where: str = "module") -> dict[str, np.ndarray]:
  """Returns the tensors of one matrix by their names behind `P.`.

  Args:
    w: one matrix.
    where: they are for, for messages.

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
