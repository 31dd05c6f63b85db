"""Contrastive models: zero-shot classification and retrieval."""

from collections.abc import Sequence

import numpy as np

from research.typing import Bool, Float, Int, UserError


def _normalized(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def zero_shot_weights(
  embeddings: Float[np.ndarray, "C M D"],
) -> Float[np.ndarray, "C D"]:
  """Returns a classifier's weights, of norm 1 a class.

  The mean over prompts of normalised embeddings, normalised again (Radford et
  al. 2021, section 3.1.4).

  Args:
    embeddings: of M prompts about each of C classes.
  """
  return _normalized(_normalized(embeddings).mean(1))


def classify(
  images: Float[np.ndarray, "B D"], weights: Float[np.ndarray, "C D"]
) -> Int[np.ndarray, "B"]:
  """Returns the class whose weights are nearest by the cosine."""
  return (_normalized(images) @ weights.T).argmax(-1)


def recall_at(
  similarity: Float[np.ndarray, "Q K"],
  relevant: Bool[np.ndarray, "Q K"],
  ranks: Sequence[int] = (1, 5, 10),
) -> dict[int, float]:
  """Returns rank -> share of queries with a relevant item up to that rank.

  Any of an image's captions counts. Of equal similarities the earlier item
  ranks first. The other direction is that of both arrays transposed.

  Args:
    ranks: from 1.

  Raises:
    UserError: a query has no relevant item.
  """
  if not relevant.any(-1).all():
    query = int(np.flatnonzero(~relevant.any(-1))[0])
    raise UserError(
      f"recall_at: query {query} has no relevant item, so it has no recall."
    )
  order = np.argsort(-similarity, axis=-1, kind="stable")
  hits = np.take_along_axis(relevant, order, -1)
  first = hits.argmax(-1)
  return {k: float((first < k).mean()) for k in ranks}
