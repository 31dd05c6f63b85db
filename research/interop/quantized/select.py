"""Which modules of a checkpoint are quantized, and what reads them.

The tensors decide: a module whose packed tensors are there is packed, and all
others are plain. The config says what they mean.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from research.interop.quantized import (
  awq,
  bnb,
  compressed_config,
  compressed_tensors,
  gptq,
)
from research.io.fields import Fields
from research.quant.qtensor import QTensor
from research.typing import UserError

METHODS = (gptq.METHOD, awq.METHOD, bnb.METHOD, compressed_config.METHOD)

_SAMPLES = 4
"""Modules that a version is detected by."""


Tensors = Mapping[str, Any]
"""name -> a tensor of a file: it has `read()`, which returns its numbers."""


@dataclasses.dataclass(frozen=True)
class Opened:
  """The packed modules of a checkpoint.

  Attributes:
    modules: name -> what reads its matrix `[I, O]`.
    used: names of all tensors that they are read from.
    said: the `quantization_config`, with what was detected.
  """

  modules: Mapping[str, Callable[[], QTensor]]
  used: frozenset[str]
  said: Mapping[str, Any]


def open_modules(
  values: Mapping[str, Any], tensors: Tensors, where: str
) -> Opened:
  """Returns the packed modules among a checkpoint's tensors.

  Args:
    values: the `quantization_config`.
    tensors: all of the checkpoint's, by their names.
    where: the config comes from, for messages.

  Raises:
    UserError: an unknown method, or a config that is not supported.
  """
  fields = Fields(values, f"{where}: quantization_config")
  method = fields.get("quant_method")
  where = fields.where
  if method == gptq.METHOD:
    return _gptq(values, tensors, where)
  if method == awq.METHOD:
    scheme = awq.parse(values, where)
    found = _ending(tensors, awq.MARK, awq.NAMES)
    read = functools.partial(awq.from_tensors, scheme=scheme)
    return _opened(found, tensors, read, values)
  if method == bnb.METHOD:
    bnb.parse(values, where)
    return _opened(_bnb(tensors), tensors, bnb.from_tensors, values)
  if method == compressed_config.METHOD:
    return _compressed(values, tensors, where)
  raise fields.wrong("quant_method", f"one of {', '.join(METHODS)}")


Modules = Mapping[str, Mapping[str, str]]
"""Module -> its tensors' names behind `P.` -> their whole names."""


def _ending(tensors: Tensors, mark: str, names: Iterable[str]) -> Modules:
  """Returns modules with a tensor `P.mark`, and those of theirs in `names`."""
  out = {}
  for name in tensors:
    module, dot, last = name.rpartition(".")
    if dot and last == mark:
      out[module] = {
        x: f"{module}.{x}" for x in names if f"{module}.{x}" in tensors
      }
  return out


def _bnb(tensors: Tensors) -> Modules:
  """Returns modules of 4 bits, by their state, and of 8, by magnitudes."""
  eight = (bnb.MAGNITUDES, "weight", "weight_format")
  out = dict(_ending(tensors, bnb.MAGNITUDES, eight))
  four = {
    name.partition(bnb.STATE)[0]: {} for name in tensors if bnb.STATE in name
  }
  for name in tensors:
    module, _, last = name.partition(".weight")
    if module in four and not last.partition(".")[0]:
      four[module][f"weight{last}"] = name
  return out | four


def _gptq(values, tensors: Tensors, where: str) -> Opened:
  scheme = gptq.parse(values, where)
  found = _ending(tensors, gptq.MARK, gptq.NAMES)
  some = list(found)[:_SAMPLES]
  scheme = gptq.detected(
    scheme, {module: _arrays(tensors, found[module]) for module in some}
  )
  read = functools.partial(gptq.from_tensors, scheme=scheme)
  said = dict(values) | {
    "checkpoint_format": gptq.config(scheme)["checkpoint_format"]
  }
  return _opened(found, tensors, read, said)


_COMPRESSED = (
  *("weight", "weight_packed", "weight_scale", "weight_shape"),
  *("weight_zero_point", "weight_g_idx", "weight_global_scale"),
  *("weight_scale_2", "input_scale", "input_zero_point"),
  *("input_global_scale", "output_scale", "output_zero_point"),
)


def _compressed(values, tensors: Tensors, where: str) -> Opened:
  config = compressed_config.parse(values, where)
  found = _ending(tensors, "weight_scale", _COMPRESSED)
  modules = {}
  for module, names in found.items():
    scheme = config.scheme(module)
    if scheme is None:
      raise UserError(
        f"{where}: {module} has weight_scale, but no group is for it"
      )
    read = functools.partial(compressed_tensors.from_tensors, scheme=scheme)
    modules |= _opened({module: names}, tensors, read, values).modules
  used = frozenset(n for names in found.values() for n in names.values())
  return Opened(modules, used, values)


def _opened(
  found: Modules, tensors: Tensors, read: Callable[..., QTensor], said
) -> Opened:
  def reader(module, names):
    return lambda: read(_arrays(tensors, names), where=module)

  modules = {module: reader(module, names) for module, names in found.items()}
  used = frozenset(n for names in found.values() for n in names.values())
  return Opened(modules, used, said)


def _arrays(tensors: Tensors, names: Mapping[str, str]):
  return {short: tensors[name].read() for short, name in names.items()}
