"""Grounding: intersection over union of boxes and of masks."""

import re

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


def parse_box(text: str) -> tuple[float, float, float, float] | None:
  """Returns the first four numbers in a row of a text, None without any.

  Between them stand spaces, commas, or both: "[0.1, 0.2, 0.5, 0.6]".
  """
  number = r"(-?(?:\d+(?:\.\d+)?|\.\d+))"
  found = re.search(r"(?<![\d.])" + r"[\s,]+".join([number] * 4), text)
  return tuple(map(float, found.groups())) if found else None


def box_score(prediction: str, answer: str, threshold: float = 0.5) -> float:
  """Returns 1 where the box in a text has the IoU with that of the answer."""
  found, box = parse_box(prediction), parse_box(answer)
  if found is None or box is None:
    return 0.0
  return float(box_iou(np.array(found), np.array(box)) >= threshold)


def mask_iou(
  one: Bool[np.ndarray, "*batch H W"], two: Bool[np.ndarray, "*batch H W"]
) -> Float[np.ndarray, "*batch"]:
  """Returns intersection over union of masks, 0 where both are empty."""
  shared = (one & two).sum((-2, -1)).astype(float)
  union = np.asarray((one | two).sum((-2, -1)), float)
  return np.divide(shared, union, out=np.zeros_like(union), where=union > 0)
