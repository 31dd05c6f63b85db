"""SigLIP 2 with NaFlex, as transformers computes it: images of five shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.interop import load, vision
from research.interop.loaded import Loaded
from research.typing import UserError
from research.vlm import connectors, contrastive, data
from research.vlm.encoders import native, vit
from research.vlm.encoders.positions import AntialiasedTable
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.tiling.naflex import NaFlex
from tests import support_golden, support_vlm

NAME = "siglip2"
HOW = Preprocessor(NaFlex(budget=24, patch=4))


def prompts():
  golden = support_golden.golden(NAME)
  pictures = [golden[f"image_{i}"] for i in range(len(golden["grids"]))]
  return [data.Prompt.from_images([x], HOW, 1, 24) for x in pictures]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
  folder = tmp_path_factory.mktemp(NAME)
  support_golden.write(folder, NAME)
  model, params, _ = vision.model_from_directory(folder)
  return model, params


@pytest.fixture(scope="module")
def inputs(opened):
  """Returns the patches of all images, in places for 24, and where they are."""
  images = data.batch_images(prompts())
  return native.encoder_inputs(images, HOW.normalise, opened[0].image)


@pytest.mark.slow
def test_hidden_states_of_images_of_all_shapes(opened, inputs):
  model, params = opened
  golden, (patches, at) = support_golden.golden(NAME), inputs
  found = jax.jit(model.image.apply)({"params": params["image"]}, patches, at)
  used = np.asarray(at[..., 0] >= 0)
  np.testing.assert_array_equal(used.sum(-1), golden["grids"].prod(-1))
  support_golden.assert_close(np.asarray(found)[used], golden["hidden"])


@pytest.mark.slow
def test_vectors_and_their_products(opened, inputs):
  model, params = opened
  golden = support_golden.golden(NAME)
  images, texts, scale, bias = jax.jit(model.apply)(
    {"params": params}, *inputs, jnp.asarray(golden["tokens"])
  )
  support_golden.assert_close(images, golden["image_embeds"])
  support_golden.assert_close(texts, golden["text_embeds"])
  products = scale * images @ texts.T + bias
  support_golden.assert_close(products, golden["logits_per_image"])


def test_written_as_it_was_read(opened, tmp_path):
  model, params = opened
  tokenizer = support_vlm.tokenizer()
  loaded = Loaded(model, params, tokenizer, source={}, preprocessor=HOW)
  vision.write_model(tmp_path / "model", loaded, params)
  again = load.load_model(tmp_path / "model", towers="all")
  assert again.model == model and again.source["model_type"] == NAME
  assert again.preprocessor == HOW
  jax.tree.map(np.testing.assert_array_equal, again.params, params)
  written = vision.contrastive_tensors(NAME, params)
  expected = support_golden.tensors(NAME)
  assert set(written) == set(expected)
  for key, value in expected.items():
    np.testing.assert_array_equal(written[key], value, err_msg=key)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_towers_of_one_size_are_written_as_well(name, tmp_path):
  support_golden.write(tmp_path, name)
  model, params, _ = vision.model_from_directory(tmp_path)
  config = vision.contrastive_config(model)
  assert vision.dual_encoder(config, "config.json") == model
  written = vision.contrastive_tensors(config["model_type"], params)
  expected = support_golden.tensors(name)
  assert set(written) == set(expected)
  for key, value in expected.items():
    np.testing.assert_array_equal(written[key], value, err_msg=key)


def test_a_grid_that_is_no_square_is_refused():
  config = support_golden.config(NAME)
  config["vision_config"]["num_patches"] = 10
  with pytest.raises(UserError, match="num_patches is 10, expected the cells"):
    vision.dual_encoder(config, "config.json")


@pytest.mark.slow
def test_the_loss_reads_images_of_native_resolution(opened):
  """It is the sigmoid loss of transformers' products."""
  model, params = opened
  golden = support_golden.golden(NAME)
  images = data.batch_images(prompts()[:4])
  batch = dict(
    patches=images.pixels,
    grids=images.grids,
    captions=jnp.asarray(golden["tokens"]),
    ids=jnp.arange(4),
  )
  objective = contrastive.Contrastive(model)
  total, weight, _ = jax.jit(objective)(params, batch, None)
  signs = 2 * np.eye(4) - 1
  products = signs * golden["logits_per_image"][:4]
  expected = np.log1p(np.exp(-products)).sum() / 4
  np.testing.assert_allclose(total / weight, expected, rtol=1e-5)


@pytest.mark.slow
def test_the_encoder_serves_a_vision_language_model(opened):
  """Soft tokens are the features of the image alone, times a matrix."""
  encoder, params = opened[0].image, opened[1]["image"]
  encoder = encoder.clone(pooling=None)
  model = dataclasses.replace(
    support_vlm.model(), vision=encoder, connector=connectors.Linear(size=32)
  )
  rng = np.random.default_rng(0)
  shapes = dict(project=(24, 32), project_bias=(32,))
  connector = {
    k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()
  }
  encoder_params = {k: v for k, v in params.items() if k != "pooling"}
  towers = dict(vision=encoder_params, connector=connector)
  soft = jax.jit(model.encode)(towers, data.batch_images(prompts()))
  golden, start = support_golden.golden(NAME), 0
  matrix, bias = (towers["connector"][k] for k in ("project", "project_bias"))
  for row, grid in zip(soft, golden["grids"], strict=True):
    hidden = golden["hidden"][start : start + grid.prod()]
    expected = hidden @ np.asarray(matrix) + np.asarray(bias)
    support_golden.assert_close(row[: grid.prod()], expected)
    start += grid.prod()


@pytest.mark.slow
def test_positions_are_those_of_jax_image():
  """big_vision resizes with `scale_and_translate`; both up and down."""
  tower = AntialiasedTable(3, 3)
  table = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
  for grid in ((2, 7), (9, 1)):
    at = vit.grid_coordinates(*grid)
    found = jax.jit(tower.apply, static_argnums=(2, 3))(
      {"params": {"table": table}}, at, 5, False
    )
    expected = jax.image.resize(
      table.reshape(3, 3, 5), (*grid, 5), "bilinear", antialias=True
    )
    np.testing.assert_allclose(found[0], expected.reshape(-1, 5), atol=1e-6)
