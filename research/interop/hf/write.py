"""A model as a Hugging Face directory: its tensors and config.json."""

import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from research.interop import hf
from research.interop.diffusion import spec
from research.interop.hf import config as hf_config
from research.interop.hf import llada, llada2
from research.interop.hf import names as hf_names
from research.interop.hf.families import MODEL_TYPES
from research.interop.parts import Address, Part, Parts, ordered
from research.io import safetensors
from research.lora.merge import changes
from research.nn import presets
from research.nn.transformer import Transformer
from research.typing import UserError


def tensors(
  model: Transformer,
  parts: Parts,
  dtype: str | None,
  log: changes.Log,
  rounding: changes.Rounding = changes.cast,
) -> dict[str, safetensors.Pending]:
  """Returns every tensor under its name in Hugging Face's files, unread.

  Args:
    model: whose parameters `parts` are.
    parts: packed weights are decoded, adapters merged in float32.
    dtype: to round to; None for each one's own (float32 if packed).
  """
  rows, out = hf.table(model), {}
  for address in ordered(parts):
    name, transposed = _named(rows, address)
    row = hf_names.Row(address.path, name, transposed)
    out[name] = pending(row, parts[address], dtype, log, rounding)
  return out


def pending(
  row: hf_names.Row,
  part: Part,
  dtype: str | None,
  log: changes.Log,
  rounding: changes.Rounding = changes.cast,
) -> safetensors.Pending:
  """Returns one tensor of a file, unread."""
  kind = dtype or ("float32" if part.packed else part.kind)
  shape = part.shape[::-1] if row.transposed else part.shape
  make = _maker(row.theirs, part, kind, row.transposed, log, rounding)
  return safetensors.Pending(shape, _dtype(kind), make)


def _dtype(kind: str) -> np.dtype:
  return np.dtype(kind if kind != "bfloat16" else ml_dtypes.bfloat16)


def _named(rows: hf_names.Table, address: Address) -> tuple[str, bool]:
  try:
    return rows.theirs(address)
  except KeyError as e:
    raise UserError(
      f"{address}: Hugging Face's files have no name for such a parameter in "
      "this family; keep the model as --format=orbax"
    ) from e


def _maker(name: str, part: Part, kind: str, transposed: bool, log, rounding):
  def make():
    found = changes.dense_weight(part.read())
    to = changes.cast if found.base is None else rounding
    x = to(name, found.array, _dtype(kind))
    if found.base is not None:
      alone = to(name, found.base, _dtype(kind))
      log.compared(name, part.kind, kind, found, x, alone)
    elif x is found.array:
      log.same(name, part.kind, kind)
    else:
      log.compared(name, part.kind, kind, found, x)
    return x.T if transposed else x

  return make


def config_json(
  model: Transformer,
  given: Mapping[str, Any] | None,
  dtype: str | None,
  hint: str | None = None,
) -> dict[str, Any]:
  """Returns config.json: the one given if it describes `model`, or a new one.

  It names the class, which other readers ask for, also where the source had no
  config.json or one without.
  """
  if given is not None and _describes(given, model):
    config = dict(given)
  else:
    config = hf_config.describe(model, hint)
    # Gemma 3's files have the ends of turns outside of `text_config`.
    ids = {**given, **(given.get("text_config") or {})} if given else {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
      if name in ids:
        config[name] = ids[name]
    how = spec.from_config(given) if given else None
    if how is not None:
      config[spec.FIELD] = how.to_config()
  known = MODEL_TYPES.get(config["model_type"])
  if known is not None and not config.get("architectures"):
    config = config | {"architectures": [known.architecture]}
  if dtype is not None:
    old = "torch_dtype" in config or "dtype" not in config
    config["torch_dtype" if old else "dtype"] = dtype
  return config


def plain_config(given: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
  """Returns a config.json for tensors under the usual names.

  Args:
    given: of any model; LLaDA's becomes a Llama's, or a Qwen3-MoE's, that says
      what its mask is.

  Raises:
    UserError: there is no such config.json: LLaDA 2's.
  """
  kind = given.get("model_type") if given is not None else None
  if kind == llada2.KIND:
    raise UserError(
      f"model_type is {kind!r}: quantized files of this family have no "
      "standard names of tensors; expected --format=hf or orbax"
    )
  if kind not in llada.KINDS:
    return given
  how = spec.from_config(given)
  diffusion = {spec.FIELD: how.to_config()} if how is not None else {}
  return llada.to_known_config(given, "config.json") | diffusion


def _describes(config: Mapping[str, Any], model: Transformer) -> bool:
  if config.get("model_type") == "gemma3":  # more than its text part
    return False
  try:
    family, sizes = hf_config.sizes_from_config(config)
  except UserError:
    return False
  return presets.transformer(family, sizes, model.dtype) == model.clone(
    remat="none"
  )


def write_model(
  directory: pathlib.Path,
  model: Transformer,
  parts: Parts,
  config: Mapping[str, Any],
  dtype: str | None,
  shard_size: int,
  log: changes.Log,
  rounding: changes.Rounding = changes.cast,
) -> None:
  """Writes the tensors and config.json into an empty directory."""
  found = tensors(model, parts, dtype, log, rounding)
  kind = config["model_type"]
  if kind in llada.KINDS and not llada.is_mixture(config):
    found = llada.to_llada_names(found)
  elif kind == llada2.KIND:
    found = llada2.to_llada2_names(found)
  safetensors.write_directory(directory, found, shard_size)
  safetensors.write_json(directory / "config.json", config)
