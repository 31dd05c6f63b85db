"""Formats that `convert` writes: Hugging Face's, llama.cpp's, PEFT's and ours.

Quantized directories of other tools are in `quantized`.
"""

import dataclasses
from typing import Any, ClassVar

from experiments.converting import rounding
from experiments.converting.conversion import (
  Conversion,
  MergesAdapters,
  SupportsDiffusion,
  Writer,
  WritesShards,
  Written,
)
from experiments.converting.rounding import Rounding
from experiments.core import cli
from experiments.core.choices import argument, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFace(SupportsDiffusion, WritesShards, MergesAdapters):
  """A Hugging Face directory of safetensors."""

  rounding: Rounding = option(
    "nearest",
    "Rounding of merged weights. Stochastic keeps small updates on average.",
  )

  def writer(self) -> Writer:
    from research.interop import convert

    size, how = self.shard_bytes, rounding.make(self.rounding)
    return lambda source, to: Written(
      convert.to_hf(source, to, self.dtype, size, how, self.least_kept)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gguf(MergesAdapters):
  """A .gguf file of llama.cpp's; without a TYPE each tensor keeps its own."""

  type: str | None = argument("TYPE")
  fallback: bool = option(
    False, "Store rows that blocks do not divide as llama.cpp does."
  )
  imatrix: str | None = option(
    None, "A file of importances, which errors are weighed by."
  )

  def writer(self) -> Writer:
    from research.interop.gguf import imatrix
    from research.interop.gguf import recipe as gguf_recipe

    importances = None
    if self.imatrix is not None:
      importances = imatrix.read(self.imatrix).means()
    recipe = gguf_recipe.Recipe(
      self.type and self.type.upper(), self.fallback, importances
    )
    from research.interop import convert

    def write(source, to):
      log, reason, written = convert.to_gguf(
        source, to, recipe, self.least_kept
      )
      return Written(log, reason, _report_fallbacks(written))

    return write


def _report_fallbacks(written: Any) -> dict[str, Any]:
  """Prints tensors of a type that was not asked for; returns the counts."""
  if written.window is not None:
    cli.say(
      f"a window of {written.window} tokens is in the file, but llama.cpp has "
      "none in architecture 'llama', whose attention is causal throughout"
    )
  kinds: dict[str, list[str]] = {}
  for name, (want, have) in written.otherwise.items():
    kinds.setdefault(f"{want} -> {have}", []).append(name)
  for kind, names in kinds.items():
    cli.say(
      f"blocks do not divide the rows of {len(names)} tensors, {kind}: "
      f"{names[0]} ..."
    )
  return {
    "bits_per_weight": written.bits_per_weight,
    "fallbacks": {kind: len(names) for kind, names in kinds.items()},
  }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peft(Conversion):
  """An adapter in PEFT's format; its tokenizer is the base's."""

  has_tokenizer: ClassVar[bool] = False

  base: str | None = option(
    None, "The model that the adapter is for, if it does not say."
  )
  rslora: bool = option(False, "State scales as alpha / sqrt(rank).")

  def writer(self) -> Writer:
    from research.interop import convert

    return lambda source, to: Written(
      convert.to_peft(source, to, self.base, self.rslora)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufAdapter(Conversion):
  """An adapter for llama.cpp, in F32 (the default), F16 or BF16."""

  has_tokenizer: ClassVar[bool] = False

  type: str | None = argument("TYPE")

  def writer(self) -> Writer:
    from research.interop import convert

    kind = (self.type or "F32").upper()
    return lambda source, to: Written(convert.to_gguf_adapter(source, to, kind))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Orbax(SupportsDiffusion):
  """Our checkpoint: every bit, adapters and packed weights included."""

  def writer(self) -> Writer:
    from research.interop import convert

    return lambda source, to: Written(convert.to_orbax(source, to))
