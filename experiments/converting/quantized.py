"""Other tools' quantized directories that `convert` writes."""

import dataclasses
from typing import Any

from experiments.converting.conversion import (
  MergesAdapters,
  Writer,
  WritesShards,
  Written,
)
from experiments.core.choices import argument, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Quantized(WritesShards, MergesAdapters):
  """A directory of another tool's, whose matrices are packed."""

  requantize: bool = option(
    False, "Round matrices that do not fit the format to nearest."
  )

  def tool(self, source: Any) -> Any:
    """Returns the tool's `checkpoint_formats.CheckpointFormat` for a source."""
    raise NotImplementedError

  def writer(self) -> Writer:
    from research.interop import convert

    size = self.shard_bytes
    return lambda source, to: Written(
      convert.to_quantized(
        source,
        to,
        self.tool(source),
        self.requantize,
        self.dtype,
        size,
        self.least_kept,
      )
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Grouped(_Quantized):
  """A format of integers, groups of which share a scale."""

  group_size: int | None = option(
    None,
    "Inputs that share a scale, 0 for all. By default those of most packed "
    "matrices; else 128, 64 or 32, the first that divides all.",
    least=0,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gptq(_Grouped):
  """GPTQ's directory."""

  bits: str | None = argument("BITS", "2", "3", "4", "8")

  def tool(self, source: Any) -> Any:
    """Returns GPTQ's writer, in the version that the source was in."""
    from research.interop.quantized import checkpoint_formats, gptq

    before = source.origin.get("came_from", source.origin)
    said = before.get("quantization") or {}
    version = gptq.VERSIONS.get(said.get("checkpoint_format"), 1)
    # transformers opens no packed head, so only what came with one has one.
    head = said.get("lm_head") is True
    bits = None if self.bits is None else int(self.bits)
    return checkpoint_formats.Gptq(bits, self.group_size, version, head=head)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Awq(_Grouped):
  """AWQ's directory."""

  def tool(self, source: Any) -> Any:
    from research.interop.quantized import checkpoint_formats

    del source
    return checkpoint_formats.Awq(self.group_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitsAndBytes(_Quantized):
  """bitsandbytes' directory."""

  type: str | None = argument("TYPE", "nf4", "fp4", "int8")

  def tool(self, source: Any) -> Any:
    from research.interop.quantized import checkpoint_formats
    from research.quant.llm_int8 import Outliers

    ops = [op for op in source.activations if isinstance(op, Outliers)]
    kept = ops[0] if len(ops) == 1 and self.type in (None, "int8") else None
    return checkpoint_formats.Bnb(self.type, activations=kept)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressedTensors(_Grouped):
  """compressed-tensors' directory."""

  type: str | None = argument("TYPE", "int4", "int8", "fp8", "nvfp4", "mxfp4")

  def tool(self, source: Any) -> Any:
    from research.interop.quantized import checkpoint_formats

    given, *more = source.activations or [None]
    alike = given if all(x == given for x in more) else None
    return checkpoint_formats.Compressed(
      self.type or "int4", self.group_size, activations=_measured(alike)
    )


def _measured(activations: Any) -> Any:
  """Returns what rounds inputs if it needs no tensors of a calibration."""
  given = activations if isinstance(activations, dict) else {}
  return activations if given.get("dynamic") is True else None
