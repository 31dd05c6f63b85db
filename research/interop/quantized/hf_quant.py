"""Hugging Face directories that other tools have quantized, as packed weights.

`config.json` has a `quantization_config`, or an older tool left it in a file of
its own. The tensors of each packed module `P` become one stand-in under the
name `P.weight`, of the matrix's shape: whoever reads it as numbers gets them
decoded, and a reader of packed weights takes its leaf.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from research.interop.quantized import awq, gptq, select
from research.io import safetensors, unread
from research.typing import UserError

CONFIG = "quantization_config"

FILES = {"quantize_config.json": gptq.METHOD, "quant_config.json": awq.METHOD}
"""Where older tools left the config -> whose it is unless it says so."""


@dataclasses.dataclass(frozen=True)
class Packed:
  """A packed matrix in place of a tensor `[out, in]`.

  Attributes:
    leaf: a packed weight `[in, out]` of `unread.Unread` arrays.
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
    """Returns the packed weight."""
    return jax.tree.map(_whole, self.leaf)

  def read(self, index: Any = ...) -> np.ndarray:
    """Returns `tensor[index]`, decoded."""
    return np.asarray(self.weight().dense()).T[index]


Tensor = safetensors.Lazy | Packed
"""A tensor of a file, or what stands in for some."""


def _whole(x: unread.Unread) -> np.ndarray:
  return np.asarray(x.read(tuple(slice(0, n) for n in x.shape)))


def config_of(
  config: Mapping[str, Any], directory: pathlib.Path
) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
  """Returns (config.json without it, the `quantization_config` or None).

  Args:
    config: config.json of the model.
    directory: it is in.

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
  return plain, found


def is_quantized(directory: pathlib.Path) -> bool:
  """Whether the model in a directory says that it is quantized."""
  config = safetensors.read_json(directory / "config.json")
  return config_of(config, directory)[1] is not None


def opened(
  said: Mapping[str, Any],
  tensors: Mapping[str, safetensors.Lazy],
  directory: pathlib.Path,
) -> tuple[dict[str, Any], Mapping[str, Any]]:
  """Returns (tensors, those of each packed module as one; what was said).

  Every module is read once, to be checked and for its smaller arrays.

  Args:
    said: the `quantization_config`.
    tensors: by their names.
    directory: they come from, for messages.

  Raises:
    UserError: a config that is not supported, or tensors that do not fit it.
  """
  file = str(directory)
  found = select.open_modules(said, tensors, str(directory / "config.json"))
  out: dict[str, Any] = {
    k: t for k, t in tensors.items() if k not in found.used
  }
  for module, make in found.modules.items():
    name = f"{module}.weight"
    if name in out:
      raise UserError(f"{file}: {name} is there both packed and plain")
    try:
      out[name] = Packed(_described(make), file)
    except UserError as e:
      raise UserError(f"{file}: {e}") from e
  return out, found.said


def _described(make: Callable[[], Any]) -> Any:
  """Returns a weight of unread arrays: of the largest, made again."""
  leaves, treedef = jax.tree.flatten(make())
  largest = max(range(len(leaves)), key=lambda i: leaves[i].nbytes)

  def one(i):
    # Copied: a view would keep the file's pages in memory.
    x = np.array(leaves[i])
    return unread.Unread(x.shape, x.dtype, lambda index: x[index])

  x = leaves[largest]
  again = unread.Unread(
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
    known: names that the model has.
  """

  def superfluous(name: str) -> bool:
    module, _, last = name.rpartition(".")
    if last != "bias" or name in known:
      return False
    packed = hasattr(tensors.get(f"{module}.weight"), "leaf")
    return packed and not tensors[name].read().any()

  return {k: t for k, t in tensors.items() if not superfluous(k)}


def joined(leaves: Sequence[Any], where: str) -> Any:
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


def stack(*arrays: unread.Unread) -> unread.Unread:
  """Returns unread arrays behind a leading axis."""

  def filler(x):
    def fill(index, out):
      out[...] = x.read(index)

    return fill

  fills = [filler(x) for x in arrays]
  first = arrays[0]
  return unread.stacked(fills, (len(arrays),), first.shape, first.dtype)
