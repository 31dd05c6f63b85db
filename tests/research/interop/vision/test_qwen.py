"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL, as transformers computes them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import training, tree
from research.data import batch_of
from research.generation import generate, generate_paged
from research.generation.paging import Paging
from research.interop import load, vision
from research.interop.loaded import Loaded
from research.nn import logits
from research.typing import UserError
from research.vlm import WithImages
from research.vlm.images import configs
from tests import support_golden, support_qwen, support_vlm

NAMES, IMAGE = support_qwen.NAMES, support_qwen.IMAGE


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
  @functools.cache
  def one(name):
    return support_qwen.opened(name, tmp_path_factory.mktemp(name))

  return one


@pytest.fixture(scope="module")
def language(opened):
  """Returns the language model and parameters that see the goldens' images."""

  @functools.cache
  def one(name):
    model, params = opened(name)
    images = support_qwen.images(model, name)
    return model.language, model.with_images_compiled(params, images)

  return one


def assert_close(found, expected):
  """Products of fp32, a few layers of them: 1e-5 of the largest value."""
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_soft_tokens_of_images_of_all_shapes(name, language):
  golden, (_, params) = support_golden.golden(name), language(name)
  counts = golden["grids"].prod(-1) // 4
  first, second = params["embed"].features
  size = counts[:2].sum()
  expected = golden["features"]
  assert_close(first[:size], expected[:size])
  assert_close(second[: counts[2]], expected[size:])
  if name == "qwen3_vl":
    first, second = params["injected"].features
    assert_close(first[:size], golden["deeper"][:size])
    assert_close(second[: counts[2]], golden["deeper"][size:])
  else:
    assert "injected" not in params


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_two_rows_of_different_images(name, language):
  golden, (model, params) = support_golden.golden(name), language(name)
  found = logits(model, params, golden["tokens"])
  for i, n in enumerate(golden["lengths"]):
    assert_close(found[i, :n], golden["logits"][i, :n])


@pytest.mark.parametrize("name", NAMES)
def test_generation_through_a_cache(name, language):
  """One batch of unequal prompts; transformers generated each row alone."""
  golden, (model, params) = support_golden.golden(name), language(name)
  most = golden["generated"].shape[1]
  prompts = support_qwen.rows(name)
  found = generate.generate(model, params, prompts, most)
  assert found.tokens == golden["generated"].tolist()
  paged = functools.partial(generate_paged.chunks, layout=Paging(rows=1))
  assert generate.generate(model, params, prompts, most, source=paged) == found


@pytest.mark.parametrize("name", NAMES)
def test_written_as_it_was_read(name, opened, tmp_path):
  model, params = opened(name)
  how = support_qwen.preprocessor(model)
  loaded = Loaded(
    model, params, support_vlm.tokenizer(), source={}, preprocessor=how
  )
  vision.write_model(tmp_path / "model", loaded, params)
  again = load.load_model(tmp_path / "model", towers="all")
  assert again.model == model
  assert again.preprocessor == how
  jax.tree.map(np.testing.assert_array_equal, again.params, params)
  # Files of the Hub have these names, and transformers' weights.
  written = vision.vision_language_tensors(
    model, vision.family_of(name), params
  )
  expected = support_golden.tensors(name)
  if name == "qwen3_vl":
    assert "model.visual.deepstack_merger_list.1.norm.weight" in written
  else:
    assert "visual.merger.ln_q.weight" in written
    assert "model.layers.0.self_attn.q_proj.bias" in written
  plain = {in_memory(k): x for k, x in written.items()}
  assert set(plain) == {in_memory(k) for k in expected}
  for key, value in expected.items():
    np.testing.assert_array_equal(plain[in_memory(key)], value, err_msg=key)


def in_memory(name):
  """Returns a tensor's name in transformers since 4.52."""
  if name.startswith("visual."):
    return f"model.{name}"
  own = name.removeprefix("model.")
  if own != name and not own.startswith(("language_model.", "visual.")):
    return f"model.language_model.{own}"
  return name


def flat(name):
  """Returns config.json as the Hub's files of Qwen2-VL and 2.5-VL have it."""
  values = support_golden.config(name)
  text = values.pop("text_config")
  rotation = text.pop("rope_parameters")
  vision_config = values.pop("vision_config")
  vision_config.pop("model_type")
  return (
    text
    | values
    | dict(
      model_type=name,
      rope_theta=rotation["rope_theta"],
      rope_scaling=dict(type="mrope", mrope_section=rotation["mrope_section"]),
      vision_config=vision_config | dict(in_chans=3),
    )
  )


@pytest.mark.parametrize("name", NAMES[:2])
def test_files_of_the_hub_have_text_fields_outside(name, opened, tmp_path):
  model, params = opened(name)
  named = {
    in_memory(k)
    .replace("model.language_model.", "model.")
    .replace("model.visual.", "visual."): x
    for k, x in support_golden.tensors(name).items()
  }
  support_golden.write(tmp_path, name, named, flat(name))
  again, read, _ = vision.model_from_directory(tmp_path)
  assert again == model
  jax.tree.map(np.testing.assert_array_equal, read, params)


def changed(name, path, value):
  values = support_golden.config(name)
  *outer, last = path.split(".")
  inner = functools.reduce(dict.__getitem__, outer, values)
  inner[last] = value
  return values


@pytest.mark.parametrize(
  "name, path, value, message",
  [
    ("qwen2_vl", "vision_config.temporal_patch_size", 1, "expected 2"),
    ("qwen2_vl", "vision_config.hidden_size", 40, "expected 32, the language"),
    (
      "qwen2_vl",
      "text_config.rope_parameters.mrope_section",
      [4, 2, 3],
      "expected 8 in total",
    ),
    (
      "qwen2_vl",
      "text_config.rope_parameters.rope_type",
      "yarn",
      "rope_type is 'yarn', expected None or 'default'",
    ),
    ("qwen2_5_vl", "vision_config.window_size", 7, "at least 8 pixels"),
    (
      "qwen2_5_vl",
      "vision_config.fullatt_block_indexes",
      [3],
      "layers below 3, in order",
    ),
    (
      "qwen3_vl",
      "vision_config.deepstack_visual_indexes",
      [1, 0],
      "layers below 3, in order",
    ),
    (
      "qwen3_vl",
      "vision_config.deepstack_visual_indexes",
      [0, 1, 2],
      "1 to 2, fewer than the language model",
    ),
    (
      "qwen3_vl",
      "text_config.rope_parameters.mrope_interleaved",
      False,
      "mrope_interleaved is False",
    ),
    ("qwen2_vl", "model_type", "qwen3_5", "has layers of linear attention"),
    ("qwen2_vl", "model_type", "qwen3_vl_moe", "has experts"),
  ],
)
def test_what_no_model_here_has_is_refused_by_name(name, path, value, message):
  with pytest.raises(UserError, match=message):
    vision.vision_language_model(changed(name, path, value), "config.json")


def test_a_preprocessor_of_other_squares_is_refused(opened, tmp_path):
  support_golden.write(tmp_path, "qwen2_vl")
  published = dict(image_processor_type="Qwen2VLImageProcessor")
  path = tmp_path / "preprocessor_config.json"
  path.write_text(json.dumps(published))
  assert configs.from_preprocessor_config(path).tiling.patch == 14
  with pytest.raises(UserError, match=r"r_config.json: .*\(14, 2\) patches"):
    load.load_model(tmp_path, towers="all")


@pytest.mark.slow
def test_loss_and_gradients_of_rows_with_images(opened):
  """The loss is that of transformers' logits; all towers learn."""
  name = "qwen3_vl"
  model, params = opened(name)
  golden, rows = support_golden.golden(name), support_qwen.rows(name)
  learned = [[False] * 3 + [i != IMAGE for i in row[3:]] for row in rows]
  width = max(map(len, rows))
  mask = [row + [False] * (width - len(row)) for row in learned]
  images = support_qwen.images(model, name)
  batch = batch_of(rows, np.array(mask))
  batch |= {"patches": images.pixels, "grids": images.grids}
  loss = training.NextToken()

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def sums(params):
    total, weight, _ = WithImages(model, loss)(params, batch, None)
    return total, weight

  (total, weight), grads = sums(params)
  scores = jax.nn.log_softmax(jnp.asarray(golden["logits"]))
  own = jnp.take_along_axis(scores, batch["targets"][..., None], axis=-1)
  expected = -jnp.sum(own[..., 0] * batch["weights"])
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  assert weight == sum(map(sum, mask))
  for path, gradient in tree.flatten_paths(grads):
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, path
