"""Molmo 2, as transformers computes it: tiles, groups of patches, two rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import training
from research.data import batch_of
from research.generation import generate
from research.interop import load, vision
from research.interop.loaded import Loaded
from research.nn import logits
from research.typing import UserError
from research.vlm import WithImages, connectors, data
from research.vlm.encoders import GroupedViews
from research.vlm.images.configs import from_preprocessor_config
from research.vlm.images.presets import MOLMO2_PROMPT
from tests import support_golden, support_qwen, support_vlm
from tests.support_golden import assert_close

NAME = "molmo2"
HOW = dataclasses.replace(
  from_preprocessor_config(
    dict(
      image_processor_type="Molmo2ImageProcessor",
      size={"height": 20, "width": 20},
      max_crops=4,
      overlap_margins=[1, 1],
      patch_size=4,
      pooling_size=[2, 2],
    )
  ),
  prompt=MOLMO2_PROMPT,
)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
  folder = tmp_path_factory.mktemp(NAME)
  support_golden.write(folder, NAME)
  model, params, _ = vision.model_from_directory(folder)
  return model, params


@functools.cache
def prompts():
  golden = support_golden.golden(NAME)
  return [
    data.Prompt.from_images([golden[f"image_{i}"] for i in own], HOW, 10)
    for own in support_qwen.IMAGES_OF
  ]


def rows():
  """Returns the prompts, as lists of ids."""
  golden = support_golden.golden(NAME)
  pairs = zip(golden["tokens"], golden["lengths"], strict=True)
  return [row[:n].tolist() for row, n in pairs]


@pytest.fixture(scope="module")
def language(opened):
  """Returns parameters of the language model, which see both rows' images."""
  model, params = opened
  return model.with_images_compiled(params, data.batch_images(prompts()))


def test_groups_are_those_of_the_published_processor():
  golden = support_golden.golden(NAME)
  first, second = (prompt.pixels.groups for prompt in prompts())
  size = len(first)
  np.testing.assert_array_equal(first, golden["groups"][:size])
  # The published ones number the patches of a whole batch.
  start = golden["groups"][:size].max() + 1
  expected = golden["groups"][size:]
  expected = np.where(expected < 0, -1, expected - start)
  np.testing.assert_array_equal(second, expected)
  assert (first < 0).any()


def test_soft_tokens_of_images_of_all_shapes(language):
  golden, soft = support_golden.golden(NAME), language["embed"].features
  sizes = [prompt.soft_tokens for prompt in prompts()]
  assert sum(sizes) == len(golden["features"])
  # Features are not normalised; transformers in fp32 is 6e-6 away from itself.
  assert_close(soft[0, : sizes[0]], golden["features"][: sizes[0]], 2e-5)
  assert_close(soft[1, : sizes[1]], golden["features"][sizes[0] :], 2e-5)


@pytest.mark.slow
def test_logits_of_two_rows_of_different_images(opened, language):
  golden, (model, _) = support_golden.golden(NAME), opened
  tokens = golden["tokens"].astype(np.int32)
  mask = model.mask(jnp.asarray(tokens), jnp.asarray(golden["lengths"]))
  found = logits(model.language, language, tokens, None, mask)
  for i, n in enumerate(golden["lengths"]):
    assert_close(found[i, :n], golden["logits"][i, :n])


@pytest.mark.slow
def test_generation_through_a_cache(opened, language):
  """One batch of unequal prompts; transformers generated each row alone."""
  golden, (model, _) = support_golden.golden(NAME), opened
  most, source = golden["generated"].shape[1], model.token_source()
  found = generate.generate(
    model.language, language, rows(), most, source=source
  )
  assert found.tokens == golden["generated"].tolist()


@pytest.mark.slow
def test_written_as_it_was_read(opened, tmp_path):
  model, params = opened
  tokenizer = support_vlm.tokenizer()
  loaded = Loaded(model, params, tokenizer, source={}, preprocessor=HOW)
  vision.write_model(tmp_path / "model", loaded, params)
  again = load.load_model(tmp_path / "model", towers="all")
  assert again.model == model
  assert again.preprocessor == HOW
  jax.tree.map(np.testing.assert_array_equal, again.params, params)
  family = vision.family_of(NAME)
  written = vision.vision_language_tensors(model, family, params)
  expected = support_golden.tensors(NAME)
  assert set(written) == set(expected)
  # transformers cuts the two tables in halves, released files by their use.
  tables = [
    f"model.transformer.wte.{x}" for x in ("embedding", "new_embedding")
  ]
  assert [len(written[name]) for name in tables] == [64, 8]
  np.testing.assert_array_equal(
    *(np.concatenate([x.pop(k) for k in tables]) for x in (written, expected))
  )
  for key, value in expected.items():
    np.testing.assert_array_equal(written[key], value, err_msg=key)


def test_released_configurations_spell_some_fields_otherwise(opened):
  config = support_golden.config(NAME)
  released = config.pop("vision_config")
  for new, old in (
    ("image_size", "image_default_input_size"),
    ("patch_size", "image_patch_size"),
  ):
    released[old] = released.pop(new)
  # They say more layers than they have.
  config["vit_config"] = released | dict(num_hidden_layers=5)
  adapter = config["adapter_config"]
  # Layers 2 and 0 of three, from the end of what they say.
  assert adapter.pop("vision_feature_layer") == [2, 0]
  adapter["vit_layers"] = [-3, -5]
  text = config["text_config"]
  text["layer_norm_eps"] = text.pop("rms_norm_eps")
  text |= dict(use_qk_norm=True, qkv_bias=False)
  assert vision.vision_language_model(config, "config.json") == opened[0]


@pytest.mark.slow
def test_rows_of_a_batch_have_groups(opened):
  """The loss is that of transformers' logits."""
  model, params = opened
  golden, ids = support_golden.golden(NAME), rows()
  width = max(map(len, ids))
  learned = np.zeros((2, width), bool)
  for i, row in enumerate(ids):
    learned[i, len(row) - 2 : len(row)] = True
  images = data.batch_images(prompts())
  assert isinstance(images, GroupedViews)
  batch = batch_of(ids, learned)
  batch |= {"pixels": images.pixels, "groups": images.groups}
  objective = WithImages(model, training.NextToken())
  total, weight, _ = jax.jit(objective)(params, batch, None)
  scores = jax.nn.log_softmax(golden["logits"])
  targets = np.minimum(batch["targets"], golden["logits"].shape[-1] - 1)
  own = np.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(total, -np.sum(own * batch["weights"]), rtol=1e-5)
  assert weight == 4


def test_connectors_of_single_views_are_refused(opened):
  model, _ = opened
  other = connectors.SquareAttention(size=32, hidden=8)
  found = support_vlm.model()
  found = type(found)(
    vision=model.vision,
    connector=other,
    language=found.language,
    image_token=1,
  )
  with pytest.raises(UserError, match="SquareAttention, which reads each view"):
    found.encode({}, data.batch_images(prompts()))


@pytest.mark.slow
def test_a_view_alone_is_pooled_at_its_odd_edges(opened):
  """Nine soft tokens of 5 x 5 patches: the first ones of each image."""
  model, params = opened
  golden = support_golden.golden(NAME)
  view = prompts()[1].pixels.pixels[:1][None]
  assert model.tokens_per_view(20, 20) == 9
  soft = jax.jit(model.encode)(params, jnp.asarray(view))
  start = prompts()[0].soft_tokens
  assert_close(soft[0], golden["features"][start : start + 9])


@pytest.mark.parametrize(
  "path, value, message",
  [
    ("text_config.qk_norm_type", "olmo", "is 'olmo', expected qwen3"),
    ("text_config.norm_after", True, "norm_after is True"),
    ("text_config.rope_scaling_layers", [0], "rope_scaling_layers is"),
    ("adapter_config.mlp_bias", True, "mlp_bias is True"),
    # transformers makes such a model, and cannot multiply its features.
    ("adapter_config.hidden_size", 48, "hidden_size is 48, expected 24"),
    ("adapter_config.text_hidden_size", 40, "expected 32, the language"),
    ("adapter_config.vision_feature_layer", [3], "layers of 3"),
    ("adapter_config.num_key_value_heads", 2, "expected a divisor of 3"),
    ("vision_config.image_size", [20, 24], "a square, as two numbers"),
  ],
)
def test_what_no_model_here_has_is_refused_by_name(path, value, message):
  values = support_golden.config(NAME)
  outer, last = path.split(".")
  values[outer][last] = value
  with pytest.raises(UserError, match=message):
    vision.vision_language_model(values, "config.json")
