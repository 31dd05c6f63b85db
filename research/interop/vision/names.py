"""What Hugging Face's files call the parameters of vision towers.

Each row pairs a path of ours with a name, within a tower, and says how the
array is laid out there. Read in either direction it is the importer and the
exporter. Which rows a tower has follows from its own parameters.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from research.typing import UserError
from research.vlm.encoders.vit import CHANNELS


@dataclasses.dataclass(frozen=True)
class Layout:
  """How an array of ours lies in a file.

  Attributes:
    ours: from theirs to ours.
    theirs: from ours to theirs.
  """

  ours: Callable[[np.ndarray], np.ndarray]
  theirs: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x: x, lambda x: x)
TRANSPOSED = Layout(np.transpose, np.transpose)


def _patches(x: np.ndarray) -> np.ndarray:
  """Returns a matrix `[P P 3, D]` of a convolution's `[D, 3, P, P]`."""
  if x.ndim != 4 or x.shape[1] != CHANNELS or x.shape[2] != x.shape[3]:
    raise UserError(
      f"patch embedding: found shape {list(x.shape)}, expected [width,"
      f" {CHANNELS}, patch, patch]"
    )
  return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def _convolution(x: np.ndarray) -> np.ndarray:
  """Inverts `_patches`."""
  side = round((x.shape[0] // CHANNELS) ** 0.5)
  return x.reshape(side, side, CHANNELS, -1).transpose(3, 2, 0, 1)


def _frames(x: np.ndarray) -> np.ndarray:
  """Returns a matrix `[2 P P 3, D]` of a convolution's `[D, 3, 2, P, P]`."""
  if x.ndim != 5 or x.shape[1:3] != (CHANNELS, 2) or x.shape[3] != x.shape[4]:
    raise UserError(
      f"patch embedding: found shape {list(x.shape)}, expected [width,"
      f" {CHANNELS}, 2, patch, patch]"
    )
  return x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0])


def _convolution_of_frames(x: np.ndarray) -> np.ndarray:
  """Inverts `_frames`."""
  side = round((x.shape[0] // CHANNELS // 2) ** 0.5)
  return x.reshape(2, side, side, CHANNELS, -1).transpose(4, 3, 0, 1, 2)


CONVOLUTION = Layout(_patches, _convolution)
TWO_FRAMES = Layout(_frames, _convolution_of_frames)
FIRST_OF_ONE = Layout(lambda x: x[0], lambda x: x[None])
PROBE = Layout(lambda x: x.reshape(1, -1), lambda x: x[None])


@dataclasses.dataclass(frozen=True)
class Row:
  """One parameter.

  Attributes:
    ours: path within a layer (after `layers/`) or outside of them.
    theirs: name; `<i>` in it is the layer's number.
    layout: how it lies in the file.
    part: number of this matrix among the three of a fused `[3 D, ...]`; None
      for an array of its own.
  """

  ours: str
  theirs: str
  layout: Layout = SAME
  part: int | None = None


def linear(ours: str, theirs: str) -> tuple[Row, Row]:
  """Returns the rows of a matrix and its bias."""
  return (
    Row(ours, f"{theirs}.weight", TRANSPOSED),
    Row(f"{ours}_bias", f"{theirs}.bias"),
  )


def norm(ours: str, theirs: str) -> tuple[Row, Row]:
  """Returns the rows of a norm's scale and bias."""
  return (
    Row(f"{ours}/scale", f"{theirs}.weight"),
    Row(f"{ours}/bias", f"{theirs}.bias"),
  )


LAYER = "layers/"
_THEIRS = "encoder.layers.<i>."

_LAYERS = (
  *norm(f"{LAYER}attention_norm", f"{_THEIRS}layer_norm1"),
  *norm(f"{LAYER}mlp_norm", f"{_THEIRS}layer_norm2"),
  *(
    row
    for x, theirs in zip("qkvo", ("q", "k", "v", "out"), strict=True)
    for row in linear(
      f"{LAYER}attention/{x}", f"{_THEIRS}self_attn.{theirs}_proj"
    )
  ),
  *linear(f"{LAYER}mlp/up", f"{_THEIRS}mlp.fc1"),
  *linear(f"{LAYER}mlp/down", f"{_THEIRS}mlp.fc2"),
)

_FUSED = "head.attention.in_proj"

VISION = (
  Row("patch_embed", "embeddings.patch_embedding.weight", CONVOLUTION),
  Row("patch_embed_bias", "embeddings.patch_embedding.bias"),
  Row("class_embed", "embeddings.class_embedding"),
  Row("positions/table", "embeddings.position_embedding.weight"),
  # The misspelling is the tensor's real name.
  *norm("input_norm", "pre_layrnorm"),
  *_LAYERS,
  *norm("final_norm", "post_layernorm"),
  Row("pooling/projection", "projection.weight", TRANSPOSED),
  Row("pooling/probe", "head.probe", PROBE),
  *(
    Row(
      f"pooling/attention/{x}", "head.attention.in_proj_weight", TRANSPOSED, i
    )
    for i, x in enumerate("qkv")
  ),
  *(
    Row(f"pooling/attention/{x}_bias", f"{_FUSED}_bias", SAME, i)
    for i, x in enumerate("qkv")
  ),
  *linear("pooling/attention/o", "head.attention.out_proj"),
  *norm("pooling/norm", "head.layernorm"),
  *linear("pooling/mlp/up", "head.mlp.fc1"),
  *linear("pooling/mlp/down", "head.mlp.fc2"),
)
"""Image towers of CLIP, SigLIP, Idefics3 and SmolVLM."""

NAFLEX = (*linear("patch_embed", "embeddings.patch_embedding"), *VISION[2:])
"""SigLIP 2's image tower of NaFlex, which gets patches and multiplies them."""

TEXT = (
  Row("embed", "embeddings.token_embedding.weight"),
  Row("positions", "embeddings.position_embedding.weight"),
  *_LAYERS,
  *norm("final_norm", "final_layer_norm"),
)

CLIP_TEXT = (*TEXT, Row("projection", "projection.weight", TRANSPOSED))
SIGLIP_TEXT = (*TEXT, *linear("projection", "head"))

BUFFERS = ("embeddings.position_ids",)
"""Integer tables of old files, which every reader computes itself."""


def read_tower(
  rows: Iterable[Row],
  outside: Mapping[str, tuple[int, ...]],
  layers: Sequence[Mapping[str, tuple[int, ...]]],
  tensors: Mapping[str, Any],
  dtype: str,
) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]], set[str]]:
  """Returns a tower's arrays: outside of layers, of each layer, and names read.

  Args:
    outside: shapes of our parameters outside of layers, by path.
    layers: shapes of each layer's parameters, by path.
    tensors: the file's, by their names within the tower; unread.
    dtype: of the arrays.

  Raises:
    UserError: a tensor is missing, or has another shape.
  """
  by_path = {row.ours: row for row in rows}
  used = set()

  def arrays(prefix, number, shapes):
    out = {}
    for path, shape in shapes.items():
      row = by_path[prefix + path]
      name = row.theirs.replace("<i>", str(number))
      out[path] = _read(row, name, tensors, shape).astype(dtype)
      used.add(name)
    return out

  own = arrays("", None, outside)
  return own, [arrays(LAYER, i, x) for i, x in enumerate(layers)], used


def _read(row: Row, name: str, tensors, shape) -> np.ndarray:
  if name not in tensors:
    raise UserError(f"missing: {name}, a tensor of shape {list(shape)}")
  x = np.asarray(tensors[name].read())
  parts = 1 if row.part is None else 3
  # A layout would leave out what is more, or fail without a name.
  if x.size != parts * math.prod(shape):
    raise UserError(
      f"{name}: found shape {list(x.shape)}, {x.size:,} values, expected"
      f" {list(shape)} by config.json{', three times' if parts > 1 else ''}"
    )
  if row.part is not None:
    third = x.shape[0] // 3
    x = x[row.part * third : (row.part + 1) * third]
  x = row.layout.ours(x)
  if x.shape != tuple(shape):
    raise UserError(
      f"{name}: found shape {list(tensors[name].shape)}, which is"
      f" {list(x.shape)} here, expected {list(shape)} by config.json"
    )
  return x


def write_tower(
  rows: Iterable[Row],
  outside: Mapping[str, np.ndarray],
  layers: Iterable[Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:
  """Returns a tower's tensors under the file's names; inverts `read_tower`."""
  by_path = {row.ours: row for row in rows}
  parts: dict[str, dict[int, np.ndarray]] = {}
  numbered = [(None, outside), *enumerate(layers)]
  for i, arrays in numbered:
    for path, array in arrays.items():
      row = by_path[path if i is None else LAYER + path]
      name = row.theirs.replace("<i>", str(i))
      x = row.layout.theirs(np.asarray(array))
      parts.setdefault(name, {})[row.part or 0] = x
  return {
    name: np.concatenate([x[i] for i in sorted(x)]) if len(x) > 1 else x[0]
    for name, x in parts.items()
  }
