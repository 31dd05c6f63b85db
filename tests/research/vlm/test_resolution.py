"""Positions on another grid, as scipy interpolates them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from research.typing import UserError
from research.vlm import resolution
from research.vlm.presets import PRESETS
from tests import support_vlm


@pytest.mark.parametrize(
  ("before", "after"), [((4, 4), (8, 8)), ((4, 3), (7, 9)), ((5, 5), (2, 2))]
)
def test_tables_are_those_of_big_vision(before, after):
  """Its `resample_posemb` is scipy's zoom of order 1."""
  rng = np.random.default_rng(0)
  table = rng.normal(size=(before[0] * before[1], 6)).astype(np.float32)
  zoom = (after[0] / before[0], after[1] / before[1], 1)
  want = ndimage.zoom(table.reshape(*before, 6), zoom, order=1)
  got = resolution.resize_table(jnp.asarray(table), before, after)
  np.testing.assert_allclose(got, want.reshape(-1, 6), rtol=1e-5, atol=1e-6)


def test_a_class_token_keeps_its_vector():
  table = jnp.asarray([[9.0], [0.0], [1.0], [2.0], [3.0]])
  got = resolution.resize_table(table, (2, 2), (3, 3), class_token=True)
  want = [9, 0, 0.5, 1, 1, 1.5, 2, 2, 2.5, 3]
  np.testing.assert_allclose(got[:, 0], want)
  with pytest.raises(UserError, match="found 4 positions, expected 3 x 3"):
    resolution.resize_table(table, (3, 3), (2, 2), class_token=True)


def test_a_model_reads_larger_images_as_it_reads_its_own():
  """At its own size nothing changes; twice as large it has four times as many
  soft tokens, and those of the corners have the positions of the corners."""
  model, params = support_vlm.model(), support_vlm.params()
  same, kept = resolution.at_resolution(model, params, 16)
  own = params["vision"]["positions"]["table"]
  np.testing.assert_allclose(
    kept["vision"]["positions"]["table"], own, rtol=1e-6, atol=1e-7
  )
  assert same.tokens_per_view(16, 16) == model.tokens_per_view(16, 16)
  larger, more = resolution.at_resolution(model, params, 32)
  table = more["vision"]["positions"]["table"]
  corners = [0, 7, 56, 63]
  np.testing.assert_allclose(
    table[jnp.asarray(corners)], own[jnp.asarray([0, 3, 12, 15])], rtol=1e-6
  )
  pixels = jax.ShapeDtypeStruct((1, 1, 32, 32, 3), jnp.uint8)
  assert jax.eval_shape(larger.encode, more, pixels).shape == (1, 16, 32)


def test_an_encoder_without_a_table_is_refused():
  model = PRESETS["llava-onevision-1.5-4b"].model()
  with pytest.raises(UserError, match="without a table of positions"):
    resolution.at_resolution(model, {}, 28)
