"""Pictures of vision language models: views, scenes, features, attention."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from research.typing import Float, UInt8
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.scenes.sample import Sample


def views(image: UInt8[np.ndarray, "H W 3"], preprocessor: Preprocessor) -> Any:
  """Returns a figure of an image, of its tiles in their places, and the rest.

  Tiles stand as they were cut, the view of the whole image behind them; numbers
  are the soft tokens that each becomes.

  Args:
    preprocessor: one whose tiles come before the whole view, such as SmolVLM's
      or InternVL's.
  """
  made = preprocessor.views(image)
  plan, pixels = made.plan, made.pixels
  rows, columns = max(plan.rows, 1), max(plan.columns, 1)
  tiles = plan.rows * plan.columns
  whole = len(pixels) - tiles
  counts = [h * w for h, w in plan.grids]
  figure, axes = plt.subplots(
    rows, columns + 2, figsize=(1.3 * (columns + 2), 1.3 * rows), squeeze=False
  )
  for axis in axes.flat:
    axis.axis("off")
  axes[0, 0].imshow(image)
  axes[0, 0].set_title(f"{plan.size[0]} x {plan.size[1]}", fontsize=7)
  for number in range(tiles):
    axis = axes[number // columns, 1 + number % columns]
    axis.imshow(pixels[number])
    axis.set_title(str(counts[number]), fontsize=7)
  for number in range(whole):
    axis = axes[number % rows, -1]
    axis.imshow(pixels[tiles + number])
    axis.set_title(f"{counts[tiles + number]}", fontsize=7)
  figure.suptitle(f"{plan.views} views, {plan.soft_tokens} soft tokens")
  return figure


def scenes(samples: Sequence[Sample]) -> Any:
  """Returns a figure of images with their questions and answers."""
  figure, axes = plt.subplots(
    1, len(samples), figsize=(2.2 * len(samples), 2.6), squeeze=False
  )
  for axis, sample in zip(axes[0], samples, strict=True):
    axis.imshow(sample.image)
    axis.set_title(f"{sample.question}\n{sample.answer}", fontsize=7)
    axis.axis("off")
  return figure


def features(
  image: UInt8[np.ndarray, "H W 3"], found: Float[np.ndarray, "h w D"]
) -> Any:
  """Returns a figure of features: their three main directions as colours.

  Args:
    found: on the grid of patches or of soft tokens.
  """
  flat = found.reshape(-1, found.shape[-1]).astype(np.float64)
  flat = flat - flat.mean(0)
  _, _, directions = np.linalg.svd(flat, full_matrices=False)
  colours = flat @ directions[:3].T
  low, high = colours.min(0), colours.max(0)
  colours = (colours - low) / np.maximum(high - low, 1e-12)
  figure, (left, right) = plt.subplots(1, 2, figsize=(5, 2.5))
  left.imshow(image)
  right.imshow(colours.reshape(*found.shape[:2], 3))
  left.set_title("image", fontsize=8)
  right.set_title(f"features, {found.shape[0]} x {found.shape[1]}", fontsize=8)
  for axis in (left, right):
    axis.axis("off")
  return figure


def attention(
  image: UInt8[np.ndarray, "H W 3"],
  maps: Mapping[str, Float[np.ndarray, "h w"]],
) -> Any:
  """Returns a figure of attention over an image, one panel a map.

  Args:
    maps: by title, on grids of soft tokens; bright is much.
  """
  figure, axes = plt.subplots(
    1, len(maps), figsize=(2.4 * len(maps), 2.6), squeeze=False
  )
  height, width = image.shape[:2]
  for axis, (title, found) in zip(axes[0], maps.items(), strict=True):
    axis.imshow(image)
    axis.imshow(
      found, cmap="inferno", alpha=0.6, extent=(0, width, height, 0),
      interpolation="nearest",
    )  # fmt: skip
    axis.set_title(f"{title}: {float(np.sum(found)):.0%}", fontsize=8)
    axis.axis("off")
  return figure
