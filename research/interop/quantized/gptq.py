"""GPTQ's checkpoints, as AutoGPTQ, GPTQModel and their readers have them.

A module `P` of `[out, in]` has `P.qweight`, int32 `[in b / 32, out]`, codes
packed along the inputs; `P.qzeros` `[G, out b / 32]`, along the outputs;
`P.scales` `[G, out]`; and `P.g_idx`, the group of each input. Version 1 of the
format stores zeros less 1, and so has none for 0; version 2 stores them as
they are. Files of version 2 exist that say 1, so the numbers are asked.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from research.interop.quantized.integers import Integers
from research.io.fields import Fields
from research.quant.formats.affine import Affine
from research.quant.layouts import bitstream
from research.quant.qtensor import QTensor
from research.typing import UserError

METHOD = "gptq"
MARK = "qweight"
NAMES = ("qweight", "qzeros", "scales", "g_idx")
VERSIONS = {"gptq": 1, "gptq_v2": 2}
BITS = (2, 3, 4, 8)

FIELDS = {
  *("quant_method", "bits", "group_size", "sym", "desc_act", "lm_head"),
  *("format", "checkpoint_format", "dynamic", "is_marlin_format"),
  *("pack_dtype", "adapter", "rotation"),
  # How codes were found.
  *("damp_percent", "damp_auto_increment", "true_sequential", "static_groups"),
  *("act_group_aware", "mse", "dataset", "tokenizer", "batch_size"),
  *("pad_token_id", "model_seqlen", "max_input_length", "cache_block_outputs"),
  *("cache_examples_on_gpu", "block_name_to_quantize", "meta", "quantizer"),
  *("module_name_preceding_first_block", "modules_in_block_to_quantize"),
  *("model_name_or_path", "model_file_base_name"),
  # How programs run them.
  *("backend", "use_cuda_fp16", "use_exllama", "disable_exllama"),
  *("exllama_config", "modules_to_not_convert"),
}
"""Of a config; which modules are packed is asked of the tensors."""

NEUTRAL = {
  "dynamic": (None, {}),
  "is_marlin_format": (None, False),
  "pack_dtype": (None, "int32"),
  "adapter": (None,),
  "rotation": (None,),
}
"""Fields that must not change anything."""

_SCALES = ("float16", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
  """How all modules of a checkpoint are kept.

  Attributes:
    bits: of a code.
    group: inputs that share a scale, 0 for all of them.
    symmetric: whether zeros are the middle code.
    act_order: whether groups are not of neighbours.
    version: of the zeros, 1 or 2.
    head: whether the head is packed, too.
  """

  bits: int = 4
  group: int = 128
  symmetric: bool = True
  act_order: bool = False
  version: int = 1
  head: bool = False

  @property
  def middle(self) -> int:
    return 1 << (self.bits - 1)


def parse(values: Mapping[str, Any], where: str) -> Scheme:
  """Returns what a `quantization_config` or quantize_config.json says.

  Raises:
    UserError: a field is wrong, or means what is not supported.
  """
  fields = Fields(values, where, dict(group_size=128, sym=True))
  fields.known(FIELDS)
  bits = fields.integer("bits")
  if bits not in BITS:
    raise fields.wrong("bits", f"one of {', '.join(map(str, BITS))}")
  group = fields.get("group_size")
  if group != -1:
    group = fields.integer("group_size")
  name = "format" if "format" in values else "checkpoint_format"
  version = fields.get(name)
  if version is not None and version not in [*VERSIONS]:
    raise fields.wrong(name, f"one of {', '.join(VERSIONS)}")
  fields.neutral(NEUTRAL)
  return Scheme(
    bits=bits,
    group=max(group, 0),
    symmetric=fields.flag("sym") if "sym" in values else True,
    act_order=fields.flag("desc_act"),
    version=VERSIONS[version or "gptq"],
    head=fields.flag("lm_head"),
  )


def config(scheme: Scheme) -> dict[str, Any]:
  """Returns the `quantization_config`; `parse` inverts it."""
  names = {version: name for name, version in VERSIONS.items()}
  return {
    "quant_method": METHOD,
    "bits": scheme.bits,
    "group_size": scheme.group or -1,
    "desc_act": scheme.act_order,
    "sym": scheme.symmetric,
    "lm_head": scheme.head,
    "checkpoint_format": names[scheme.version],
    "pack_dtype": "int32",
    "meta": {"quantizer": ["heptad"]},
  }


@dataclasses.dataclass(frozen=True)
class _Sizes:
  inputs: int
  outputs: int
  group: int

  @property
  def groups(self) -> int:
    return self.inputs // self.group


def _sizes(
  tensors: Mapping[str, np.ndarray], scheme: Scheme, where: str
) -> _Sizes:
  """Returns the sizes of a module whose tensors fit each other."""
  bits = scheme.bits

  def check(name, shape, *kinds):
    found = tensors.get(name)
    if found is None:
      raise UserError(f"{where}: {name} is missing")
    if found.shape != shape or str(found.dtype) not in kinds:
      raise UserError(
        f"{where}: {name} is {found.dtype} {list(found.shape)}, expected "
        f"{' or '.join(kinds)} {list(shape)} for {bits} bits in groups of "
        f"{scheme.group or 'all inputs'}"
      )

  packed = tensors["qweight"]
  shape = packed.shape if packed.ndim == 2 else (0, 0)
  inputs, outputs = shape[0] * 32 // bits, shape[1]
  if not inputs or not outputs or shape[0] % bits * (32 % bits):
    raise UserError(
      f"{where}: qweight has shape {list(packed.shape)}, expected "
      f"[inputs * {bits} / 32, outputs]"
    )
  size = scheme.group or inputs
  if inputs % size or outputs * bits % 32:
    raise UserError(
      f"{where}: {outputs} outputs of {inputs} inputs, expected inputs in "
      f"whole groups of {size} and outputs that fill words of {32 // bits}"
    )
  groups = inputs // size
  check("qweight", shape, "int32", "uint32")
  words = bitstream.words(outputs, bits)
  check("qzeros", (groups, words), "int32", "uint32")
  check("scales", (groups, outputs), *_SCALES)
  if "g_idx" in tensors:
    check("g_idx", (inputs,), "int32", "int64")
  elif scheme.act_order:
    raise UserError(f"{where}: g_idx is missing, which desc_act needs")
  return _Sizes(inputs, outputs, size)


def _zeros(tensors, scheme: Scheme, sizes: _Sizes) -> np.ndarray:
  """Returns the zeros as stored, uint8 `[G, O]`."""
  words = np.ascontiguousarray(tensors["qzeros"].T)
  return bitstream.unpack(words, scheme.bits, sizes.outputs).T


def detect_version(
  scheme: Scheme, modules: Mapping[str, Mapping[str, np.ndarray]]
) -> Scheme:
  """Returns `scheme` with the version that the numbers have.

  Zeros of symmetric grids are the middle code. Else codes less zeros are, on
  average, nearly 0; a wrong version makes that 1 or -1. What the config says
  stands unless the other version fits better by half, and codes are so many
  that their mean is known to a twentieth.

  Raises:
    UserError: tensors do not fit each other, or symmetric zeros are neither
      version's.
  """
  top, bias = (1 << scheme.bits) - 1, {1: 0.0, 2: 0.0}
  count, spread = 0, 0.0
  for where, tensors in modules.items():
    sizes = _sizes(tensors, scheme, where)
    stored = _zeros(tensors, scheme, sizes)
    if scheme.symmetric:
      version = 2 - (scheme.middle - int(stored.flat[0]))
      if version not in (1, 2):
        raise UserError(
          f"{where}: qzeros has {stored.flat[0]}, expected {scheme.middle - 1} "
          f"(gptq) or {scheme.middle} (gptq_v2) where sym is true"
        )
      return dataclasses.replace(scheme, version=version)
    codes = bitstream.unpack(
      np.ascontiguousarray(tensors["qweight"]), scheme.bits, sizes.inputs
    )
    mean = codes.mean(dtype=np.float64)
    count, spread = count + codes.size, max(spread, float(codes.std()))
    for version in bias:
      zero = (stored + np.uint8(version == 1)) & top
      bias[version] += (mean - zero.mean(dtype=np.float64)) / len(modules)
  other, known = 3 - scheme.version, 20 * spread < count**0.5
  if known and abs(bias[other]) + 0.5 < abs(bias[scheme.version]):
    return dataclasses.replace(scheme, version=other)
  return scheme


def from_tensors(
  tensors: Mapping[str, np.ndarray], scheme: Scheme, where: str = "module"
) -> QTensor:
  """Returns one matrix `[I, O]`; inverts `to_tensors`.

  Args:
    scheme: by its config, with the version `detect_version`.

  Raises:
    UserError: a tensor is missing or does not fit the others.
  """
  sizes = _sizes(tensors, scheme, where)
  stored, order = slice(None), None
  if "g_idx" in tensors:
    stored, order = _order(tensors["g_idx"], sizes, where)
  scale = np.asarray(tensors["scales"])
  format = Affine(
    block=sizes.group,
    bits=scheme.bits,
    symmetric=scheme.symmetric,
    scale_dtype=str(scale.dtype),
  ).for_shape(sizes.inputs, sizes.outputs)
  zero = _zeros(tensors, scheme, sizes)
  if scheme.version == 1:
    # 0 less 1 was cut to the bits of a code.
    zero = (zero + np.uint8(1)) & np.uint8(format.top)
  if scheme.symmetric:
    if (zero != scheme.middle).any():
      raise UserError(
        f"{where}: qzeros differ, expected one middle code where sym is true; "
        "set sym to false"
      )
    zero = None
  packed = np.ascontiguousarray(tensors["qweight"])
  codes = bitstream.unpack(packed, scheme.bits, sizes.inputs)[stored]
  codes = codes.reshape(sizes.groups, sizes.group, sizes.outputs)
  return QTensor(
    format.pack_parts(codes, scale, zero),
    order=order,
    format=format,
    inputs=sizes.inputs,
    outputs=sizes.outputs,
  )


def _order(
  found: np.ndarray, sizes: _Sizes, where: str
) -> tuple[Any, np.ndarray | None]:
  """Returns (which input each stored row is, where each input is stored)."""
  group = np.asarray(found, np.int64)
  good = group.min() >= 0 and group.max() < sizes.groups
  if not good or (np.bincount(group) != sizes.group).any():
    raise UserError(
      f"{where}: g_idx does not give each of {sizes.groups} groups "
      f"{sizes.group} inputs"
    )
  stored = np.argsort(group, kind="stable")
  if (stored == np.arange(sizes.inputs)).all():
    return slice(None), None
  return stored, np.argsort(stored).astype(np.int32)


def to_tensors(
  w: Integers, version: int, where: str = "module"
) -> dict[str, np.ndarray]:
  """Returns the tensors of one matrix by their names behind `P.`.

  Raises:
    UserError: this format cannot hold it.
  """
  inputs, outputs = w.codes.shape
  if w.bits not in BITS:
    raise UserError(
      f"{where}: bits does not fit: found {w.bits}, expected one of "
      f"{', '.join(map(str, BITS))}"
    )
  if inputs * w.bits % 32 or outputs * w.bits % 32:
    raise UserError(
      f"{where}: shape does not fit: found [{inputs}, {outputs}], expected "
      f"multiples of 32 bits on both sides, by {w.bits} bits a code"
    )
  zero = w.zero
  if version == 1:
    if not zero.all():
      raise UserError(
        f"{where}: zero does not fit: found 0, which version 1 of the format "
        "cannot hold; write gptq_v2"
      )
    zero = zero - np.uint8(1)
  words = bitstream.pack(np.ascontiguousarray(zero.T), w.bits)
  return {
    "qweight": bitstream.pack(w.codes, w.bits),
    "qzeros": np.ascontiguousarray(words.T),
    "scales": w.scale,
    "g_idx": w.group,
  }
