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
  nbytes,
  tensor_types,
  write_gguf,
)
from research.interop.gguf import config as gguf_config
from research.interop.gguf.architectures import ARCHITECTURES, check_known
from research.interop.gguf.container import DTYPES
from research.interop.gguf.names import EXPERT_ROWS, ROWS, TOP
from research.interop.gguf.read import interleaved
from research.interop.gguf.recipe import FILE_TYPES, Recipe
from research.interop.parts import Address, Part, Parts, ordered
from research.lora.merge import changes
from research.nn.transformer import Transformer
from research.quant.formats import ggml
from research.typing import UserError


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
    parts: adapters merge in float32; blocks of the type wanted stay as they
      are.
    given: the file's metadata.

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
  interleave = ARCHITECTURES[arch].interleaved
  fold = gguf_config.folded_scale(model, arch)
  for name in extra:
    check_known(name, arch)
  # What makes the queries: their norm, where they have one.
  queries = ("attention/q_norm/scale",)
  if a.qk_norm is None:
    queries = ("attention/q", "attention/q_bias")
  rows = {row.path: row for row in (*TOP, *ROWS, *EXPERT_ROWS)}
  for address, alike in _together(parts).items():
    row, part = rows.get(address.path), alike[0]
    if row is None:
      raise UserError(f"GGUF: no name for {address} of this model")
    check_known(row.name, arch)
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
    if row.heads is not None and interleave:
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
  gguf_config.check_described(model, GGUF(dict(given), stubs))
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
  def make():
    makers = (_maker(f"{name}[{e}]", x, *how) for e, x in enumerate(alike))
    return np.concatenate([make() for make in makers])

  return make


def _maker(
  name, part: Part, which, flip, order, offset, scale, importance, log
):
  def make():
    weight = part.read()
    stored = ggml.is_stored(weight, -2 if flip else -1)
    if part.kind == which and stored and scale == 1.0:
      raw = ggml.to_ggml(weight)
      log.same(name, part.kind, which)
      return (raw if order is None else raw[order]).reshape(-1)
    found = changes.dense_weight(weight)
    stored, base = found.array, found.base
    if flip:
      stored, base = stored.T, None if base is None else base.T
    exact = DTYPES.get(which) == part.kind and base is None
    exact = exact and scale == 1.0 and not offset
    out, done = np.empty(nbytes(which, stored.shape), np.uint8), 0
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
      out[done : done + raw.size] = raw
      done += raw.size
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


@dataclasses.dataclass(frozen=True)
class Summary:
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
) -> Summary:
  """Writes a file, whole or not at all.

  Args:
    given: metadata of the GGUF file it came from, kept as it is.
    hint: model_type to try first.
    tokenizer: its `tokenizer.*` keys, where `given` has none; without any the
      file says that it has no tokenizer.
  """
  found, extra = gguf_config.metadata_from_model(model, hint, name)
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
  return Summary(8 * sum(sizes.values()) / count, otherwise, window)
