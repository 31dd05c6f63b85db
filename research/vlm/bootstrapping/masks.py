"""What queries and text see of each other, in each of the three objectives.

Li et al. 2023, arXiv:2301.12597, figure 2. Queries come first. Padding of the
text neither sees nor is seen.
"""

import jax.numpy as jnp

from kernels_pallas.masks import Mask
from research.typing import Array, Bool


def unimodal(valid: Bool[Array, "B T"], queries: int) -> Mask:
  """Contrast: queries see queries, text sees text.

  Args:
    valid: which tokens of the text are not padding.
    queries: number of queries before the text.
  """
  return Mask.full(segments=_segments(valid, queries, text=1))


def bidirectional(valid: Bool[Array, "B T"], queries: int) -> Mask:
  """Matching: all see all; arguments as for `unimodal`."""
  return Mask.full(segments=_segments(valid, queries, text=0))


def multimodal_causal(valid: Bool[Array, "B T"], queries: int) -> Mask:
  """Captions: text sees all queries and the text before; queries see queries.

  Arguments as for `unimodal`.
  """
  segments = _segments(valid, queries, text=0)
  return Mask.prefix_lm(jnp.full((1,), queries), segments=segments)


def _segments(valid, queries, text):
  ids = jnp.where(valid, text, -1)
  return jnp.pad(ids, ((0, 0), (queries, 0)))
