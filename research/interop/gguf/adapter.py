"""llama.cpp's adapters: a GGUF file of thin factors, both ways.

`general.type` is "adapter"; a matrix has `<its tensor>.lora_a [r, in]` and
`.lora_b [out, r]`, an embedding `lora_a [vocabulary, r]`. There is one alpha,
and the scale is alpha over the rank of the tensor (no alpha, or 0: scale 1), so
that scales of other forms (rsLoRA, patterns) are folded into B here, where
converters drop them (research/lora/MATH.md 7.5). llama's rows of queries and
keys change places as in the base's own file.
"""

import dataclasses
import math
import os
import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from research.interop import gguf
from research.interop.gguf import config as gguf_config
from research.interop.gguf import names as gguf_names
from research.interop.gguf import read as gguf_read
from research.interop.gguf import tensor_types
from research.interop.gguf.architectures import ARCHITECTURES
from research.interop.gguf.container import DTYPES
from research.interop.gguf.recipe import FILE_TYPES
from research.lora import lora_factors, wrap
from research.lora.lora_factors import Factors
from research.lora.merge import changes
from research.nn.transformer import Transformer
from research.typing import Params, UserError

TYPES = tuple(DTYPES)
_KIND, _ARCH, _ALPHA = (
  "adapter.type",
  "general.architecture",
  "adapter.lora.alpha",
)
_TOKENS = "adapter.alora.invocation_tokens"


@dataclasses.dataclass(frozen=True)
class _Matrix:
  """How the file has one matrix of ours.

  Attributes:
    name: of the base's tensor.
    size: (in, out), ours.
    order: which row of ours each stored row of B is, or None.
    scale: what the base's own tensor is multiplied with in such files.
  """

  name: str
  size: tuple[int, int]
  order: np.ndarray | None
  scale: float


def _matrices(
  params: Params, model: Transformer, arch: str
) -> dict[str, _Matrix]:
  """Returns every matrix that can be named, by our address."""
  rows = {row.path: row for row in (*gguf_names.TOP, *gguf_names.ROWS)}
  a = model.layer_kinds()[0].attention
  interleave = ARCHITECTURES[arch].interleaved
  fold = gguf_config.folded_scale(model, arch)
  out = {}
  for address, size in wrap.matrices(params).items():
    layer, _, inner = address.removeprefix("layers/").partition("/")
    row = rows.get(inner or address)
    if row is None:
      continue
    order = None
    if row.heads is not None and interleave:
      order = gguf_read.interleaved(size[1], getattr(a, row.heads))
    scale = fold if row.path == "attention/q" and a.qk_norm is None else 1.0
    name = f"blk.{layer}.{row.name}" if inner else row.name
    out[address] = _Matrix(name, size, order, scale)
  return out


def architecture(model: Transformer, hint: str | None = None) -> str:
  """Returns llama.cpp's name of the architecture of `model`."""
  return gguf_config.metadata_from_model(model, hint, "")[0][_ARCH]


def alpha_of(found: Mapping[str, Factors]) -> float:
  """Returns the alpha that most matrices need, as float32 has it.

  Where all need one (alpha of `alpha / r`), no factor changes.
  """
  alphas = Counter(float(np.float32(f.scale * f.rank)) for f in found.values())
  return alphas.most_common(1)[0][0]


def save(
  path: str | os.PathLike,
  params: Params,
  model: Transformer,
  *,
  hint: str | None = None,
  name: str = "",
  kind: str = "F32",
) -> changes.Log:
  """Writes the adapters in `params` as llama.cpp reads them.

  Args:
    path: a new file.
    params: with adapters that are plain LoRA, or exported as such.
    hint: model_type of the base to try first.
    kind: ggml's type of the factors, one of `TYPES`.

  Returns:
    What rounding changed.

  Raises:
    UserError: the format has no way to say what they do.
  """
  if kind not in TYPES:
    raise UserError(f"gguf-adapter:{kind}: expected one of {', '.join(TYPES)}")
  found, arch = lora_factors.factors(params), architecture(model, hint)
  if model.tied and (both := {wrap.EMBEDDING, "head"} & set(found)):
    # It would take the embedding's factors for the head's too, and abort.
    raise UserError(
      f"{min(both)}: llama.cpp does not apply an adapter to an embedding that "
      "is the head as well.\nMerge it instead: --format=gguf"
    )
  matrices = _matrices(params, model, arch)
  alpha, log, tensors = alpha_of(found), changes.Log(), {}
  for address, f in found.items():
    if address not in matrices:
      raise UserError(
        f"{address}: such files have no name for an adapter there.\n"
        "Merge it into the model instead: --format=gguf"
      )
    m = matrices[address]
    a, b = f.a, f.b.T
    # 1 exactly where this matrix has the usual alpha.
    share = f.scale * f.rank / alpha * m.scale
    if np.float32(f.scale * f.rank) != np.float32(alpha) or m.scale != 1.0:
      b = b * np.float32(share)
    b = b if m.order is None else b[m.order]
    a = a.T if address == wrap.EMBEDDING else a
    for suffix, x in (("lora_a", a), ("lora_b", b)):
      full = f"{m.name}.{suffix}"
      tensors[full] = _encoded(full, np.ascontiguousarray(x), kind, log)
  given = {
    _ARCH: arch,
    "general.type": "adapter",
    "general.name": name,
    "general.file_type": FILE_TYPES[kind],
    _KIND: "lora",
    _ALPHA: np.float32(alpha),
  }
  pathlib.Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
  gguf.write_gguf(path, given, tensors)
  return log


def _encoded(name: str, x: np.ndarray, kind: str, log: changes.Log) -> Any:
  if kind == "F16":
    changes.cast(name, x, np.dtype(np.float16))
  raw = tensor_types.encode(kind, x)
  got = tensor_types.decode(kind, raw, x.shape)
  log.compared(name, "float32", DTYPES[kind], changes.DenseWeight(x), got)
  return gguf.Tensor(kind, x.shape, raw)


def load(
  path: str | os.PathLike, params: Params, model: Transformer
) -> dict[str, Any]:
  """Returns `params` with the adapter of a GGUF file around its weights.

  Raises:
    UserError: it is damaged, no adapter, or one of another base.
  """
  file = gguf.open_gguf(path)
  arch = architecture(model)
  alpha = _alpha(path, file, arch)
  matrices = _matrices(params, model, arch)
  unknown = set(file.tensors)
  found = {}
  for address, m in matrices.items():
    names = [f"{m.name}.{suffix}" for suffix in ("lora_a", "lora_b")]
    have = [name for name in names if name in file.tensors]
    if not have:
      continue
    if len(have) < 2:
      raise UserError(f"{path}: found {have[0]} alone, expected a pair")
    unknown -= set(names)
    embedding = address == wrap.EMBEDDING
    if embedding and model.tied:
      raise UserError(
        f"{path}: {names[0]}: the base's embedding is its head as well, which "
        "such files do not mean"
      )
    found[address] = _factors(path, file, names, m, alpha, embedding)
  if unknown:
    raise UserError(
      f"{path}: tensors that the base has no place for: "
      f"{', '.join(sorted(unknown)[:5])}; is it for another model?"
    )
  if not any(f.a.any() and f.b.any() for f in found.values()):
    raise UserError(f"{path}: the adapter changes nothing; A or B is zero")
  return lora_factors.wrap_factors(params, found)


def _alpha(path, file: gguf.GGUF, arch: str) -> float:
  """Returns alpha, having checked what the file says it is; 0 for none."""
  for key, want in (
    ("general.type", "adapter"),
    (_KIND, "lora"),
    (_ARCH, arch),
  ):
    if file.metadata.get(key) != want:
      raise UserError(
        f"{path}: {key} is {str(file.metadata.get(key))[:40]!r}, expected "
        f"{want!r}"
      )
  if _TOKENS in file.metadata:
    raise UserError(
      f"{path}: {_TOKENS}: an adapter that waits for tokens is not supported"
    )
  alpha = file.metadata.get(_ALPHA, 0.0)
  ok = isinstance(alpha, int | float) and not isinstance(alpha, bool)
  if not ok or not math.isfinite(alpha) or alpha < 0:
    raise UserError(f"{path}: {_ALPHA} is {alpha!r}, expected a number from 0")
  return float(alpha)


def _factors(path, file, names, m: _Matrix, alpha, embedding) -> Factors:
  a, b = (file.tensors[name] for name in names)
  rank = b.shape[-1]
  want = [(rank, m.size[0]), (m.size[1], rank)]
  if embedding:
    want[0] = want[0][::-1]
  for name, tensor, shape in zip(names, (a, b), want, strict=True):
    tensor_types.require(tensor.type, f"{path}: {name}")
    if tensor.shape != shape:
      raise UserError(
        f"{path}: {name} has shape {list(tensor.shape)}, expected "
        f"{list(shape)} by the base model"
      )
  arrays = [t.decode() for t in (a, b)]
  for name, x in zip(names, arrays, strict=True):
    if not np.isfinite(x).all():
      raise UserError(f"{path}: {name} holds a number that is not finite")
  first, second = arrays
  first = first.T if embedding else first
  if m.order is not None:
    second = second[np.argsort(m.order)]
  second = second.T / np.float32(m.scale)
  scale = alpha / rank if alpha else 1.0
  return Factors(np.ascontiguousarray(first), second, scale)
