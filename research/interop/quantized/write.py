"""A model as a Hugging Face directory in another tool's quantized form.

The layers' matrices are packed, the router aside, and a head that is packed
already. Those that the tool can hold as they are go out without loss; others
are quantized again, to nearest, if that is asked for, and else refused.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from research import progress, weights
from research.interop import hf, parts, quantized
from research.interop.hf import write as hf_write
from research.interop.parts import Address
from research.interop.quantized import compressed_activations
from research.interop.quantized.checkpoint_formats import CheckpointFormat
from research.interop.sources import Source
from research.io import safetensors
from research.lora.merge import changes
from research.quant import qtensor
from research.typing import UserError

_WEIGHT = ".weight"


@dataclasses.dataclass(frozen=True)
class _Module:
  """A matrix to be packed.

  Attributes:
    name: of the module in torch.
    part: the matrix.
    found: what the writer says of it, None where it does not fit.
    reason: why it does not.
  """

  name: str
  part: parts.Part
  found: Any = None
  reason: str = ""


def write_model(
  directory: pathlib.Path,
  source: Source,
  writer: CheckpointFormat,
  requantize: bool,
  dtype: str | None,
  shard_size: int,
  log: changes.Log,
) -> None:
  """Writes the tensors and config.json into an empty directory.

  Args:
    source: the model; adapters are merged, so their matrices do not fit.
    requantize: whether what does not fit is quantized again.

  Raises:
    UserError: something does not fit, or all of it is plain.
  """
  usual = hf_write.plain_config(source.config)
  modules, plain = _modules(source, writer)
  scheme, modules = _settled(modules, writer, requantize)
  make = _Maker(writer, scheme, log)
  rows = hf.table(source.model)
  rest = {a: p for a, p in source.parts.items() if a not in modules}
  dense = hf_write.tensors(source.model, rest, dtype, log)
  out: dict[str, safetensors.Pending] = {}
  found: dict[str, Any] = {}
  addresses = parts.ordered(source.parts)
  for address in progress.track(addresses, "packing matrices"):
    if address in modules:
      module = modules[address]
      found[module.name], pending = make.pending(module)
      out |= pending
    else:
      name, _ = rows.theirs(address)
      out[name] = dense[name]
  quantization = writer.config(scheme, found, plain)
  safetensors.write_directory(directory, out, shard_size)
  config = hf_write.config_json(source.model, usual, dtype, source.hint)
  safetensors.write_json(
    directory / "config.json", config | {quantized.CONFIG: quantization}
  )
  for name in writer.files:
    safetensors.write_json(directory / name, quantization)


def _modules(
  source: Source, writer: CheckpointFormat
) -> tuple[dict[Address, _Module], list[str]]:
  """Returns (matrices to be packed, names of linear modules that are not)."""
  rows, out, plain = hf.table(source.model), {}, []
  for address in parts.ordered(source.parts):
    part = source.parts[address]
    name, transposed = rows.theirs(address)
    if not transposed or len(part.shape) != 2:
      continue
    name = name.removesuffix(_WEIGHT)
    found, reason = None, f"plain numbers ({part.kind})"
    if part.packed:
      reason = f"{part.kind} under something else, such as an adapter"
    w = compressed_activations.unrounded(part.read()) if part.packed else None
    if weights.is_packed(w):
      try:
        found = writer.describe(w, name)
      except UserError as e:
        reason = str(e).removeprefix(f"{name}: ")
    outside = address.layer is None or address.path == "mlp/router"
    head = address.layer is None and not writer.head
    if head or (outside and found is None):
      plain.append(name)
    else:
      out[address] = _Module(name, part, found, reason)
  return out, plain


def _settled(
  modules: Mapping[Address, _Module], writer: CheckpointFormat, requantize: bool
) -> tuple[Any, dict[Address, _Module]]:
  """Returns what the config says, and modules whose `found` is of that."""
  given = [m.found for m in modules.values() if m.found is not None]
  inputs = [m.part.shape[0] for m in modules.values() if m.found is None]
  scheme, out = writer.choose(given, inputs), {}
  for address, module in modules.items():
    if module.found is not None:
      reason = writer.mismatch(module.found, scheme)
      if reason:
        module = dataclasses.replace(module, found=None, reason=reason)
    out[address] = module
  unfit = [m for m in out.values() if m.found is None]
  if unfit and not requantize:
    raise UserError(
      f"{len(unfit)} of {len(out)} matrices do not fit this format as they "
      f"are; the first is {unfit[0].name}: {unfit[0].reason}.\n"
      "Give --requantize to round them to it, or quantize the model first "
      "(experiments.quantize)."
    )
  return scheme, out


class _Maker:
  """Makes modules' tensors when their turn comes, and tells the log once."""

  def __init__(self, writer: CheckpointFormat, scheme: Any, log: changes.Log):
    self.writer, self.scheme, self.log = writer, scheme, log
    self.format = writer.format(scheme)
    self.known: dict[Any, Any] = {}
    self.logged: set[str] = set()
    # Tensors of one type are written module by module: the last one is kept.
    self.tensors = functools.lru_cache(maxsize=1)(self._tensors)

  def pending(
    self, module: _Module
  ) -> tuple[Any, dict[str, safetensors.Pending]]:
    """Returns (what the writer says of a module, its tensors unmade)."""
    # One of modules that are alike is made to see what its tensors are.
    key = module.part.shape, module.found
    if key not in self.known or self.writer.shapes_vary:
      w, tensors = self._made(module)
      kinds = {name: (x.shape, x.dtype) for name, x in tensors.items()}
      self.known[key] = self.writer.describe(w, module.name), kinds
    found, kinds = self.known[key]
    return found, {
      f"{module.name}.{name}": safetensors.Pending(
        *kind, lambda name=name: self.tensors(module)[name]
      )
      for name, kind in kinds.items()
    }

  def _made(self, module: _Module) -> tuple[Any, Mapping[str, np.ndarray]]:
    w = compressed_activations.unrounded(module.part.read())
    if module.found is None:
      w = self._packed(module, changes.dense_weight(w).array)
    return w, self.writer.tensors(w, self.scheme, module.name)

  def _tensors(self, module: _Module) -> Mapping[str, np.ndarray]:
    w, tensors = self._made(module)
    if module.name not in self.logged:
      self.logged.add(module.name)
      self._tell(module, w)
    return tensors

  def _tell(self, module: _Module, w: Any) -> None:
    name, before = module.name, module.part.kind
    if module.found is not None:
      self.log.same(name, before, before)
      return
    read = changes.dense_weight(module.part.read())
    got, alone = np.asarray(weights.dense(w)), None
    if read.base is not None:
      alone = np.asarray(weights.dense(self._packed(module, read.base)))
    self.log.compared(name, before, parts.kind_of(w), read, got, alone)

  def _packed(self, module: _Module, array: np.ndarray) -> Any:
    array = changes.cast(module.name, array, np.dtype(np.float32))
    return qtensor.pack(jnp.asarray(array), self.format, where=module.name)
