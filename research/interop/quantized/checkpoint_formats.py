"""What other tools' checkpoints hold: which matrices fit, and their tensors.

A writer looks at each matrix, settles on what its config can say of all of
them, and writes those that fit, without loss. What does not fit is the
caller's to quantize again, in the format that the writer gives.
"""

import collections
import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from research.interop.quantized import (
  awq,
  bnb,
  compressed_config,
  compressed_tensors,
  gptq,
)
from research.interop.quantized.integers import Integers, to_integers
from research.quant.format import Format
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.formats.fp8 import FP8
from research.quant.formats.int8 import Int8
from research.quant.formats.microscaling import Microscaling
from research.quant.formats.nvfp4 import NVFP4
from research.quant.llm_int8 import Outliers
from research.quant.qtensor import QTensor
from research.typing import UserError

GROUPS = (128, 64, 32)
"""Sizes of groups that are tried for what is quantized again."""

Tensors = Mapping[str, np.ndarray]


@runtime_checkable
class CheckpointFormat(Protocol):
  """A tool's checkpoints.

  Attributes:
    files: names of files, beside config.json, that have its config, too.
    shapes_vary: whether sizes of a matrix's tensors follow from its numbers.
    head: whether a packed head stays packed.
    activations: how inputs of matrices are rounded, as a source's are; None if
      they are not.
  """

  files: tuple[str, ...]
  shapes_vary: bool
  head: bool
  activations: Any

  def describe(self, w: QTensor, where: str) -> Hashable:
    """Returns what a config would say of a matrix, if it fits one."""
    ...

  def choose(self, found: Sequence[Any], inputs: Sequence[int]) -> Any:
    """Returns what the config says of all matrices."""
    ...

  def mismatch(self, found: Any, scheme: Any) -> str: ...

  def format(self, scheme: Any) -> Format:
    """Returns what a matrix is quantized to that does not fit."""
    ...

  def tensors(self, w: QTensor, scheme: Any, where: str) -> Tensors: ...

  def config(
    self, scheme: Any, found: Mapping[str, Any], plain: Sequence[str]
  ) -> dict[str, Any]:
    """Returns the `quantization_config`.

    Args:
      plain: linear modules that are not quantized.
    """
    ...


@dataclasses.dataclass(frozen=True)
class _Grid:
  """What GPTQ's and AWQ's configs say of a matrix."""

  bits: int
  group: int
  inputs: int
  symmetric: bool
  ordered: bool
  zero: bool  # whether some zero is 0

  def fits(self, bits: int, group: int) -> bool:
    return self.bits == bits and self.group == (group or self.inputs)


def _grid(x: Integers) -> _Grid:
  return _Grid(
    bits=x.bits,
    group=x.size,
    inputs=len(x.group),
    symmetric=x.symmetric,
    ordered=x.ordered,
    zero=not x.zero.all(),
  )


def _common(
  found: Sequence[_Grid], bits: int | None, group: int | None
) -> tuple[int, int] | None:
  """Returns the (bits, group) of most matrices, 0 for all their inputs."""
  found = [x for x in found if x.fits(bits or x.bits, _wanted(group, x))]
  if group is not None:
    return (found[0].bits, group) if found else None
  counts = collections.Counter((x.bits, x.group) for x in found)
  counts += collections.Counter(
    (x.bits, 0) for x in found if x.group == x.inputs
  )
  # Of two that say the same of all matrices, whole rows are the plainer.
  return max(counts, key=lambda k: (counts[k], k[1] == 0), default=None)


def _wanted(group: int | None, x: _Grid) -> int:
  return x.group if group is None else group


def _group(group: int | None, inputs: Sequence[int]) -> int:
  """Returns the size of groups of matrices with so many inputs."""
  if group is not None:
    return group
  whole = [g for g in GROUPS if all(n % g == 0 for n in inputs)]
  return whole[0] if whole else 0


@dataclasses.dataclass(frozen=True)
class Gptq:
  """GPTQ's.

  Attributes:
    bits: that are wanted, or None for those of most matrices.
    group: that is wanted, 0 for all inputs; None for that of most matrices.
    version: that is wanted; the other one where zeros are 0.
    head: as in `CheckpointFormat`. transformers opens no packed head: it says
      that the weight is missing, and draws one.
  """

  bits: int | None = None
  group: int | None = None
  version: int = 1
  files: tuple[str, ...] = ("quantize_config.json",)
  shapes_vary: bool = False
  head: bool = False
  activations: None = None

  def describe(self, w: QTensor, where: str) -> _Grid:
    x = to_integers(w, where)
    gptq.to_tensors(x, 2, where)
    return _grid(x)

  def choose(
    self, found: Sequence[_Grid], inputs: Sequence[int]
  ) -> gptq.Scheme:
    common = _common(found, self.bits, self.group)
    if common is None:
      common = (self.bits or 4, _group(self.group, inputs))
    some = [x for x in found if x.fits(*common)]
    symmetric = all(x.symmetric for x in some)
    # What is yet to be rounded may get a zero of 0.
    rounded = len(inputs) > 0 or len(some) < len(found)
    zero = any(x.zero for x in some) or (rounded and not symmetric)
    return gptq.Scheme(
      bits=common[0],
      group=common[1],
      symmetric=symmetric,
      act_order=not all(x.ordered for x in some),
      version=2 if zero else self.version,
    )

  def mismatch(self, found: _Grid, scheme: gptq.Scheme) -> str:
    return _differs(found, scheme.bits, scheme.group)

  def format(self, scheme: gptq.Scheme) -> Format:
    return Affine(
      bits=scheme.bits, block=scheme.group, symmetric=scheme.symmetric
    )

  def tensors(self, w: QTensor, scheme: gptq.Scheme, where: str) -> Tensors:
    return gptq.to_tensors(to_integers(w, where), scheme.version, where)

  def config(
    self, scheme: gptq.Scheme, found: Mapping[str, Any], plain: Sequence[str]
  ) -> dict[str, Any]:
    head = any(module == "lm_head" for module in found)
    config = gptq.config(dataclasses.replace(scheme, head=head))
    inner = [_inner(module) for module in plain if _inner(module)]
    if inner:
      kept = sorted({_inner(m) for m in found if _inner(m)} - {*inner})
      config["modules_in_block_to_quantize"] = [[name] for name in kept]
    return config


def _inner(module: str) -> str:
  """Returns a module's name within its layer, or "" outside of layers."""
  _, inside, name = module.partition(".layers.")
  return name.partition(".")[2] if inside else ""


def _differs(found: _Grid, bits: int, group: int) -> str:
  if found.fits(bits, group):
    return ""
  return (
    f"bits and group do not fit: found {found.bits} and {found.group}, "
    f"expected {bits} and {group or 'all inputs'}, as the config says of all"
  )


@dataclasses.dataclass(frozen=True)
class Awq:
  """AWQ's.

  Attributes:
    group: that is wanted, 0 for all inputs; None for that of most matrices.
  """

  group: int | None = None
  files: tuple[str, ...] = ()
  shapes_vary: bool = False
  head: bool = False
  activations: None = None

  def describe(self, w: QTensor, where: str) -> _Grid:
    x = to_integers(w, where)
    awq.to_tensors(x, where)
    return _grid(x)

  def choose(self, found: Sequence[_Grid], inputs: Sequence[int]) -> awq.Scheme:
    common = _common(found, 4, self.group)
    common = common or (4, _group(self.group, inputs))
    return awq.Scheme(group=common[1])

  def mismatch(self, found: _Grid, scheme: awq.Scheme) -> str:
    return _differs(found, 4, scheme.group)

  def format(self, scheme: awq.Scheme) -> Format:
    return Affine(bits=4, block=scheme.group)

  def tensors(self, w: QTensor, scheme: awq.Scheme, where: str) -> Tensors:
    return awq.to_tensors(to_integers(w, where), where)

  def config(
    self, scheme: awq.Scheme, found: Mapping[str, Any], plain: Sequence[str]
  ) -> dict[str, Any]:
    config = awq.config(scheme)
    return config | {"modules_to_not_convert": list(plain) or None}


@dataclasses.dataclass(frozen=True)
class Bnb:
  """bitsandbytes'.

  Attributes:
    kind: `"nf4"`, `"fp4"` or `"int8"`; None for that of most matrices.
    activations: how inputs are rounded where codes have 8 bits; None for its
      default.
  """

  kind: str | None = None
  files: tuple[str, ...] = ()
  shapes_vary: bool = True
  head: bool = False
  activations: Outliers | None = None

  def describe(self, w: QTensor, where: str) -> tuple[str, bool, str]:
    bnb.to_tensors(w, where)
    if not isinstance(w.format, Codebook):
      return "int8", False, w.of
    return w.format.kind, bool(w.format.nested), w.of

  def choose(
    self, found: Sequence[tuple[str, bool, str]], inputs: Sequence[int]
  ) -> tuple[str, bool, str]:
    counts = collections.Counter(x for x in found if self.kind in (None, x[0]))
    default = (self.kind or "nf4", self.kind != "int8", "float32")
    return max(counts, key=lambda k: counts[k], default=default)

  def mismatch(self, found: Any, scheme: Any) -> str:
    if found[0] == scheme[0]:
      return ""
    return f"format does not fit: found {found[0]}, expected {scheme[0]}"

  def format(self, scheme: tuple[str, bool, str]) -> Format:
    kind, nested, _ = scheme
    if kind == "int8":
      return Int8()
    return Codebook(kind=kind, nested=256 if nested else 0)

  def tensors(self, w: QTensor, scheme: Any, where: str) -> Tensors:
    return bnb.to_tensors(w, where)

  def config(
    self, scheme: Any, found: Mapping[str, Any], plain: Sequence[str]
  ) -> dict[str, Any]:
    op = self.activations or Outliers(threshold=bnb.THRESHOLD)
    return bnb.config(*scheme, skipped=plain, threshold=op.threshold)


COMPRESSED = {
  "int4": Affine(bits=4, symmetric=True, block=0, scale_dtype="float32"),
  "int8": Affine(bits=8, symmetric=True, block=0, scale_dtype="float32"),
  "fp8": FP8(),
  "nvfp4": NVFP4(),
  "mxfp4": Microscaling(),
}
"""What compressed-tensors can be asked to quantize to."""


@dataclasses.dataclass(frozen=True)
class Compressed:
  """compressed-tensors', whose config has a scheme for each kind of matrix.

  Attributes:
    kind: of what is quantized again, a key of `COMPRESSED`.
    group: of its integers; 0 for all inputs.
    activations: how inputs are rounded, `input_activations` of its config.
  """

  kind: str = "int4"
  group: int | None = None
  files: tuple[str, ...] = ()
  shapes_vary: bool = False
  head: bool = True
  activations: Mapping[str, Any] | None = None

  def describe(self, w: QTensor, where: str) -> compressed_config.Scheme:
    try:
      return compressed_tensors.scheme_of(w)
    except UserError as e:
      raise UserError(f"{where}: {e}") from e

  def choose(self, found: Sequence[Any], inputs: Sequence[int]) -> int:
    return _group(self.group, inputs)

  def mismatch(self, found: Any, scheme: Any) -> str:
    return ""

  def format(self, scheme: int) -> Format:
    format = COMPRESSED[self.kind]
    if isinstance(format, Affine):
      return dataclasses.replace(format, block=scheme)
    return format

  def tensors(self, w: QTensor, scheme: Any, where: str) -> Tensors:
    return compressed_tensors.to_tensors(w)

  def config(
    self, scheme: Any, found: Mapping[str, Any], plain: Sequence[str]
  ) -> dict[str, Any]:
    return compressed_config.write(found, plain, self.activations)
