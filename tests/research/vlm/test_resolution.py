"""Models for larger images: their positions on another grid."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.typing import UserError
from research.vlm import resolution
from research.vlm.encoders.positions import (
  AntialiasedTable,
  FactoredTable,
  InterpolatedTable,
)
from tests import support_vlm


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


@pytest.mark.parametrize(
  "positions",
  [
    None,
    InterpolatedTable(4, 4),
    AntialiasedTable(4, 4),
    FactoredTable(4),
  ],
)
def test_an_encoder_that_takes_any_size_is_refused(positions):
  model = support_vlm.model()
  vision = model.vision.clone(positions=positions)
  model = dataclasses.replace(model, vision=vision)
  with pytest.raises(UserError, match="without a table of positions"):
    resolution.at_resolution(model, support_vlm.params(), 32)
