"""Models for larger images: their positions on another grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.typing import UserError
from research.vlm import resolution
from research.vlm.presets import PRESETS
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


def test_an_encoder_without_a_table_is_refused():
  model = PRESETS["llava-onevision-1.5-4b"].model()
  with pytest.raises(UserError, match="without a table of positions"):
    resolution.at_resolution(model, {}, 28)
