"""Resizing exactly as Pillow does, and what is done to whole images around it.

Images are uint8 `[H, W, 3]`; sizes are (height, width).

Pillow's filters antialias and round to uint8 between their two passes and
after. torchvision's uint8 kernels do, too, and still differ from them by a
level or two, in places more (`tests/peers/test_images.py`); `jax.image.resize`
does not round.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float32, Int, UInt8
from PIL import Image

Size = tuple[int, int]
"""(height, width) in pixels."""

Pixels = UInt8[np.ndarray, "_ _ 3"]
"""An image, whose sides are no other image's."""

Resample = Literal["bilinear", "bicubic", "lanczos", "bilinear_sampled"]
"""Pillow's filters; and bilinear interpolation at points, which aliases.

The last one is torch's `antialias=False`, which Molmo 2 was trained with.
"""

Indices = Int[np.ndarray, "T"]

_FILTERS = {
  "bilinear": Image.Resampling.BILINEAR,
  "bicubic": Image.Resampling.BICUBIC,
  "lanczos": Image.Resampling.LANCZOS,
}


def resize(image: Pixels, size: Size, resample: Resample) -> Pixels:
  """Returns `image` at `size`, its aspect ratio changed as need be."""
  if image.shape[:2] == tuple(size):
    return image
  if resample == "bilinear_sampled":
    return _sample(image, size)
  height, width = size
  resized = Image.fromarray(image).resize((width, height), _FILTERS[resample])
  return np.asarray(resized)


def _sample(image: Pixels, size: Size) -> Pixels:
  """Interpolates between four pixels, to the last bit as torch does.

  Along rows first, in float32, with torch's fused multiply-adds; then rounded,
  half to even. (On one thread, and where rows and columns together are at most
  128, torch sums in another order: a pixel in a thousand is a level away.)
  """
  above, below, y = _neighbours(image.shape[0], size[0])
  left, right, x = _neighbours(image.shape[1], size[1])
  # Only rows that are used: a large image has many others.
  used, place = np.unique(np.stack([above, below]), return_inverse=True)
  lines = image[used].astype(np.float32)
  lines = _blend(lines[:, left], lines[:, right], x[None, :, None])
  pixels = _blend(lines[place[0]], lines[place[1]], y[:, None, None])
  return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def _blend(a, b, weight):
  """Returns `fma(a, 1 - weight, b * weight)` in float32.

  A product of two float32 is exact in float64.
  """
  fused = a * (1 - weight).astype(np.float64) + b * weight
  return fused.astype(np.float32)


def _neighbours(
  have: int, want: int
) -> tuple[Indices, Indices, Float32[np.ndarray, "T"]]:
  """Returns each target pixel's two source indices, the second one's weight."""
  scale = np.float64(np.float32(have) / np.float32(want))
  centres = scale * (np.arange(want) + 0.5) - 0.5
  centres = np.maximum(centres.astype(np.float32), np.float32(0))
  first = np.minimum(centres.astype(np.int64), have - 1)
  weight = np.clip(centres - first.astype(np.float32), 0, 1)
  return first, np.minimum(first + 1, have - 1), weight.astype(np.float32)


def shortest_side(height: int, width: int, target: int) -> Size:
  """Returns the size whose shorter side is `target`; the other is cut off."""
  longer = int(target * max(height, width) / min(height, width))
  return (longer, target) if width <= height else (target, longer)


def centre_crop(image: Pixels, size: Size) -> Pixels:
  """Returns the middle of an image that is at least of `size`."""
  top, left = (
    (have - want) // 2 for have, want in zip(image.shape, size, strict=False)
  )
  return image[top : top + size[0], left : left + size[1]]


def pad_centred(
  image: Pixels, size: Size, colour: tuple[int, int, int] = (0, 0, 0)
) -> Pixels:
  """Returns a canvas of `size` and `colour` with the image in its middle.

  An odd margin is larger below and to the right.
  """
  height, width, _ = image.shape
  if (height, width) == tuple(size):
    return image
  canvas = np.empty((*size, 3), np.uint8)
  canvas[:] = colour
  top, left = (size[0] - height) // 2, (size[1] - width) // 2
  canvas[top : top + height, left : left + width] = image
  return canvas


def cut(image: Pixels, tile: int) -> UInt8[np.ndarray, "N tile tile 3"]:
  """Returns an image's square tiles, row by row; none is left over."""
  rows, columns = (side // tile for side in image.shape[:2])
  tiles = image.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2)
  return tiles.reshape(rows * columns, tile, tile, 3)
