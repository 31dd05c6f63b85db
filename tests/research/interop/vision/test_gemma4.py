"""Gemma 4, as transformers computes it: shaped as E2B and as 31B."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import training, tree
from research.data import batch_of
from research.generation import generate, generate_paged
from research.interop import load, vision
from research.interop.loaded import Loaded
from research.nn import logits
from research.typing import UserError
from research.vlm import WithImages, data
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.presets import GEMMA4
from research.vlm.images.tiling.budget import Budget
from research.vlm.images.tiling.native import Native
from tests import support_golden, support_qwen, support_vlm
from tests.support_golden import assert_close

NAMES = ("gemma4_e2b", "gemma4_31b")
IMAGE = 60


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
  @functools.cache
  def one(name):
    folder = tmp_path_factory.mktemp(name)
    support_golden.write(folder, name)
    model, params, _ = vision.model_from_directory(folder)
    return model, params

  return one


def images(model, name):
  """Returns the images of both rows, in their own sizes."""
  how = Preprocessor(Native(patch=4, merge=3, min_pixels=1), model.normalise)
  golden = support_golden.golden(name)
  prompts = [
    data.Prompt.from_images([golden[f"image_{i}"] for i in own], how, 2)
    for own in support_qwen.IMAGES_OF
  ]
  return data.batch_images(prompts, model.square)


def rows(name):
  """Returns the prompts, as lists of ids."""
  golden = support_golden.golden(name)
  pairs = zip(golden["tokens"], golden["lengths"], strict=True)
  return [row[:n].tolist() for row, n in pairs]


@pytest.fixture(scope="module")
def language(opened):
  """Returns the language model and parameters that see the goldens' images."""

  @functools.cache
  def one(name):
    model, params = opened(name)
    return model, model.with_images_compiled(params, images(model, name))

  return one


@pytest.mark.parametrize("name", NAMES)
def test_soft_tokens_of_images_of_all_shapes(name, language):
  golden, (model, params) = support_golden.golden(name), language(name)
  counts = golden["grids"].prod(-1) // 9
  first, second = params["embed"].features / model.scale
  size = counts[:2].sum()
  assert_close(first[:size], golden["features"][:size])
  assert_close(second[: counts[2]], golden["features"][size:])


@pytest.mark.parametrize(
  "name", [pytest.param(NAMES[0], marks=pytest.mark.slow), NAMES[1]]
)
def test_logits_of_two_rows_of_different_images(name, language):
  golden, (model, params) = support_golden.golden(name), language(name)
  tokens = golden["tokens"].astype(np.int32)
  mask = model.mask(jnp.asarray(tokens), jnp.asarray(golden["lengths"]))
  found = logits(model.language, params, tokens, None, mask)
  for i, n in enumerate(golden["lengths"]):
    # Its attention does not divide by sqrt(H), and so what fp32 rounds grows:
    # transformers in fp32 is 1.2e-4 away from itself in fp64 (E2B), and 3e-6.
    tolerance = 3e-4 if name == NAMES[0] else 1e-5
    assert_close(found[i, :n], golden["logits"][i, :n], tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
  "name", [NAMES[0], pytest.param(NAMES[1], marks=pytest.mark.slow)]
)
def test_generation_through_a_cache(name, language):
  """One batch of unequal prompts; transformers generated each row alone."""
  golden, (model, params) = support_golden.golden(name), language(name)
  most = golden["generated"].shape[1]
  found = generate.generate(
    model.language, params, rows(name), most, source=model.token_source()
  )
  assert found.tokens == golden["generated"].tolist()


@pytest.mark.parametrize(
  "name", [NAMES[0], pytest.param(NAMES[1], marks=pytest.mark.slow)]
)
def test_written_as_it_was_read(name, opened, tmp_path):
  model, params = opened(name)
  how = Preprocessor(
    Budget(budget=70, patch=4, pool=3), model.normalise, GEMMA4, "<|image|>"
  )
  tokenizer = support_vlm.tokenizer()
  loaded = Loaded(model, params, tokenizer, source={}, preprocessor=how)
  vision.write_model(tmp_path / "model", loaded, params)
  again = load.load_model(tmp_path / "model", towers="all")
  assert again.model == model
  assert again.preprocessor == how
  jax.tree.map(np.testing.assert_array_equal, again.params, params)
  family = vision.family_of("gemma4")
  written = vision.vision_language_tensors(model, family, params)
  expected = support_golden.tensors(name)
  assert set(written) == set(expected)
  for key, value in expected.items():
    np.testing.assert_array_equal(written[key], value, err_msg=key)


@pytest.mark.slow
def test_files_of_the_hub_have_more(opened, tmp_path, capsys):
  """Keys of layers that borrow others', an audio tower, another spelling."""
  name = "gemma4_e2b"
  model, params = opened(name)
  config, arrays = support_golden.config(name), support_golden.tensors(name)
  text = config["text_config"]
  assert text.pop("per_layer_config")
  text["global_head_dim"] = 16
  config["audio_config"] = {"model_type": "gemma4_audio"}
  unread = np.zeros(3, np.float32)
  for x in ("k_proj", "v_proj", "k_norm"):
    arrays[f"model.language_model.layers.7.self_attn.{x}.weight"] = unread
  arrays["model.audio_tower.layers.0.weight"] = unread
  arrays["model.embed_audio.embedding_projection.weight"] = unread
  support_golden.write(tmp_path, name, arrays, config)
  published = dict(
    image_processor_type="Gemma4ImageProcessor",
    patch_size=4,
    max_soft_tokens=70,
  )
  whole = tmp_path / "processor_config.json"
  whole.write_text(json.dumps(dict(image_processor=published)))
  again = load.load_model(tmp_path, towers="all")
  assert again.model == model
  assert again.preprocessor.tiling == Budget(budget=70, patch=4)
  jax.tree.map(np.testing.assert_array_equal, again.params, params)
  assert "audio tower is left out" in capsys.readouterr().err


@pytest.mark.slow
def test_loss_and_gradients_with_layers_recomputed(opened):
  """The loss is that of transformers' logits; all towers learn."""
  name = "gemma4_e2b"
  model, params = opened(name)
  model = model.clone(remat="layer")
  golden, prompts = support_golden.golden(name), rows(name)
  width = max(map(len, prompts))
  learned = np.zeros((2, width), bool)
  for i, row in enumerate(prompts):
    learned[i, 3 : len(row)] = np.array(row[3:]) < IMAGE
  found = images(model, name)
  batch = batch_of(prompts, learned)
  batch |= {"patches": found.pixels, "grids": found.grids}

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def sums(params):
    objective = WithImages(model, training.NextToken())
    total, weight, _ = objective(params, batch, None)
    return total, weight

  (total, _), grads = sums(params)
  scores = jax.nn.log_softmax(golden["logits"])
  own = np.take_along_axis(scores, batch["targets"][..., None], axis=-1)
  expected = -np.sum(own[..., 0] * batch["weights"])
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  for path, gradient in tree.flatten_paths(grads):
    assert np.isfinite(gradient).all(), path
    bound = path.endswith(("_min", "_max"))
    assert bound or np.abs(gradient).max() > 0, path


@pytest.mark.slow
def test_pages_are_refused_by_name(opened):
  model, params = opened("gemma4_e2b")
  with pytest.raises(UserError, match="lend their keys and values"):
    chunks = generate_paged.chunks(
      model.language, params["language"], [[5, 6, 7]], 2
    )
    next(iter(chunks))


@pytest.mark.parametrize(
  "path, value, message",
  [
    ("text_config.enable_moe_block", True, "26B-A4B"),
    ("text_config.use_bidirectional_attention", "all", "is 'all', expected"),
    ("text_config.attention_bias", True, "attention_bias is True"),
    ("text_config.num_kv_shared_layers", 7, "a layer of each kind before"),
    ("text_config.layer_types", ["x"] * 8, "8 times one of full_attention"),
    (
      "text_config.rope_parameters.full_attention.rope_type",
      "yarn",
      "expected 'proportional'",
    ),
    (
      "text_config.per_layer_config",
      {"0": {"head_dim": 16}},
      "the same of each global layer",
    ),
    ("vision_config.head_dim", 6, "a multiple of 4"),
  ],
)
def test_what_no_model_here_has_is_refused_by_name(path, value, message):
  values = support_golden.config("gemma4_e2b")
  *outer, last = path.split(".")
  functools.reduce(dict.__getitem__, outer, values)[last] = value
  with pytest.raises(UserError, match=message):
    vision.vision_language_model(values, "config.json")
