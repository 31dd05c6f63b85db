"""What Molmo 2's files call tensors: its `prefixes.Naming`.

A layer's queries, keys and values are one matrix, as are the two that a gate
multiplies, and the rows of tokens that are read and never written are a table
of their own. Taken apart, the language model's names are Qwen3's.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from research.interop.vision.prefixes import Prefix, Prefixes
from research.io.safetensors import Lazy
from research.typing import UserError

_TEXT_NAMES = {
  "self_attn.attn_out.weight": "self_attn.o_proj.weight",
  "self_attn.q_norm.weight": "self_attn.q_norm.weight",
  "self_attn.k_norm.weight": "self_attn.k_norm.weight",
  "attn_norm.weight": "input_layernorm.weight",
  "ff_norm.weight": "post_attention_layernorm.weight",
  "mlp.ff_out.weight": "mlp.down_proj.weight",
}
"""Of a layer of the language model: theirs -> Qwen3's."""
_EMBEDDINGS = "model.wte.embedding", "model.wte.new_embedding"
_QKV, _FEED = "self_attn.att_proj.weight", "mlp.ff_proj.weight"
_OF_LAYER = re.compile(r"model\.(?:blocks|layers)\.(\d+)\.(.+)")


@dataclasses.dataclass(frozen=True)
class _Joined(Lazy):
  """Tensors of a file one below the other, unread.

  Attributes:
    parts: in order; the other fields are of all of them, or the first one's.
  """

  parts: tuple[Lazy, ...] = ()

  def read(self, index: Any = ...) -> np.ndarray:
    """Returns `tensor[index]`, reading no rows besides."""
    first, *rest = index if isinstance(index, tuple) else (index,)
    first = slice(None) if first is ... else first
    start, stop, _ = first.indices(self.shape[0])
    found, begin = [], 0
    for part in self.parts:
      count = part.shape[0]
      own = (min(max(x - begin, 0), count) for x in (start, stop))
      found.append(part.read((slice(*own), *rest)))
      begin += count
    return np.concatenate(found)


@dataclasses.dataclass(frozen=True)
class Molmo2Names:
  """Molmo 2's names: those of a layer's queries, keys and values are one."""

  towers: Prefixes = Prefixes(
    (
      Prefix(
        "vision",
        r"(model\.)?vision_backbone\.image_vit\.",
        "model.vision_backbone.image_vit.",
      ),
      Prefix(
        "connector", r"(model\.)?vision_backbone\.", "model.vision_backbone."
      ),
      Prefix("language", r"lm_head\.", "lm_head.", "lm_head."),
      Prefix(
        "language", r"(model\.)?transformer\.", "model.transformer.", "model."
      ),
    )
  )

  def split(
    self, tensors: Mapping[str, Any], where: Any
  ) -> dict[str, dict[str, Any]]:
    found = self.towers.split(tensors, where)
    return found | dict(language=_plain(found["language"], where))

  def join(self, towers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    language = _fused(towers["language"])
    rows = towers["language"]["lm_head.weight"].shape[0]
    table = language.pop("model.embed_tokens.weight")
    language |= zip(_EMBEDDINGS, (table[:rows], table[rows:]), strict=True)
    return self.towers.join({**towers, "language": language})


def _plain(tensors: Mapping[str, Any], where: Any) -> dict[str, Any]:
  """Returns the language model's tensors under Qwen3's names, unread."""
  out, tables = {}, {}
  for name, tensor in tensors.items():
    found = _OF_LAYER.fullmatch(name)
    if name in _EMBEDDINGS:
      tables[name] = tensor
    elif not found:
      out[name.replace("model.ln_f.", "model.norm.")] = tensor
    else:
      prefix, inner = f"model.layers.{found[1]}.", found[2]
      for own, part in _cut(tensors, name, inner, tensor, where):
        out[prefix + own] = part
  if tables:
    parts = tuple(tables[x] for x in _EMBEDDINGS if x in tables)
    rows = sum(x.shape[0] for x in parts)
    out["model.embed_tokens.weight"] = _Joined(
      (rows, *parts[0].shape[1:]),
      parts[0].dtype,
      parts[0].file,
      parts[0].raw,
      parts,
    )
  return out


def _cut(tensors, name, inner, tensor, where) -> list[tuple[str, Any]]:
  """Returns the parts of one tensor of a layer, by Qwen3's names."""
  if inner == _FEED:
    sizes, parts = [tensor.shape[0] // 2] * 2, ("mlp.up", "mlp.gate")
  elif inner == _QKV:
    # The output takes the heads of queries; keys and values share the rest.
    out = tensors.get(name.replace("att_proj", "attn_out"))
    if out is None:
      raise UserError(f"{where}: missing: attn_out beside {name}")
    queries = out.shape[1]
    rest = (tensor.shape[0] - queries) // 2
    sizes = [queries, rest, rest]
    parts = tuple(f"self_attn.{x}" for x in "qkv")
  else:
    return [(_TEXT_NAMES.get(inner, inner), tensor)]
  rows = tensor.shape[0]
  if sum(sizes) != rows or min(sizes) < 1:
    raise UserError(f"{where}: {name} has {rows} rows, expected {sum(sizes)}")
  size, start, cut = tensor.raw.size // rows, 0, []
  for part, count in zip(parts, sizes, strict=True):
    raw = tensor.raw.part(start * size, (start + count) * size)
    shape = count, *tensor.shape[1:]
    own = dataclasses.replace(tensor, shape=shape, raw=raw)
    cut.append((f"{part}_proj.weight", own))
    start += count
  return cut


def _fused(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """Returns tensors under Molmo 2's names; undoes `_plain`, but for tables."""
  theirs = {ours: name for name, ours in _TEXT_NAMES.items()}
  fused = {
    "self_attn.q_proj.weight": (_QKV, [f"self_attn.{x}_proj" for x in "qkv"]),
    "mlp.up_proj.weight": (_FEED, ["mlp.up_proj", "mlp.gate_proj"]),
  }
  later = {f"self_attn.{x}_proj.weight" for x in "kv"} | {
    "mlp.gate_proj.weight"
  }
  out = {}
  for name, x in tensors.items():
    found = _OF_LAYER.fullmatch(name)
    if not found:
      out[name.replace("model.norm.", "model.ln_f.")] = x
      continue
    inner, prefix = found[2], f"model.blocks.{found[1]}."
    if inner in fused:
      to, parts = fused[inner]
      rows = [tensors[f"model.layers.{found[1]}.{p}.weight"] for p in parts]
      out[prefix + to] = np.concatenate(rows)
    elif inner not in later:
      out[prefix + theirs[inner]] = x
  return out
