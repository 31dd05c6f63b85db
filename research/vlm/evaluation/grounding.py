"""Grounding: intersection over union of boxes and of masks."""

import numpy as np

from research.typing import Bool, Float, Shaped


def box_iou(
  one: Shaped[np.ndarray, "*batch 4"], two: Shaped[np.ndarray, "*batch 4"]
) -> Float[np.ndarray, "*batch"]:
  """Returns intersection over union of boxes, pair by pair.

  Args:
    one: left, top, right, bottom.
    two: the same; a side that ends before it starts is empty.

  Returns:
    0 to 1; 0 where both are empty.
  """
  one, two = np.asarray(one, float), np.asarray(two, float)

  def area(box):
    return np.prod(np.maximum(0, box[..., 2:] - box[..., :2]), axis=-1)

  low = np.maximum(one[..., :2], two[..., :2])
  high = np.minimum(one[..., 2:], two[..., 2:])
  shared = area(np.concatenate([low, high], -1))
  union = area(one) + area(two) - shared
  return np.divide(shared, union, out=np.zeros_like(union), where=union > 0)


def grounding_accuracy(
  predictions: Shaped[np.ndarray, "B 4"],
  boxes: Shaped[np.ndarray, "B 4"],
  threshold: float = 0.5,
) -> float:
  """Returns the share of boxes found: RefCOCO's accuracy at an IoU of 0.5."""
  return float((box_iou(predictions, boxes) >= threshold).mean())


def mask_iou(
  one: Bool[np.ndarray, "*batch H W"], two: Bool[np.ndarray, "*batch H W"]
) -> Float[np.ndarray, "*batch"]:
  """Returns intersection over union of masks, 0 where both are empty."""
  shared = (one & two).sum((-2, -1)).astype(float)
  union = np.asarray((one | two).sum((-2, -1)), float)
  return np.divide(shared, union, out=np.zeros_like(union), where=union > 0)
