"""Images of native resolution: patches, and the grid that each image has.

All of a batch's images have places for N patches, of which each uses as many as
it has. So images of any size run one compiled program.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.typing import Array, Float, Int, UInt8, UserError
from research.vlm.encoders import vit
from research.vlm.encoders.grouped import GroupedViews
from research.vlm.images.normalise import Normalisation

CHANNELS = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Patches:
  """The images of rows, cut into patches.

  Attributes:
    pixels: uint8 `[*B, V, N, X]`, patches of each of V images, zeros after the
      last; X = P * P * 3 in the order row, column, channel. The patches of a
      square that the connector merges follow each other, squares go row by row
      (`images.patches.patchify`).
    grids: int32 `[*B, V, 2]`, rows and columns of patches of each image; zeros
      for none.
  """

  pixels: Any
  grids: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return self.pixels.shape

  def padded(self, count: int) -> "Patches":
    """Returns NumPy arrays with places for `count` patches an image.

    Raises:
      UserError: an image has more.
    """
    missing = count - self.pixels.shape[-2]
    if missing < 0:
      raise UserError(
        f"patches: found {self.pixels.shape[-2]} of an image, expected at most"
        f" {count}; allow more, or let the tiling make fewer (most)"
      )
    width = [(0, 0)] * self.pixels.ndim
    width[-2] = 0, missing
    return dataclasses.replace(self, pixels=np.pad(self.pixels, width))


Images = UInt8[Array, "B V H W 3"] | Patches | GroupedViews
"""Views of one size, padded at the end of each row; images of native
resolution, each of a size of its own; or views whose patches are pooled
together."""


def coordinates(
  grids: Int[Array, "B 2"], count: int, side: int
) -> Int[Array, "B N 2"]:
  """Returns row and column of each patch, -1 for padding.

  Args:
    grids: rows and columns of patches of each image, multiples of `side`.
    count: N.
    side: of the squares whose patches follow each other.
  """
  place = jnp.arange(count)
  square, inside = jnp.divmod(place, side * side)
  across = jnp.maximum(grids[:, 1:] // side, 1)
  row = side * (square // across) + inside // side
  column = side * (square % across) + inside % side
  used = place < grids[:, :1] * grids[:, 1:]
  return jnp.where(used[..., None], jnp.stack([row, column], axis=-1), -1)


def normalised(
  patches: Patches, normalise: Normalisation
) -> Float[Array, "..."]:
  """Returns pixels of patches as an encoder takes them, computed in fp32."""
  pixels = patches.pixels
  values = pixels.reshape(*pixels.shape[:-1], -1, CHANNELS)
  mean = np.asarray(normalise.mean, np.float32)
  std = np.asarray(normalise.std, np.float32)
  values = (values.astype(jnp.float32) / 255 - mean) / std
  return values.reshape(pixels.shape)


def encoder_inputs(
  images: Images, normalise: Normalisation, model: vit.VisionTransformer
) -> tuple[Float[Array, "B N X"], Int[Array, "B N 2"]]:
  """Returns the first view of each row, for an encoder that merges no patches.

  Args:
    images: views of one size, or images of native resolution.

  Returns:
    Patches and their coordinates, as `VisionTransformer` takes them.

  Raises:
    UserError: views of one size have another grid than its learned positions.
  """
  if isinstance(images, GroupedViews):
    images = images.pixels
  if isinstance(images, Patches):
    first = Patches(images.pixels[:, 0], images.grids[:, 0])
    at = coordinates(first.grids, first.shape[1], side=1)
    return normalised(first, normalise), at
  return vit.view_patches(model, images[:, 0], normalise)


def without_padding(
  soft: Float[Array, "B V S D"], sizes: Int[Array, "B V"]
) -> Float[Array, "B P D"]:
  """Returns each row's soft tokens, one image right after the other.

  Args:
    soft: of each image, in places for S.
    sizes: how many of them each image has.

  Returns:
    P = V S soft tokens a row; those after the last image's are of any value.
  """
  rows, views, places, width = soft.shape
  ends = jnp.cumsum(sizes, axis=1)
  place = jnp.arange(views * places)
  image = jnp.sum(ends[:, None] <= place[:, None], axis=-1)
  image = jnp.minimum(image, views - 1)
  begin = jnp.take_along_axis(ends - sizes, image, axis=1)
  index = jnp.minimum(image * places + place - begin, views * places - 1)
  flat = soft.reshape(rows, views * places, width)
  return jnp.take_along_axis(flat, index[..., None], axis=1)
