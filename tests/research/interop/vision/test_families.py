"""Vision models out of Hugging Face's files, as transformers computes them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.interop import load_model, vision
from research.interop.vision import config_write, read
from research.interop.vision import write as written
from research.io import safetensors
from research.typing import UserError
from research.vlm import encoders
from research.vlm.encoders import EncoderSizes, vit
from research.vlm.encoders.vit import Features
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.prompts import PromptFormat
from research.vlm.images.tiling.square import Square
from tests.support_golden import (
  assert_close,
  config,
  golden,
  logits_with_images,
  patches,
  soft_tokens,
  tensors,
  write,
)

CONTRASTIVE = ("clip", "siglip")
GENERATIVE = (
  "llava",
  "llava_full",
  "smolvlm",
  "idefics3",
  "paligemma",
  "paligemma2",
  "gemma3",
  "internvl",
)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
  made = {}

  def one(name):
    if name not in made:
      folder = tmp_path_factory.mktemp(name)
      write(folder, name, tensors(name))
      model, params, _ = vision.model_from_directory(folder)
      made[name] = model, params, golden(name)
    return made[name]

  return one


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_hidden_states(name, opened):
  model, params, golden = opened(name)
  x, at, _ = patches(golden["pixels"], model.image.patch)
  every = Features(layers=(0, 1, 2, 3), normed=False, class_token=True)
  found = model.image.apply({"params": params["image"]}, x, at, None, every)
  expected = [golden[f"hidden_{i}"] for i in range(4)]
  assert_close(found, np.concatenate(expected, axis=-1))


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_vectors_and_their_products(name, opened):
  model, params, golden = opened(name)
  x, at, _ = patches(golden["pixels"], model.image.patch)
  images, texts, scale, bias = model.apply(
    {"params": params}, x, at, jnp.asarray(golden["tokens"])
  )
  assert_close(images, golden["image_embeds"])
  assert_close(texts, golden["text_embeds"])
  assert_close(scale * images @ texts.T + bias, golden["logits_per_image"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTRASTIVE)
def test_a_directory_s_encoder_starts_a_new_model(name, tmp_path, opened):
  fields = config(name)["vision_config"]
  sizes = EncoderSizes(
    width=fields["hidden_size"],
    depth=fields["num_hidden_layers"],
    heads=fields["num_attention_heads"],
    hidden=fields["intermediate_size"],
    patch=fields["patch_size"],
    grid=fields["image_size"] // fields["patch_size"],
  )
  encoder = {"clip": encoders.clip, "siglip": encoders.siglip}[name](sizes)
  write(tmp_path, name, tensors(name))
  loaded = load_model(tmp_path, towers="all")
  params = vision.encoder_params(encoder, loaded.model, loaded.params)
  assert params.keys() == vit.new_params(encoder, jax.random.key(0)).keys()
  golden = opened(name)[2]
  x, at, _ = patches(golden["pixels"], encoder.patch)
  last = Features(normed=False, class_token=True)
  found = encoder.apply({"params": params}, x, at, None, last)
  assert_close(found, golden["hidden_3"])


@pytest.mark.parametrize("name", GENERATIVE)
@pytest.mark.sample(2)
def test_soft_tokens(name, opened):
  model, params, golden = opened(name)
  found = soft_tokens(model, params, golden) / model.scale
  assert_close(found, golden["features"])


@pytest.mark.parametrize("name", GENERATIVE)
def test_logits_with_images_in_two_rows(name, opened):
  model, params, golden = opened(name)
  logits = logits_with_images(model, params, golden)
  assert_close(logits, golden["logits"])


def test_paligemma_2_has_no_windows():
  """Those of its files are Gemma 2's; big_vision's gemma.py has none.

  "This implementation does *not* currently support the local sliding attention
  pattern used in the v2 models": the published weights were trained by it, on
  up to 4,096 soft tokens and text. transformers 5.24 agrees about prompts
  (`test_logits_with_images_in_two_rows`), but cuts what answers see.
  """
  values = config("paligemma2")
  model = vision.vision_language_model(values, "config.json")
  kinds = model.language.layer_kinds()
  assert [kind.attention.window for kind in kinds] == [None] * len(kinds)
  family = vision.family_of("paligemma")
  text = config_write.config_of(model, family)["text_config"]
  assert text["layer_types"] == ["full_attention"] * len(kinds)


@pytest.mark.parametrize("name", GENERATIVE)
def test_written_tensors_are_those_that_were_read(name, opened):
  model, params, _ = opened(name)
  family = vision.family_of(config(name)["model_type"])
  found = vision.vision_language_tensors(model, family, params)
  # transformers 5 leaves the inner name out, which files of the Hub have.
  inner = "vision_tower.vision_model."
  renamed = name != "internvl"
  expected = {
    k.replace("vision_tower.", inner) if renamed and inner not in k else k: v
    for k, v in tensors(name).items()
  }
  assert set(found) == set(expected)
  for key, value in expected.items():
    np.testing.assert_array_equal(found[key], value, err_msg=key)


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda t: t.pop("vision_tower.pre_layrnorm.bias"), "missing"),
    (lambda t: t.update(extra=np.zeros(3, np.float32)), "superfluous: extra"),
    (
      lambda t: t.update(
        {"multi_modal_projector.linear_1.bias": np.zeros(3, np.float32)}
      ),
      "expected .40. by config.json",
    ),
  ],
)
def test_a_file_of_another_model_is_refused(change, message, tmp_path):
  of_llava = tensors("llava")
  change(of_llava)
  write(tmp_path, "llava", of_llava)
  with pytest.raises(UserError, match=message):
    vision.model_from_directory(tmp_path)


@pytest.mark.parametrize(
  "name, form",
  [
    ("llava", PromptFormat()),
    ("paligemma", PromptFormat(begin="after_images", end="\n")),
  ],
)
def test_prompts_are_those_of_the_family(name, form, tmp_path):
  """PaliGemmaProcessor: `<image>` for each, `<bos>`, the text, a newline."""
  write(tmp_path, name, tensors(name))
  patch = config(name)["vision_config"]["patch_size"]
  how = Preprocessor(Square(4 * patch, patch=patch))
  described = written.preprocessor_config(how)
  safetensors.write_json(tmp_path / read.PREPROCESSOR, described)
  found = load_model(tmp_path, towers="all").preprocessor
  assert found == dataclasses.replace(how, prompt=form)


@pytest.mark.parametrize(
  "name, tensor",
  [
    ("siglip", "vision_model.head.attention.in_proj_bias"),  # three in one
    ("siglip", "vision_model.head.probe"),
    ("siglip", "logit_scale"),
    ("internvl", "vision_tower.embeddings.position_embeddings"),
  ],
)
def test_more_values_than_a_layout_reads_are_refused(name, tensor, tmp_path):
  """They would be left out without a word."""
  found = tensors(name)
  found[tensor] = np.concatenate([found[tensor], found[tensor][:1]])
  write(tmp_path, name, found)
  short = ".".join(tensor.split(".")[-2:])
  with pytest.raises(UserError, match=f"{short}: found shape"):
    vision.model_from_directory(tmp_path)


def test_a_preprocessor_of_other_soft_tokens_is_refused(tmp_path):
  """LLaVA-NeXT's views of one image are no LLaVA's: 30 soft tokens are 27."""
  write(tmp_path, "llava", tensors("llava"))
  size = config("llava")["vision_config"]["image_size"]
  described = dict(
    image_processor_type="LlavaNextImageProcessor",
    size={"shortest_edge": size},
    crop_size=size,
    image_grid_pinpoints=[[size, 2 * size]],
  )
  safetensors.write_json(tmp_path / read.PREPROCESSOR, described)
  with pytest.raises(UserError, match=r"r_config\.json: .* of 3 views .AnyRes"):
    load_model(tmp_path, towers="all")


def test_llava_of_an_encoder_without_class_token_keeps_every_patch():
  """transformers' "default" leaves the first patch of SigLIP out."""
  values = config("llava") | dict(
    vision_config=config("smolvlm")["vision_config"]
  )
  values["vision_config"] |= dict(model_type="siglip_vision_model")
  with pytest.raises(UserError, match="strategy is 'default', expected full"):
    vision.vision_language_model(values, "config.json")
  values["vision_feature_select_strategy"] = "full"
  model = vision.vision_language_model(values, "config.json")
  assert model.tokens_per_view(32, 32) == 16


@pytest.mark.parametrize(
  "name, field", [("gemma3", "image_token"), ("molmo2", "tokens")]
)
def test_masks_know_the_placeholder_by_either_of_its_names(name, field):
  values = config(name)
  values.pop(vision.family_of(name).image_token)
  found = vision.vision_language_model(
    values | {"image_token_id": 7}, "config.json"
  )
  assert found.image_token == 7
  assert np.atleast_1d(getattr(found.mask, field))[0] == 7


def test_an_unknown_family_is_refused_by_name(tmp_path):
  write(tmp_path, "llava", {}, {"model_type": "blip"})
  with pytest.raises(UserError, match="model_type is 'blip', expected one of"):
    vision.model_from_directory(tmp_path)


def test_towers_may_be_named_as_in_memory(tmp_path, opened):
  """transformers 4.52 to 5 call the inner modules otherwise."""
  renamed = {
    k.replace("vision_tower.", "model.vision_tower.vision_model.")
    .replace("multi_modal_projector.", "model.multi_modal_projector.")
    .replace("language_model.model.", "model.language_model.")
    .replace("language_model.lm_head.", "lm_head."): v
    for k, v in tensors("llava").items()
  }
  write(tmp_path, "llava", renamed)
  _, params, _ = vision.model_from_directory(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, params, opened("llava")[1])
