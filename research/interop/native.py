"""Our own checkpoint of a model: nothing is rounded, decoded or merged.

But for weights that are codes while they are trained (`int8_weights`): a reader
has no use for them as such, and gets the numbers that they stand for.

A directory with `heptad.json` (which leaf is what, and where it came from),
`config.json` (Hugging Face's, which describes the model), the arrays in
Orbax's format, and what came with the source: tokenizer files, or the
metadata of a GGUF file as one without tensors.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research import progress, weights
from research.interop import gguf, parts
from research.interop.gguf import config as gguf_config
from research.interop.hf import config as hf_config
from research.interop.loaded import NOTE
from research.io import safetensors, unread
from research.io.fields import Fields
from research.lora.adapted import AdaptedTensor
from research.lora.method import Method
from research.lora.methods import all_methods
from research.nn import presets
from research.nn.transformer import Transformer
from research.quant.activations import InputTensor, Op
from research.quant.format import Format
from research.quant.formats import all_formats
from research.quant.ops import OPS
from research.quant.qtensor import QTensor
from research.quant.untied_embedding import Untied
from research.text.tokenizer import Tokenizer
from research.training.checkpoints import frozen_base
from research.typing import Params, UserError

METADATA = "metadata.gguf"
ARRAYS = "arrays"
VERSION = 1

LEAVES = {
  kind.__name__: kind for kind in (QTensor, AdaptedTensor, InputTensor, Untied)
}
"""Weights that are no arrays, by the names that the note has for them."""

_DTYPES = (
  *("float32", "bfloat16", "float16", "float64"),
  *("int8", "uint8", "int16", "int32", "uint32"),
)


def save(
  directory: pathlib.Path,
  model: Transformer,
  params: Params,
  config: Mapping[str, Any],
  source: Mapping[str, Any],
) -> None:
  """Writes a checkpoint into an empty directory."""
  params = _numbers(params)
  note = dict(
    version=VERSION,
    source=dict(source),
    weights=_describe(params),
  )
  safetensors.write_json(directory / "config.json", config)
  with progress.phase(f"writing {directory.name}"):
    frozen_base.record_base(directory / ARRAYS, params, None)
  # Last: where there is a note, the checkpoint is whole.
  safetensors.write_json(directory / NOTE, note)


def _numbers(params: Params) -> Any:
  """Returns `params` with what is trained as codes as the numbers it is."""

  coded = weights.is_renewable
  return jax.tree.map(
    lambda w: w.dense() if coded(w) else w, params, is_leaf=coded
  )


def _describe(x: Any) -> Any:
  """Returns what is needed to make `x`'s structure again, as JSON."""
  if x is None:
    return None
  if isinstance(x, Mapping):
    return {key: _describe(value) for key, value in x.items()}
  if not weights.is_weight(x):
    return [str(x.dtype), *x.shape]
  name = type(x).__name__
  if name not in LEAVES:
    raise UserError(f"a checkpoint cannot hold weights of type {name}")
  fields = {}
  for f in dataclasses.fields(x):
    value = getattr(x, f.name)
    static = f.metadata.get("static")
    fields[f.name] = _to_json(value) if static else _describe(value)
  return {"": name} | fields


def _abstract(found: Any, where: str) -> Any:
  """Returns the tree that a note describes, of shapes instead of arrays."""
  if found is None:
    return None
  if isinstance(found, list):
    ok = found and found[0] in _DTYPES and len(found) <= 9
    if not ok or any(type(n) is not int or n < 0 for n in found[1:]):
      raise UserError(f"{where}: {str(found)[:60]} is no type and shape")
    return jax.ShapeDtypeStruct(tuple(found[1:]), jnp.dtype(found[0]))
  if not isinstance(found, dict):
    raise UserError(f"{where}: found {str(found)[:60]}, expected an object")
  if "" not in found:
    return {k: _abstract(v, f"{where}: {k}") for k, v in found.items()}
  kind = LEAVES.get(found[""]) if isinstance(found[""], str) else None
  if kind is None:
    raise UserError(
      f"{where}: a weight of type {str(found[''])[:60]}, expected one of "
      f"{', '.join(LEAVES)}"
    )
  names = {f.name: f for f in dataclasses.fields(kind)}
  # Notes of a batch are None in a checkpoint, and may be younger than it.
  needed = {name for name, f in names.items() if f.default is not None}
  if not needed <= set(found) - {""} <= set(names):
    raise UserError(f"{where}: {found['']} has fields {', '.join(names)}")
  values = {}
  for name, f in names.items():
    value = found.get(name)
    if not f.metadata.get("static"):
      value = _abstract(value, f"{where}: {name}")
    else:
      value = _from_json(value, f, f"{where}: {name}")
    values[name] = value
  made = kind(**values)
  if weights.is_packed(made):
    _check_parts(made, where)
  return made


def _check_parts(w: QTensor, where: str) -> None:
  """Raises UserError unless a packed leaf's parts are its format's."""
  try:
    format = w.format.for_shape(w.inputs, w.outputs)
    want = format.shapes(w.inputs, w.outputs)
  except (ValueError, TypeError, ZeroDivisionError) as error:
    raise UserError(
      f"{where}: {w.format.name} holds no matrix of {w.inputs} inputs and "
      f"{w.outputs} outputs: {error}"
    ) from error
  for name in sorted(set(w.parts) | set(want)):
    found, needed = w.parts.get(name), want.get(name)
    if found is not None and needed is not None:
      tail = found.shape[len(found.shape) - len(needed.shape) :]
      if (tail, found.dtype) == (needed.shape, needed.dtype):
        continue
    raise UserError(
      f"{where}: {name} of {w.format.name} is {found}, expected {needed} "
      "behind its leading axes; convert the model again"
    )


def _to_json(value: Any) -> Any:
  """Returns a static field as JSON: itself, or a value's name and fields."""
  if isinstance(value, Method | Format | Op):
    return {"": type(value).__name__} | dataclasses.asdict(value)
  return value


def _tupled(x: Any) -> Any:
  return tuple(map(_tupled, x)) if isinstance(x, list) else x


def _from_json(value: Any, field: Any, where: str) -> Any:
  """Returns a static field; inverts `_to_json`."""
  if not isinstance(field.default, Format | Op | type(dataclasses.MISSING)):
    if type(value) is not type(field.default):
      raise UserError(f"{where} is {str(value)[:60]}")
    return value
  listed = {"format": all_formats, "op": lambda: OPS}
  kinds = listed.get(field.name, all_methods)()
  if not isinstance(value, dict) or value.get("") not in kinds:
    raise UserError(
      f"{where} is {str(value)[:60]}, expected one of {', '.join(kinds)}"
    )
  kind = kinds[value[""]]
  given = {k: v for k, v in value.items() if k}
  known = {f.name: type(f.default) for f in dataclasses.fields(kind)}
  for name, x in given.items():
    if known.get(name) is tuple and isinstance(x, list):
      given[name] = x = _tupled(x)  # JSON has no tuples
    if known.get(name) is float and type(x) is int:
      given[name] = x = float(x)  # as `LoRA(alpha=16)` had it
    if name not in known or type(x) is not known[name]:
      raise UserError(f"{where}: {name} is {str(x)[:60]}")
  return kind(**given)


def load(
  directory: pathlib.Path,
  dtype: str = "float32",
  shardings: unread.Shardings | None = None,
  config: Mapping[str, Any] | None = None,
) -> tuple[Transformer, dict[str, Any], dict[str, Any]]:
  """Returns (model, params as they were saved, source) of a checkpoint.

  Args:
    shardings: where the arrays go, see `unread.place`.

  Raises:
    UserError: it is damaged, or of a later version.
  """
  file = directory / NOTE
  note = Fields(safetensors.read_json(file), str(file))
  if note.get("version") != VERSION:
    raise note.wrong("version", f"{VERSION}; update Heptad, or convert again")
  if config is None:
    config = safetensors.read_json(directory / "config.json")
  family, sizes = hf_config.sizes_from_config(
    config, str(directory / "config.json")
  )
  model = presets.transformer(family, sizes, dtype)
  target = _abstract(note.get("weights"), f"{file}: weights")
  _fits(file, model, target)
  if shardings is unread.unplaced:
    params = target
  else:
    params = frozen_base.load_frozen(directory / ARRAYS, _on(target, shardings))
  source = note.object("source")
  return model, params, dict(source.values) if source else {}


def _on(target: Any, shardings: unread.Shardings | None) -> Any:
  """Returns `target` with the sharding that each of its arrays will have."""
  if shardings is None:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    where = jax.tree.map(lambda x: here, target)
  else:
    where = shardings(target)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    target,
    where,
  )


def cast(params: Params, dtype: str, packed: bool) -> Any:
  """Returns `params` in `dtype`; adapters stay in float32.

  Args:
    packed: whether packed weights stay as they are, or are decoded.
  """

  def one(x):
    if weights.unwrap(x) is not None:
      return dataclasses.replace(x, w=one(x.w))
    if weights.is_weight(x):
      return x if packed else x.dense().astype(dtype)
    return x.astype(dtype)

  return jax.tree.map(one, params, is_leaf=weights.is_weight)


def tokenizer(directory: pathlib.Path) -> Tokenizer | None:
  """Returns the tokenizer that came with the source, or None."""
  if (directory / "tokenizer.json").is_file():
    return Tokenizer.from_directory(directory)
  file = directory / METADATA
  if not file.is_file():
    return None
  found = gguf.open_gguf(file).metadata
  if not gguf_config.has_tokenizer(found):
    return None
  return Tokenizer.from_gguf(found)


def _fits(file: pathlib.Path, model: Transformer, target: Any) -> None:
  """Raises UserError unless `target` has the logical shapes of `model`."""
  want = {
    str(address): slot.one
    for slot in parts.slots(model)
    for address in slot.addresses
  }
  try:
    found = parts.from_params(target)
    have = {str(address): p.shape for address, p in found.items()}
  except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
    raise UserError(
      f"{file}: weights: not the structure of a model: {str(e)[:80]}"
    ) from e
  for path in sorted(have.keys() | want.keys()):
    if have.get(path) != want.get(path):
      raise UserError(
        f"{file}: weights: {path} has shape {have.get(path)}, expected "
        f"{want.get(path)} by config.json"
      )
