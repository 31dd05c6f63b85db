"""Vision transformer: patches to features (Dosovitskiy et al. 2021).

arXiv:2010.11929. CLIP's and SigLIP's image towers are rows of `presets`; they
differ in positions, norms, the class token and pooling.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from kernels_pallas.masks import Mask
from research import sharding, weights
from research.nn import layers
from research.nn.attention_context import take_tokens
from research.nn.block import Block
from research.nn.norm import LayerNorm, Norm
from research.nn.stack import Stack
from research.typing import (
  Array,
  Bool,
  Float,
  Int,
  Params,
  PRNGKey,
  UInt8,
  UserError,
)
from research.vlm.encoders.clipped import Clipping
from research.vlm.encoders.pooling import Pooling
from research.vlm.encoders.positions import Positions, PositionTable
from research.vlm.encoders.windows import (
  window_order,
  window_side,
  windows_of,
)
from research.vlm.images.normalise import Normalisation

CHANNELS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
  """Which activations of an encoder are its features.

  Attributes:
    layers: as in transformers' `hidden_states`: 0 is the input of the first
      block, i the output of block i, negative ones count from the end.
      Features of several layers are concatenated, in this order.
    normed: whether the final norm is applied to each.
    class_token: whether the class token's features come first, if there is one.
  """

  layers: Sequence[int] = (-1,)
  normed: bool = True
  class_token: bool = False


class VisionTransformer(nn.Module):
  """A transformer over image patches.

  Attributes:
    width: `D`.
    patch: side of a patch in pixels, `P`.
    stack: the layers; some may attend within windows (`WindowedBlock`).
    positions: learned position embeddings, or None (rotary ones are in the
      layers).
    frames: of a video that a patch has, if the encoder was trained on videos;
      an image is one of so many equal frames (Qwen2-VL).
    centre: of patches that come as values in [0, 1], or None (Gemma 4).
    patch_bias: whether the patch embedding has a bias.
    class_token: whether a learned token comes first (CLIP).
    norm: the final norm, or None (InternVL).
    pooling: one vector per image, or None.
    clipping: bounds what goes into and comes out of a new layer's matrices, or
      None.
    dtype: compute dtype; norms and softmax always compute in fp32.
    remat: see `layers.run_layers`.
  """

  width: int
  patch: int
  stack: Stack
  positions: Positions | None
  frames: int = 1
  centre: Normalisation | None = None
  patch_bias: bool = True
  class_token: bool = False
  input_norm: Norm | None = None
  norm: Norm | None = LayerNorm()
  pooling: Pooling | None = None
  clipping: Clipping | None = None
  dtype: str = "float32"
  remat: layers.Remat = "none"

  def layer_kinds(self) -> tuple[Block, ...]:
    return self.stack.kinds()

  @nn.compact
  def __call__(
    self,
    patches: Float[Array, "B N X"],
    coordinates: Int[Array, "B N 2"],
    valid: Bool[Array, "B N"] | None = None,
    features: Features = Features(),
  ) -> Float[Array, "B M C"]:
    """Returns the features of each patch, `[B, N, layers * D]`.

    Args:
      patches: normalised pixels of each patch, `X = P * P * 3` in the order
        row, column, channel; see `patchify`.
      coordinates: of each patch in the position table: row and column. -1 marks
        padding.
      valid: whether each patch is part of the image; by default those whose
        coordinates are not negative.
      features: which activations. With its class token, `M = N + 1`.
    """
    found = self._features(patches, coordinates, valid, features)
    return jnp.concatenate(found, axis=-1)

  @nn.compact
  def pooled(
    self,
    patches: Float[Array, "B N X"],
    coordinates: Int[Array, "B N 2"],
    valid: Bool[Array, "B N"] | None = None,
  ) -> Float[Array, "B E"]:
    """Returns one vector per image; arguments as for `__call__`."""
    if self.pooling is None:
      raise UserError("this encoder has no pooling, so no vector per image")
    valid = self._valid(coordinates, valid)
    last = Features(normed=False, class_token=True)
    [x] = self._features(patches, coordinates, valid, last)
    if self.class_token:
      valid = jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)
    return self.pooling(x, valid, self._final_norm())

  def _features(self, patches, coordinates, valid, features):
    valid = self._valid(coordinates, valid)
    x = self._embed(patches, coordinates)
    if self.class_token:
      valid = jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)
    x = sharding.constrain(x, "batch", "length", None)
    found = self._layers(x, coordinates, valid, features.layers)
    if features.normed:
      norm = self._final_norm()
      found = [norm(x) for x in found]
    if self.class_token and not features.class_token:
      found = [x[:, 1:] for x in found]
    return found

  def _final_norm(self):
    if self.norm is None:
      return lambda x: x
    return self.norm.clone(name="final_norm", parent=self)

  def _valid(self, coordinates, valid):
    return coordinates[..., 0] >= 0 if valid is None else valid

  def _embed(self, patches, coordinates):
    if self.centre is not None:
      mean, std = (
        np.asarray(x, np.float32) for x in (self.centre.mean, self.centre.std)
      )
      values = patches.reshape(*patches.shape[:-1], -1, CHANNELS)
      patches = ((values - mean) / std).reshape(patches.shape)
    x = weights.project(
      self,
      jnp.tile(patches.astype(self.dtype), self.frames),
      "patch_embed",
      self.width,
      self.patch_bias,
    )
    if self.class_token:
      first = weights.weight(
        self, "class_embed", nn.initializers.normal(0.02), (self.width,)
      )
      first = jnp.broadcast_to(first, (x.shape[0], 1, self.width))
      x = jnp.concatenate([first.astype(x.dtype), x], axis=1)
    if self.positions is not None:
      places = self.positions(coordinates, self.width, self.class_token)
      x = x + places.astype(x.dtype)
    if self.input_norm is not None:
      x = self.input_norm(x)
    return x

  def _layers(self, x, coordinates, valid, wanted: Sequence[int]) -> list[Any]:
    depth = self.stack.depth
    numbers = [_count(layer, depth) for layer in wanted]
    last = max(numbers)
    runs = layers.stacked_runs(self, self.stack, self._init_layer)
    if not last:
      return [x] * len(numbers)
    order = self._order(coordinates, valid)
    if order is not None:
      x, coordinates, valid = (
        take_tokens(each, order) for each in (x, coordinates, valid)
      )
    positions = jnp.where(valid, 0, -1)
    masks = {
      side: Mask.full(
        segments=windows_of(coordinates, valid, side) if side else positions
      )
      for side in set(map(window_side, self.stack.blocks))
    }
    rotations = self._rotations(coordinates)

    def layer(block, own, x, state, alone):
      del alone
      rope = block.attention.rope
      rotation = rotations.get((rope, block.attention.head_dim))
      given = x, positions, masks[window_side(block)], rotation
      x, _, _ = block.apply({"params": own}, *given)
      return x, state

    taps = sorted({n - 1 for n in numbers if 0 < n < last})
    y, _, watched = layers.run_layers(
      runs, x, layer, remat=self.remat, taps=taps, stop=last
    )
    after = {0: x, last: y} | {
      n + 1: each for n, each in zip(taps, watched, strict=True)
    }
    found = [after[n] for n in numbers]
    if order is None:
      return found
    back = jnp.argsort(order, axis=1)
    return [take_tokens(each, back) for each in found]

  def _order(self, coordinates, valid):
    """Returns the order of patches in which the layers run; None for theirs."""
    if not any(map(window_side, self.stack.blocks)):
      return None
    if self.class_token:
      raise UserError(
        "VisionTransformer: found layers with windows and a class token, which"
        " is in none; expected one of them"
      )
    return window_order(coordinates, valid, self.stack.blocks)

  def _rotations(self, coordinates):
    kinds = {
      (b.attention.rope, b.attention.head_dim) for b in self.stack.blocks
    }
    return {
      (rope, dim): rope.tables(coordinates, dim)
      for rope, dim in kinds
      if rope is not None
    }

  def _init_layer(self, block: Block, key: PRNGKey) -> Params:
    params = layers.new_layer(block, key, self.width, self.dtype)
    return params if self.clipping is None else self.clipping(params)


def _count(layer: int, depth: int) -> int:
  """Returns how many blocks come before hidden state `layer`."""
  number = layer + depth + 1 if layer < 0 else layer
  if not 0 <= number <= depth:
    raise UserError(
      f"Features.layers: found {layer}, expected {-depth - 1} to {depth}: the"
      f" encoder has {depth} layers"
    )
  return number


def new_params(model: VisionTransformer, key: PRNGKey) -> Params:
  """Returns new parameters, those of the pooling included if there is one."""
  patches = jnp.zeros((1, 1, model.patch**2 * CHANNELS))
  at = jnp.zeros((1, 1, 2), jnp.int32)
  if model.pooling is not None:
    return model.init(key, patches, at, method="pooled")["params"]
  return model.init(key, patches, at)["params"]


def normalised(
  pixels: UInt8[Array, "*B H W 3"], normalise: Normalisation
) -> Float[Array, "*B H W 3"]:
  """Returns pixels as an encoder takes them, computed in fp32."""
  mean = np.asarray(normalise.mean, np.float32)
  std = np.asarray(normalise.std, np.float32)
  return (pixels.astype(jnp.float32) / 255 - mean) / std


def patchify(
  images: Float[Array, "B H W X"], patch: int
) -> Float[Array, "B N Y"]:
  """Cuts images into patches, row by row.

  Args:
    images: `[B, H, W, channels]`. What is left over at the right and below is
      not seen, as a convolution has it: 6 of SigLIP's 384 pixels.
    patch: side of a patch in pixels, at most H and W.

  Returns:
    `[B, (H / patch) (W / patch), patch * patch * channels]`; within a patch the
    order is row, column, channel.
  """
  batch, height, width, channels = images.shape
  rows, columns = height // patch, width // patch
  if not rows or not columns:
    raise UserError(
      f"patchify: found images of {height} x {width} pixels, expected at least"
      f" one patch of {patch} x {patch}"
    )
  x = images[:, : rows * patch, : columns * patch]
  x = x.reshape(batch, rows, patch, columns, patch, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, rows * columns, patch * patch * channels)


def view_patches(
  model: VisionTransformer,
  pixels: UInt8[Array, "B H W 3"],
  normalise: Normalisation,
) -> tuple[Float[Array, "B N X"], Int[Array, "B N 2"]]:
  """Returns the patches of views of one size, and their coordinates.

  Raises:
    UserError: the encoder's learned positions are of another grid.
  """
  patches = patchify(normalised(pixels, normalise), model.patch)
  grid = check_grid(model, *pixels.shape[1:3])
  at = grid_coordinates(*grid)
  return patches, jnp.broadcast_to(at, (len(patches), *at.shape[1:]))


def check_grid(
  model: VisionTransformer, height: int, width: int
) -> tuple[int, int]:
  """Returns the rows and columns of patches of views of this size.

  Raises:
    UserError: the encoder's learned positions are of another grid.
  """
  grid = height // model.patch, width // model.patch
  table = model.positions
  if isinstance(table, PositionTable) and grid != (table.rows, table.columns):
    raise UserError(
      f"images: found views of {grid[0]} x {grid[1]} patches, expected"
      f" {table.rows} x {table.columns}, as the encoder has learned positions"
      " for; make views of that size, or resize the positions"
      " (research.vlm.resolution)"
    )
  return grid


def grid_coordinates(rows: int, columns: int) -> Int[Array, "1 N 2"]:
  """Returns row and column of each patch of a grid, row by row."""
  at = jnp.stack(jnp.indices((rows, columns)), axis=-1)
  return at.reshape(1, rows * columns, 2)
