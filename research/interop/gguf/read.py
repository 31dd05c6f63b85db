"""A GGUF file as a model: architecture keys to sizes, tensor names to paths.

A weight's walk: `names` names it, `_Matrix` turns the query and key rows of
llama's interleaved rotation back to half-split order (whole rows move, so
packed blocks do too), and `_leaf` either decodes it or keeps its blocks.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import tree
from research.interop.gguf import GGUF, Tensor, open_gguf
from research.interop.gguf import names as gguf_names
from research.interop.gguf.config import has_tokenizer, sizes_from_metadata
from research.interop.gguf.container import DTYPES
from research.interop.gguf.names import Row
from research.interop.gguf.tensor_types import TYPES, decode, require
from research.interop.loaded import Loaded
from research.interop.parts import Address, Part
from research.io import unread
from research.nn import presets
from research.nn.transformer import Transformer
from research.quant.formats import ggml
from research.training import memory
from research.typing import UserError

_PIECE = 1 << 20
"""Numbers that are decoded at once, about."""


def _few(names: Iterable[str]) -> str:
  names = sorted(names)
  more = f" and {len(names) - 10} more" if len(names) > 10 else ""
  return (", ".join(names[:10]) + more) or "none"


def _check(path: str, file: GGUF, family, sizes) -> None:
  top = [r for r in gguf_names.TOP if r.path != "head" or not sizes.tied]
  wanted = {r.name: r for r in top} | {
    f"blk.{i}.{r.name}": r
    for i in range(sizes.depth)
    for r in gguf_names.rows_of(family, sizes)
  }
  found = set(file.tensors) - {gguf_names.ROPE_FACTORS}
  if missing := wanted.keys() - found:
    raise UserError(
      f"{path}: tensors are missing: {_few(missing)}\n"
      f"superfluous: {_few(found - wanted.keys())}"
    )
  if superfluous := found - wanted.keys():
    raise UserError(
      f"{path}: tensors that this architecture has no place for: "
      f"{_few(superfluous)}"
    )
  dims = dict(V=sizes.vocab, D=sizes.width, F=sizes.hidden, H=sizes.head_dim)
  dims["Q"] = sizes.heads * sizes.head_dim
  dims["K"] = sizes.kv_heads * sizes.head_dim
  if sizes.sparse is not None:
    dims |= dict(E=sizes.sparse.routing.experts, F=sizes.sparse.hidden)
  for name, row in wanted.items():
    tensor = file.tensors[name]
    shape = tuple(dims[d] for d in row.dims)
    if tensor.shape != shape:
      raise UserError(
        f"{path}: tensor {name!r}: found shape {tensor.shape}, expected "
        f"{shape} by the file's metadata"
      )
    require(tensor.type, f"{path}: tensor {name!r}")


def half_split(rows: int, heads: int) -> np.ndarray:
  """Returns which interleaved row each half-split row is, `[rows]`."""
  pairs = np.arange(rows).reshape(heads, rows // heads // 2, 2)
  return pairs.swapaxes(1, 2).reshape(-1)


def interleaved(rows: int, heads: int) -> np.ndarray:
  """Returns which half-split row each interleaved row is; the inverse."""
  return np.argsort(half_split(rows, heads))


@dataclasses.dataclass(frozen=True)
class _Matrix:
  """A stored tensor in our order, to be read in parts; a vector is one row.

  Attributes:
    tensor: as the file has it.
    order: which stored row, or element of a vector, stands where; or None.
    added: what llama.cpp's converter has added to it.
  """

  tensor: Tensor
  order: np.ndarray | None = None
  added: float = 0.0

  def blocks(self, rows: slice, which: slice) -> np.ndarray:
    """Returns some blocks of some rows, uint8 `[rows, bytes]`."""
    size = TYPES[self.tensor.type].nbytes
    found = self.tensor.rows()[:, which.start * size : which.stop * size]
    return found[rows if self.order is None else self.order[rows]]

  def numbers(self, rows: slice, columns: slice) -> np.ndarray:
    kind = TYPES[self.tensor.type]
    first, last = columns.start // kind.block, -(-columns.stop // kind.block)
    raw = self.blocks(rows, slice(first, last))
    shape = (len(raw), (last - first) * kind.block)
    x = decode(kind.name, np.ascontiguousarray(raw).reshape(-1), shape)
    skipped = first * kind.block
    return x[:, columns.start - skipped : columns.stop - skipped]

  def expert(self, number: int) -> "_Matrix":
    return _Matrix(self.tensor.expert(number))

  def vector(self, index: unread.Index) -> np.ndarray:
    x = self.tensor.decode()
    x = x if self.order is None else x[self.order]
    # Our norm adds again what the converter has added.
    return (x - np.float32(self.added) if self.added else x)[index]

  def filler(self, flip: bool) -> unread.Fill:
    """Returns what decodes a part, `[columns, rows]` of a matrix if `flip`."""

    def fill(index: unread.Index, out: np.ndarray) -> None:
      if len(index) == 1:
        out[...] = self.vector(index)
        return
      rows, columns = index[::-1] if flip else index
      target = out.T if flip else out
      step = max(1, _PIECE // (columns.stop - columns.start))
      for start in range(rows.start, rows.stop, step):
        piece = slice(start, min(start + step, rows.stop))
        to = slice(piece.start - rows.start, piece.stop - rows.start)
        target[to] = self.numbers(piece, columns)

    return fill


def _leaf(
  row: Row, stored: Sequence[_Matrix], dtype: str | None, packed: bool
) -> Any:
  lead, first = (len(stored),), stored[0].tensor
  if len(first.shape) == 3:
    lead += first.shape[:1]
    stored = [m.expert(e) for m in stored for e in range(lead[1])]
    first = stored[0].tensor
  packed = packed and row.path != gguf_names.ROUTER
  if packed and ggml.packs(first.type, first.shape):
    axis = -1 if row.path == "embed" else -2
    kind = TYPES[first.type]
    shape = (first.shape[0], first.shape[1] // kind.block)
    return ggml.from_ggml_unread(
      first.type, [m.blocks for m in stored], shape, axis, lead
    )
  flip = len(first.shape) == 2 and row.path != "embed"
  kind = jnp.dtype(dtype or DTYPES.get(first.type, "float32"))
  return unread.stacked(
    [m.filler(flip) for m in stored],
    lead,
    first.shape[::-1] if flip else first.shape,
    kind,
  )


def _matrix(
  row: Row, tensor: Tensor, family, sizes, interleave: bool
) -> _Matrix:
  order = None
  if row.heads is not None and interleave:
    order = half_split(tensor.shape[0], getattr(sizes, row.heads))
  norm = row.path.endswith("norm/scale")
  return _Matrix(tensor, order, family.norm_offset if norm else 0.0)


def _unread(
  file: GGUF, family, sizes, model: Transformer, interleave: bool, dtype, packed
) -> dict[str, Any]:
  rows = gguf_names.rows_of(family, sizes)

  def matrix(row: Row, layer: int) -> _Matrix:
    tensor = file.tensors[f"blk.{layer}.{row.name}"]
    return _matrix(row, tensor, family, sizes, interleave)

  def types(layer: int) -> tuple[str, ...]:
    names = (f"blk.{layer}.{row.name}" for row in rows)
    return tuple(file.tensors[name].type for name in names) if packed else ()

  flat: dict[str, Any] = {}
  for row in gguf_names.TOP:
    if row.name in file.tensors:
      only = _matrix(row, file.tensors[row.name], family, sizes, interleave)
      flat[row.path] = _first(_leaf(row, [only], dtype, packed))
  kinds = [(k, types(i)) for i, k in enumerate(model.layer_kinds())]
  start = 0
  for i, (repeats, period) in enumerate(tree.plan(kinds)):
    for j in range(period):
      layers = range(start + j, start + repeats * period, period)
      for row in rows:
        stored = [matrix(row, k) for k in layers]
        path = f"run{i}/layer{j}/{row.path}"
        flat[path] = _leaf(row, stored, dtype, packed)
    start += repeats * period
  return unread.nested(flat)


def _first(leaf: Any) -> Any:
  return jax.tree.map(lambda x: x.first(), leaf)


def open_model(
  path: str, file: GGUF
) -> tuple[Transformer, dict[Address, Part], Any]:
  """Returns (model, its parameters unread, tokenizer or None).

  Raises:
    UserError: it is not exactly a model that is supported.
  """
  family, sizes, interleave = sizes_from_metadata(path, file)
  _check(path, file, family, sizes)
  tokenizer = _tokenizer(path, file.metadata, sizes.vocab)
  model = presets.transformer(family, sizes)
  return model, _parts(file, family, sizes, interleave), tokenizer


def _parts(file: GGUF, family, sizes, interleave: bool) -> dict[Address, Part]:

  def part(row: Row, tensor: Tensor) -> Part:
    def read():
      stored = _matrix(row, tensor, family, sizes, interleave)
      return unread.place(_first(_leaf(row, [stored], None, True)))

    flip = len(tensor.shape) == 2 and row.path != "embed"
    shape = tensor.shape[::-1] if flip else tensor.shape
    return Part(shape, DTYPES.get(tensor.type, tensor.type), read)

  out = {
    Address(None, row.path): part(row, file.tensors[row.name])
    for row in gguf_names.TOP
    if row.name in file.tensors
  }
  for i in range(sizes.depth):
    for row in gguf_names.rows_of(family, sizes):
      tensor = file.tensors[f"blk.{i}.{row.name}"]
      if len(tensor.shape) < 3:
        out[Address(i, row.path)] = part(row, tensor)
        continue
      for e in range(tensor.shape[0]):
        one = part(row, tensor.expert(e))
        out[Address(i, row.path, e)] = one
  return out


def load_gguf(
  path: str | os.PathLike,
  dtype: str | None = "float32",
  packed: bool = False,
  shardings: unread.Shardings | None = None,
) -> Loaded:
  """Reads a model from a GGUF file.

  Args:
    dtype: of the arrays, and the model's compute dtype. Decoded weights are
      float32 numbers; bfloat16 rounds them to nearest even once more. None
      keeps what is not packed in its own type, and computes in float32.
    packed: keep matrices of 4, 5 and 8 bits as their blocks (`QTensor`),
      bit for bit, instead of decoding them.
    shardings: where the arrays go, see `unread.place`.

  Raises:
    UserError: a damaged file, an architecture, feature or type that is not
      supported, or tensors that are not exactly those of the model.
  """
  path = str(path)
  file = open_gguf(path)
  family, sizes, interleave = sizes_from_metadata(path, file)
  _check(path, file, family, sizes)
  tokenizer = _tokenizer(path, file.metadata, sizes.vocab)
  model = presets.transformer(family, sizes, dtype or "float32")
  described = _unread(file, family, sizes, model, interleave, dtype, packed)
  memory.trim()  # the tokenizer took more than it keeps
  params = unread.place(described, shardings)
  source = dict(
    format="gguf",
    path=path,
    architecture=file.metadata["general.architecture"],
    name=str(file.metadata.get("general.name", "")),
  )
  return Loaded(model, params, tokenizer, source)


def _tokenizer(path: str, metadata: Mapping[str, Any], vocab: int) -> Any:
  if not has_tokenizer(metadata):
    return None
  from research.text.tokenizer import Tokenizer

  try:
    tokenizer = Tokenizer.from_gguf(metadata)
  except UserError as error:
    raise UserError(f"{path}: {error}") from error
  if tokenizer.vocab_size > vocab:
    raise UserError(
      f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the "
      f"embedding {vocab} rows; expected at least as many"
    )
  return tokenizer
