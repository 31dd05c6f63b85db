"""Chosen rows of a batch see what they see among all rows."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from research import weights
from research.nn.cross_attention import Media
from research.nn.multimodal import ImagePositions, InjectedFeatures
from research.vlm.splice import SplicedEmbedding

IMAGE = 9
RNG = np.random.default_rng(0)
TOKENS = jnp.array([[1, 9, 9, 2], [9, 9, 3, 4], [5, 9, 9, 6]])
ROWS = jnp.array([2, 0, 2])


def array(*shape):
  return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def media():
  sizes = jnp.array([[[2, 1], [1, 2], [3, 0]]] * 2)
  keys, values = array(2, 3, 3, 1, 4), array(2, 3, 3, 1, 4)
  return Media(keys, values, sizes, IMAGE).with_tokens(TOKENS, None)


WEIGHTS = {  # makes a weight; what it gives of rows
  "embedding": (
    lambda: SplicedEmbedding(array(8, 6), array(3, 2, 6), IMAGE),
    lambda w, tokens: w.take(tokens),
  ),
  "injected": (
    lambda: InjectedFeatures(array(3, 2, 1, 6), IMAGE),
    lambda w, tokens: w.take(tokens),
  ),
  "grids": (
    lambda: ImagePositions(jnp.array([[[1, 2]], [[2, 1]], [[1, 2]]]), IMAGE),
    lambda w, tokens: w.with_tokens(tokens, None).of_row(4),
  ),
  "positions": (
    lambda: ImagePositions(
      jnp.array([[[1, 2]], [[2, 1]], [[1, 2]]]), IMAGE
    ).with_tokens(TOKENS, None),
    lambda w, tokens: w.of_slots(jnp.full(tokens.shape, 5)),
  ),
  "media": (
    media,
    lambda w, tokens: tuple(
      jnp.moveaxis(x, 1, 0) for x in (w.keys, w.values, w.sizes, w.bounds)
    ),
  ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_chosen_rows_have_what_is_theirs(name):
  make, values_of = WEIGHTS[name]
  weight = make()
  assert weight.per_row
  chosen = weights.take_rows({"x": weight}, ROWS)["x"]
  every = values_of(weight, TOKENS)
  want = tuple(x[ROWS] for x in every) if name == "media" else every[ROWS]
  chex.assert_trees_all_equal(values_of(chosen, TOKENS[ROWS]), want)
