"""Hugging Face directories that other tools have quantized, as packed weights.

`config.json` has a `quantization_config`, or an older tool left it in a file of
its own. The tensors of each packed module `P` become one stand-in under the
name `P.weight`, of the matrix's shape: whoever reads it as numbers gets them
decoded, and a reader of packed weights takes its leaf.

The tensors decide which modules are quantized: one whose packed tensors are
there is packed, and all others are plain. The config says what they mean.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from research.interop.quantized import (
  awq,
  bnb,
  compressed_config,
  compressed_tensors,
  gptq,
)
from research.io import safetensors, unread
from research.io.fields import Fields
from research.quant.qtensor import QTensor
from research.typing import UserError

CONFIG = "quantization_config"

FILES = {"quantize_config.json": gptq.METHOD, "quant_config.json": awq.METHOD}
"""Where older tools left the config -> whose it is unless it says so."""


@dataclasses.dataclass(frozen=True)
class PackedTensor:
  """A packed matrix in place of a tensor `[out, in]`.

  Attributes:
    leaf: a packed weight `[in, out]` of `unread.LazyArray` arrays.
    file: for messages.
  """

  leaf: Any
  file: str

  @property
  def shape(self) -> tuple[int, ...]:
    return self.leaf.shape[::-1]

  @property
  def dtype(self) -> np.dtype:
    return self.leaf.dtype

  def weight(self) -> Any:
    return jax.tree.map(_read_all, self.leaf)

  def read(self, index: Any = ...) -> np.ndarray:
    return np.asarray(self.weight().dense()).T[index]


Tensor = safetensors.Lazy | PackedTensor
"""A tensor of a file, or what stands in for some."""


def _read_all(x: unread.LazyArray) -> np.ndarray:
  return np.asarray(x.read(tuple(slice(0, n) for n in x.shape)))


def split_config(
  config: Mapping[str, Any], directory: pathlib.Path
) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
  """Returns (config.json without it, the `quantization_config` or None).

  Raises:
    UserError: it is no object.
  """
  plain = {k: v for k, v in config.items() if k != CONFIG}
  found = config.get(CONFIG)
  if found is None:
    for name, method in FILES.items():
      if (directory / name).is_file():
        found = safetensors.read_json(directory / name)
        return plain, {"quant_method": method} | found
    return plain, None
  if not isinstance(found, dict):
    raise UserError(
      f"{directory / 'config.json'}: {CONFIG} is {str(found)[:60]!r}, expected "
      "an object"
    )
  if any(found.get(name) is True for name in bnb.FLAGS):
    found = {"quant_method": bnb.METHOD} | found  # older files leave it out
  return plain, found


def is_quantized(config: Mapping[str, Any], directory: pathlib.Path) -> bool:
  """Whether a model says that it is quantized; see `split_config`."""
  return split_config(config, directory)[1] is not None


def open_tensors(
  quantization: Mapping[str, Any],
  tensors: Mapping[str, safetensors.Lazy],
  directory: pathlib.Path,
) -> tuple[dict[str, Any], Mapping[str, Any]]:
  """Returns (tensors, those of each packed module as one; the config).

  Every module is read once, to be checked and for its smaller arrays.

  Raises:
    UserError: a config that is not supported, or tensors that do not fit it.
  """
  file = str(directory)
  found = open_modules(quantization, tensors, str(directory / "config.json"))
  out: dict[str, Any] = {
    k: t for k, t in tensors.items() if k not in found.used
  }
  for module, make in found.modules.items():
    name = f"{module}.weight"
    if name in out:
      raise UserError(f"{file}: {name} is there both packed and plain")
    try:
      out[name] = PackedTensor(_described(make), file)
    except UserError as e:
      raise UserError(f"{file}: {e}") from e
  return out, found.quantization


def _described(make: Callable[[], Any]) -> Any:
  """Returns a weight of unread arrays: of the largest, made again."""
  leaves, treedef = jax.tree.flatten(make())
  largest = max(range(len(leaves)), key=lambda i: leaves[i].nbytes)

  def one(i):
    # Copied: a view would keep the file's pages in memory.
    x = np.array(leaves[i])
    return unread.LazyArray(x.shape, x.dtype, lambda index: x[index])

  x = leaves[largest]
  again = unread.LazyArray(
    x.shape, x.dtype, lambda index: jax.tree.leaves(make())[largest][index]
  )
  found = [again if i == largest else one(i) for i in range(len(leaves))]
  return jax.tree.unflatten(treedef, found)


def without_zero_biases(
  tensors: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns tensors less biases of 0 of packed modules that have none.

  Args:
    tensors: by their names.
  """

  def superfluous(name: str) -> bool:
    module, _, last = name.rpartition(".")
    if last != "bias" or name in known:
      return False
    packed = isinstance(tensors.get(f"{module}.weight"), PackedTensor)
    return packed and not tensors[name].read().any()

  return {k: t for k, t in tensors.items() if not superfluous(k)}


def stack_weights(leaves: Sequence[Any], where: str) -> Any:
  """Returns weights of unread arrays behind a leading axis.

  Raises:
    UserError: they are not kept alike.
  """
  first = jax.tree.structure(leaves[0])
  alike = all(jax.tree.structure(x) == first for x in leaves)
  shapes = {tuple(x.shape for x in jax.tree.leaves(w)) for w in leaves}
  if not alike or len(shapes) > 1:
    raise UserError(
      f"{where}: matrices that are stacked, as those of experts, are not "
      "quantized alike; load the model without packed"
    )
  return jax.tree.map(stack, *leaves)


def stack(*arrays: unread.LazyArray) -> unread.LazyArray:
  """Returns unread arrays behind a leading axis."""

  def filler(x):
    def fill(index, out):
      out[...] = x.read(index)

    return fill

  fills = [filler(x) for x in arrays]
  first = arrays[0]
  return unread.stacked(fills, (len(arrays),), first.shape, first.dtype)


METHODS = (gptq.METHOD, awq.METHOD, bnb.METHOD, compressed_config.METHOD)

_SAMPLES = 4
"""Modules that a version is detected by."""


Tensors = Mapping[str, safetensors.Lazy]
"""A file's, by their names."""


@dataclasses.dataclass(frozen=True)
class Opened:
  """The packed modules of a checkpoint.

  Attributes:
    modules: name -> what reads its matrix `[I, O]`.
    used: names of all tensors that they are read from.
    quantization: the `quantization_config`, with what was detected.
  """

  modules: Mapping[str, Callable[[], QTensor]]
  used: frozenset[str]
  quantization: Mapping[str, Any]


def open_modules(
  values: Mapping[str, Any], tensors: Tensors, where: str
) -> Opened:
  """Returns the packed modules among a checkpoint's tensors.

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
  scheme = gptq.detect_version(
    scheme, {module: _arrays(tensors, found[module]) for module in some}
  )
  read = functools.partial(gptq.from_tensors, scheme=scheme)
  quantization = dict(values) | {
    "checkpoint_format": gptq.config(scheme)["checkpoint_format"]
  }
  return _opened(found, tensors, read, quantization)


def _compressed(values, tensors: Tensors, where: str) -> Opened:
  config = compressed_config.parse(values, where)
  # Of a cache that the config says, which no weight depends on.
  cache = values.get(compressed_config.KV_CACHE) is not None
  unused = filter(compressed_tensors.KV_SCALES.fullmatch, tensors)
  unused = frozenset(unused) if cache else frozenset()
  tensors = {k: t for k, t in tensors.items() if k not in unused}
  found = _ending(tensors, "weight_scale", compressed_tensors.NAMES)
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
  return Opened(modules, used | unused, values)


def _opened(
  found: Modules, tensors: Tensors, read: Callable[..., QTensor], quantization
) -> Opened:
  def reader(module, names):
    return lambda: read(_arrays(tensors, names), where=module)

  modules = {module: reader(module, names) for module, names in found.items()}
  used = frozenset(n for names in found.values() for n in names.values())
  return Opened(modules, used, quantization)


def _arrays(tensors: Tensors, names: Mapping[str, str]):
  return {short: tensors[name].read() for short, name in names.items()}
