"""The weights of `--model=`: their type, and whether they stay quantized."""

import dataclasses
from typing import Any

from absl import flags

from experiments.core import cli
from experiments.core.definers import definers
from research.errors import UserError


def define_dtype(values: flags.FlagValues) -> flags.FlagHolder:
  """Defines `--dtype` of a command that reads or generates text."""
  return definers(values).choice(
    "dtype",
    "Of weights and computation.",
    default="float32",
    enum_values=["float32", "bfloat16", "float16"],
  )


def define(values: flags.FlagValues) -> None:
  """Defines `--packed` of a command that reads or generates text."""
  definers(values).switch(
    "packed",
    "Keep quantized weights packed in memory, or dequantize them (--nopacked). "
    "By default they are kept if this machine has a kernel for them, which "
    "saves time and memory and gives the same text; those of Hugging Face "
    "directories are always kept.",
    default=None,
  )


def load(
  name: str,
  dtype: str = "float32",
  packed: bool | None = None,
  towers: Any = "language",
) -> Any:
  """Returns a model, its quantized weights as `--packed` has them."""
  cli.loading(name)
  from research.interop.load import load_model
  from research.quant.layouts import cpu_layout

  if packed is not None:
    return load_model(name, dtype, packed, towers=towers)
  loaded = load_model(name, dtype, "any", towers=towers)
  if "quantization" in _root(loaded.source):
    return loaded
  params = cpu_layout.decode_unsupported(loaded.params, dtype)
  return dataclasses.replace(loaded, params=params)


def load_with_tokenizer(
  name: str, dtype: str, packed: bool | None, towers: Any = "language"
) -> Any:
  """Returns a model that reads text, see `load`.

  Raises:
    UserError: it has no tokenizer.
  """
  loaded = load(name, dtype, packed, towers)
  if loaded.tokenizer is None:
    raise UserError(f"--model={name}: found no tokenizer in it")
  return loaded


def report(params: Any) -> dict[str, list[str]]:
  """Returns a command's entry for its result: the formats that are kept."""
  from research.quant.reports import report_errors

  return {"packed": report_errors.format_names(params)}


def _root(source: dict[str, Any]) -> dict[str, Any]:
  """Returns where the model itself came from, adapters aside."""
  while isinstance(source.get("base"), dict):
    source = source["base"]
  return source
