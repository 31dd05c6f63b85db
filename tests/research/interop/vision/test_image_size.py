"""A model for images of another size: its positions, connector and views."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.interop import load, vision
from research.interop.loaded import Loaded
from research.interop.vision import ImageSize, config_write
from research.typing import UserError
from research.vlm.encoders import corner_aligned, resized_positions
from research.vlm.images.tiling.anyres import AnyRes
from research.vlm.images.tiling.centre_crop import CentreCrop
from tests import support, support_vlm

GOLDEN = pathlib.Path(__file__).parents[3] / "golden" / "vlm"
MODEL, PARAMS = support_vlm.model(), support_vlm.params()


def loaded(model=MODEL, params=PARAMS, preprocessor=support_vlm.PREPROCESSOR):
  source = dict(path="model", config=config_write.describe(model))
  return Loaded(model, params, None, source, preprocessor=preprocessor)


def test_a_directory_is_read_for_larger_images(tmp_path, capsys):
  vision.write_model(tmp_path / "model", loaded(), PARAMS)
  size = ImageSize(pixels=24, interpolation=corner_aligned)
  found = load.load_model(tmp_path / "model", towers="all", image_size=size)
  assert "4 x 4 patches are resized to 6 x 6" in capsys.readouterr().err
  assert found.preprocessor.tiling.tile == 24
  pixels = jnp.zeros((1, 1, 24, 24, 3), jnp.uint8)
  # Six by six patches, in squares of two by two.
  assert found.preprocessor.plan(50, 60).soft_tokens == 9
  soft = jax.eval_shape(found.model.encode, found.params, pixels)
  assert soft.shape == (1, 9, 32)
  before = PARAMS["vision"]["positions"]["table"]
  expected = resized_positions(before, (4, 4), (6, 6))
  table = found.params["vision"]["positions"].pop("table")
  np.testing.assert_array_equal(table, expected)
  # All else is as it was.
  rest = jax.tree.map(lambda x: x, PARAMS)
  del rest["vision"]["positions"]["table"]
  jax.tree.map(np.testing.assert_array_equal, found.params, rest)
  assert config_write.describe(found.model)["vision_config"]["image_size"] == 24


def test_gemma_3_pools_larger_squares_for_as_many_tokens():
  config = json.loads((GOLDEN / "gemma3" / "config.json").read_text())
  model = vision.vision_language_model(config, "config.json")
  params = jax.eval_shape(model.init, jax.random.key(0))
  params["vision"]["positions"]["table"] = jnp.zeros((16, 24))
  found = ImageSize(pixels=64)(loaded(model, params, None))
  assert (model.connector.side, found.model.connector.side) == (2, 4)
  assert found.model.tokens_per_view(64, 64) == model.tokens_per_view(32, 32)
  assert found.params["vision"]["positions"]["table"].shape == (64, 24)


def test_a_crop_is_of_the_image_as_large_as_before():
  crop = CentreCrop(shortest=20, tile=16, patch=4, pool=2)
  own = dataclasses.replace(support_vlm.PREPROCESSOR, tiling=crop)
  found = ImageSize(pixels=32)(loaded(preprocessor=own))
  assert (
    found.preprocessor.tiling.shortest,
    found.preprocessor.tiling.tile,
  ) == (
    40,
    32,
  )


def test_what_has_no_other_size_says_so():
  with pytest.raises(UserError, match="found 18, expected a multiple of .* 4"):
    ImageSize(pixels=18)(loaded())
  text = dataclasses.replace(loaded(), model=support.model("llama"))
  with pytest.raises(UserError, match="found a Transformer, expected a vision"):
    ImageSize(pixels=24)(text)
  free = dataclasses.replace(MODEL, vision=MODEL.vision.clone(positions=None))
  with pytest.raises(UserError, match="without a table of learned positions"):
    ImageSize(pixels=24)(dataclasses.replace(loaded(), model=free))
  tiles = dataclasses.replace(support_vlm.PREPROCESSOR, tiling=AnyRes())
  with pytest.raises(UserError, match="images cut by AnyRes"):
    ImageSize(pixels=24)(loaded(preprocessor=tiles))
