"""A model as a GGUF file: metadata, names, and llama.cpp's conventions.

What a converter does on the way is undone by the reader: rows of queries and
keys change places for "llama", Gemma's norms get their 1, and a scale of the
logits that the format has no key for goes into the weights before them.
Metadata is read back before anything is written: a file that would be another
model is an error.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from research.interop.gguf import (
  GGUF,
  Pending,
  Tensor,
  gguf_experts,
  nbytes,
  tensor_types,
  write_gguf,
)
from research.interop.gguf import config as gguf_config
from research.interop.gguf import names as gguf_names
from research.interop.gguf import rope as gguf_rope
from research.interop.gguf.names import EXPERT_ROWS, ROWS, TOP
from research.interop.gguf.read import DTYPES, interleaved
from research.interop.gguf.recipe import FILE_TYPES, Recipe
from research.interop.hf import config as hf_config
from research.interop.parts import Address, Part, Parts, ordered
from research.lora.merge import changes
from research.nn import presets
from research.nn.transformer import Transformer
from research.quant.formats import ggml
from research.typing import UserError

ARCHITECTURES = {
  "llama": "llama",
  "mistral": "llama",
  "qwen2": "qwen2",
  "qwen3": "qwen3",
  "mixtral": "llama",
  "qwen3_moe": "qwen3moe",
  "gemma": "gemma",
  "gemma2": "gemma2",
  "gemma3_text": "gemma3",
}
"""model_type -> `general.architecture`."""


def metadata(
  model: Transformer, hint: str | None, name: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """Returns the metadata of `model`, and tensors that belong to it.

  Args:
    model: of a family that llama.cpp has an architecture for.
    hint: model_type to try first.
    name: `general.name`.

  Raises:
    UserError: GGUF has no way to say what this model computes.
  """
  kind = hf_config.describe(model, hint)["model_type"]
  arch = ARCHITECTURES.get(kind)
  if arch is None:
    raise UserError(
      f"GGUF: no architecture for model_type {kind!r}; expected one of "
      f"{', '.join(ARCHITECTURES)}"
    )
  kinds = model.layer_kinds()
  wide = next((k for k in kinds if k.attention.window is None), kinds[0])
  a = wide.attention
  out: dict[str, Any] = {
    "vocab_size": model.vocab_size,
    "context_length": model.max_positions or 2_048,
    "embedding_length": model.width,
    "block_count": len(kinds),
    "feed_forward_length": wide.mlp.hidden,
    "attention.head_count": a.heads,
    "attention.head_count_kv": a.kv_heads,
    "attention.key_length": a.head_dim,
    "attention.value_length": a.head_dim,
    "attention.layer_norm_rms_epsilon": float(model.norm.eps),
    "rope.dimension_count": a.head_dim,
    "rope.freq_base": float(a.rope.theta),
  }
  out |= _windows(model, arch) | gguf_experts.spelled(kinds, arch)
  for key, value in (
    ("attn_logit_softcapping", a.softcap),
    ("final_logit_softcapping", model.softcap),
  ):
    if value is not None:
      out[key] = float(value)
  keys, extra = gguf_rope.spelled(a)
  found = {"general.architecture": arch, "general.name": name}
  found |= {"general.quantization_version": 2}
  found |= {f"{arch}.{key}": value for key, value in (out | keys).items()}
  return found, extra


def _windows(model: Transformer, arch: str) -> dict[str, Any]:
  attentions = [k.attention for k in model.layer_kinds()]
  local = [a for a in attentions if a.window is not None]
  if not local:
    return {}
  out: dict[str, Any] = {"attention.sliding_window": local[0].window}
  if arch == "gemma3":
    out["rope.freq_base_swa"] = float(local[0].rope.theta)
  if arch.startswith("gemma"):
    wide = [i for i, a in enumerate(attentions) if a.window is None]
    every = wide[0] + 1 if wide else len(attentions) + 1
    if every != len(gguf_config.pattern_of(arch)):
      out["attention.sliding_window_pattern"] = every
  return out


def tensors(
  model: Transformer,
  parts: Parts,
  given: Mapping[str, Any],
  extra: Mapping[str, Tensor],
  recipe: Recipe,
  log: changes.Log,
) -> tuple[dict[str, Tensor | Pending], dict[str, tuple[str, str]]]:
  """Returns every tensor of the file, unread, and those stored otherwise.

  Checks that the file would be this model. What is stored otherwise than
  wanted has its name, and both types.

  Args:
    model: whose parameters `parts` are.
    parts: adapters merge in float32; blocks of the type wanted stay as they
      are.
    given: the file's metadata.
    extra: tensors that are no parameters.
    recipe: what the matrices are stored in.
    log: told what changed as the tensors are made.

  Raises:
    UserError: the metadata means another model, a type does not fit, or
      llama.cpp has no such tensor.
  """
  out: dict[str, Tensor | Pending] = dict(extra)
  stubs, otherwise = dict(extra), {}
  shape_of = recipe.shape(model)
  kinds = model.layer_kinds()
  a = kinds[0].attention
  arch = given["general.architecture"]
  turned = gguf_config.ARCHITECTURES[arch].interleaved
  fold = folded(model, arch)
  for name in extra:
    gguf_names.check_known(name, arch)
  # What makes the queries: their norm, where they have one.
  queries = ("attention/q_norm/scale",)
  if a.qk_norm is None:
    queries = ("attention/q", "attention/q_bias")
  rows = {row.path: row for row in (*TOP, *ROWS, *EXPERT_ROWS)}
  for address, alike in _together(parts).items():
    row, part = rows.get(address.path), alike[0]
    if row is None:
      raise UserError(f"GGUF: no name for {address} of this model")
    gguf_names.check_known(row.name, arch)
    layer = "" if address.layer is None else f"blk.{address.layer}."
    name = layer + row.name
    flip = len(part.shape) == 2 and row.path != "embed"
    shape = part.shape[::-1] if flip else part.shape
    want, which = recipe.types(name, address, part, shape[-1], shape_of)
    if want != which:
      otherwise[name] = (want, which)
    importance = None
    if len(shape) > 1 and which in ggml.TYPES:
      importance = recipe.importance(name, shape[-1])
    order = None
    if row.heads is not None and turned:
      order = interleaved(shape[0], getattr(a, row.heads))
    offset = model.norm.offset if row.path.endswith("norm/scale") else 0.0
    scale = fold if row.path in queries else 1.0
    how = (which, flip, order, offset, scale, importance, log)
    make = _maker(name, part, *how)
    if address.expert is not None:
      make = _stacked(name, alike, how)
      shape = (len(alike), *shape)
    out[name] = Pending(which, shape, make)
    stubs[name] = Tensor(which, shape, np.zeros(0, np.uint8))
  _check(model, GGUF(dict(given), stubs), fold)
  return out, otherwise


def _together(parts: Parts) -> dict[Address, list[Part]]:
  """Returns parameters in the order of files, experts' under the first one."""
  out: dict[Address, list[Part]] = {}
  for address in ordered(parts):
    first = address
    if address.expert is not None:
      first = dataclasses.replace(address, expert=0)
    out.setdefault(first, []).append(parts[address])
  return out


def _stacked(name: str, alike: list[Part], how: tuple[Any, ...]):
  """Returns what makes one tensor of experts' matrices."""

  def make():
    makers = (_maker(f"{name}[{e}]", x, *how) for e, x in enumerate(alike))
    return np.concatenate([make() for make in makers])

  return make


def folded(model: Transformer, arch: str) -> float:
  """Returns what the queries take of a scale that no key can hold."""
  kinds = model.layer_kinds()
  a, usual = kinds[0].attention, kinds[0].attention.head_dim ** -0.5
  scale = usual if a.scale is None else a.scale
  if len(kinds) in gguf_config.ARCHITECTURES[arch].scaled_by_width:
    usual = (model.width / a.heads) ** -0.5
  fold = scale / usual
  return 1.0 if math.isclose(fold, 1.0, rel_tol=1e-12) else fold


def _maker(
  name, part: Part, which, flip, order, offset, scale, importance, log
):
  def make():
    weight = part.read()
    if part.kind == which and ggml.is_stored(weight, -2 if flip else -1):
      raw = ggml.to_ggml(weight)
      log.same(name, part.kind, which)
      return (raw if order is None else raw[order]).reshape(-1)
    found = changes.read(weight)
    stored, base = found.array, found.base
    if flip:
      stored, base = stored.T, None if base is None else base.T
    exact = DTYPES.get(which) == part.kind and base is None
    exact = exact and scale == 1.0 and not offset
    out, seen = np.empty(nbytes(which, stored.shape), np.uint8), 0
    compared = changes.Comparison()

    def encode(x):
      x = changes.cast(name, x, np.dtype(np.float32))
      if offset or scale != 1.0:
        x = (x + np.float32(offset)) * np.float32(scale)
      return _encoded(name, which, x, importance)

    def decode(raw, shape):
      x = tensor_types.decode(which, raw, shape)
      return x / np.float32(scale) - np.float32(offset)

    for rows in changes.pieces(stored):
      rows = rows if order is None else order[rows]
      x = stored[rows]
      raw = encode(x)
      out[seen : seen + raw.size] = raw
      seen += raw.size
      if base is not None:
        alone = decode(encode(base[rows]), x.shape)
        compared.add(x, decode(raw, x.shape), base[rows], alone)
      elif not exact:
        compared.add(x, decode(raw, x.shape))
    if exact:
      log.same(name, part.kind, which)
    else:
      log.changes.append(compared.change(name, part.kind, which))
    return out

  return make


def _encoded(name: str, which: str, x: np.ndarray, importance) -> np.ndarray:
  if which == "F16":
    changes.cast(name, x, np.dtype(np.float16))
  try:
    return tensor_types.encode(which, x, importance)
  except UserError as e:
    raise UserError(f"{name}: {e}") from e


def _check(model: Transformer, file: GGUF, fold: float) -> None:
  """Raises UserError unless the file, read back, is `model`."""
  family, sizes, _ = gguf_config.config("GGUF", file)
  again = presets.transformer(family, sizes, model.dtype)

  def plain(m: Transformer):
    # Both scales are compared as one number, the weights' share included.
    return [
      k.clone(attention=gguf_rope.bare(k.attention.clone(scale=None)))
      for k in m.layer_kinds()
    ]

  same = plain(again) == plain(model) and gguf_rope.alike(again, model)
  for field in ("vocab_size", "width", "norm", "tied", "softcap"):
    same = same and getattr(again, field) == getattr(model, field)
  same = same and math.isclose(again.embed_scale, model.embed_scale)
  scales = {k.attention.scale for k in model.layer_kinds()}
  if not same or len(scales) > 1:
    raise UserError(
      "GGUF: architecture "
      f"{file.metadata['general.architecture']!r} cannot describe this model: "
      "reading it back gives another one.\nKeep it as --format=hf."
    )


@dataclasses.dataclass(frozen=True)
class Written:
  """What a file has become.

  Attributes:
    bits_per_weight: of all tensors, scales included.
    otherwise: name of a tensor -> (type that was wanted, type it has), where
      blocks do not divide its rows.
    window: of attention, in tokens, that the file has and llama.cpp does not
      look at, or None.
  """

  bits_per_weight: float
  otherwise: Mapping[str, tuple[str, str]]
  window: int | None = None


def write_model(
  path: pathlib.Path,
  model: Transformer,
  parts: Parts,
  recipe: Recipe,
  log: changes.Log,
  *,
  given: Mapping[str, Any] | None = None,
  hint: str | None = None,
  name: str = "",
  tokenizer: Mapping[str, Any] | None = None,
) -> Written:
  """Writes a file, whole or not at all.

  Args:
    path: where to.
    model, parts: what to write.
    recipe: what the matrices are stored in.
    log: told what changed.
    given: metadata of the GGUF file it came from, kept as it is.
    hint: model_type to try first.
    name: `general.name` where `given` has none.
    tokenizer: its `tokenizer.*` keys, where `given` has none; without any the
      file says that it has no tokenizer.
  """
  found, extra = metadata(model, hint, name)
  if given is not None:
    found = dict(given)
  if not any(key.startswith("tokenizer.") for key in found):
    found |= dict(tokenizer or gguf_config.NO_TOKENIZER)
  made, otherwise = tensors(model, parts, found, extra, recipe, log)
  sizes: dict[str, int] = {}
  for t in made.values():
    sizes[t.type] = sizes.get(t.type, 0) + nbytes(t.type, t.shape)
  most = recipe.kind or max(sizes, key=lambda k: sizes[k])
  found["general.file_type"] = FILE_TYPES.get(most, FILE_TYPES["F32"])
  write_gguf(path, found, made)
  count = sum(math.prod(t.shape) for t in made.values())
  window = None
  if found["general.architecture"] == "llama":
    window = found.get("llama.attention.sliding_window")
  return Written(8 * sum(sizes.values()) / count, otherwise, window)
