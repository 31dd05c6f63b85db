"""Published numbers of parameters, of shapes alone: no weight is made."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from research import tree
from research.interop import vision
from research.vlm.connectors import CONNECTORS
from research.vlm.encoders import clip, presets, siglip, vit


def count(make, *args):
  """Returns the number of elements of what `make` returns."""
  return tree.count(jax.eval_shape(make, jax.random.key(0), *args))


# Google's cards say 93 million for B/16, with the head of 7.09 million.
@pytest.mark.parametrize("grid, expected", [(32, 86_433_024), (14, 85_797_120)])
def test_siglip_b16_without_its_head(grid, expected):
  sizes = presets.SIGLIP_SIZES["B"]
  tower = siglip(dataclasses.replace(sizes, grid=grid))
  assert count(lambda key: vit.new_params(tower, key)) == expected


def test_clip_l14_at_336_pixels():
  tower = clip(presets.CLIP_L14_336)
  assert count(lambda key: vit.new_params(tower, key)) == 303_507_456


@pytest.mark.parametrize(
  "name, size, features, expected",
  [
    ("llava-1.5", 4_096, 1_024, 20_979_712),  # 7B
    ("llava-1.5", 5_120, 1_024, 31_467_520),  # 13B
    ("paligemma", 2_048, 1_152, 2_361_344),
    ("smolvlm-256m", 576, 768, 7_077_888),
  ],
)
def test_connectors(name, size, features, expected):
  connector = CONNECTORS[name](size, features)
  side = 4  # patches, of which four by four are a square of SmolVLM's
  x = jnp.zeros((1, side * side, features))
  assert count(lambda key: connector.init(key, x, (side, side))) == expected


_SO400M = dict(
  model_type="siglip_vision_model",
  hidden_size=1_152,
  intermediate_size=4_304,
  num_hidden_layers=27,
  num_attention_heads=16,
  patch_size=14,
  vision_use_head=False,
)

# What shapes depend on of each published config.json, and the number of
# parameters that the Hub shows beside it.
MODELS = {
  "SmolVLM-256M": (
    dict(
      model_type="idefics3",
      image_token_id=49_190,
      scale_factor=4,
      tie_word_embeddings=False,
      vision_config=dict(
        model_type="idefics3",
        hidden_size=768,
        intermediate_size=3_072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=512,
        patch_size=16,
      ),
      text_config=dict(
        model_type="llama",
        vocab_size=49_280,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
      ),
    ),
    256_484_928,
  ),
  "LLaVA-1.5-7B": (
    dict(
      model_type="llava",
      vision_config=dict(
        model_type="clip_vision_model",
        hidden_size=1_024,
        intermediate_size=4_096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
      ),
      text_config=dict(
        model_type="llama",
        vocab_size=32_064,
        hidden_size=4_096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
      ),
    ),
    7_063_427_072,
  ),
  "PaliGemma-3B-224": (
    dict(
      model_type="paligemma",
      image_token_index=257_152,
      vision_config=_SO400M | dict(image_size=224),
      text_config=dict(
        model_type="gemma",
        vocab_size=257_216,
        hidden_size=2_048,
        intermediate_size=16_384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
      ),
    ),
    2_923_466_480,
  ),
  "Gemma-3-4B": (
    dict(
      model_type="gemma3",
      vision_config=_SO400M | dict(image_size=896),
      text_config=dict(
        model_type="gemma3_text",
        vocab_size=262_208,
        hidden_size=2_560,
        intermediate_size=10_240,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
      ),
    ),
    4_300_079_472,
  ),
  # The fields of the language model stand outside in the Hub's files.
  "Qwen2-VL-2B": (
    dict(
      model_type="qwen2_vl",
      vocab_size=151_936,
      hidden_size=1_536,
      intermediate_size=8_960,
      num_hidden_layers=28,
      num_attention_heads=12,
      num_key_value_heads=2,
      rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
      tie_word_embeddings=True,
      vision_config=dict(embed_dim=1_280, in_chans=3, hidden_size=1_536),
    ),
    2_208_985_600,
  ),
  "Qwen2.5-VL-3B": (
    dict(
      model_type="qwen2_5_vl",
      vocab_size=151_936,
      hidden_size=2_048,
      intermediate_size=11_008,
      num_hidden_layers=36,
      num_attention_heads=16,
      num_key_value_heads=2,
      rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
      tie_word_embeddings=True,
      vision_config=dict(hidden_size=1_280, in_chans=3, out_hidden_size=2_048),
    ),
    3_754_622_976,
  ),
  "Qwen3-VL-4B": (
    dict(
      model_type="qwen3_vl",
      tie_word_embeddings=True,
      vision_config=dict(
        model_type="qwen3_vl",
        depth=24,
        hidden_size=1_024,
        intermediate_size=4_096,
        out_hidden_size=2_560,
        deepstack_visual_indexes=[5, 11, 17],
      ),
      text_config=dict(
        model_type="qwen3_vl_text",
        vocab_size=151_936,
        hidden_size=2_560,
        intermediate_size=9_728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_scaling=dict(
          rope_type="default",
          mrope_interleaved=True,
          mrope_section=[24, 20, 20],
        ),
      ),
    ),
    4_437_815_808,
  ),
}


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name):
  config, expected = MODELS[name]
  model = vision.vision_language_model(config, name)
  assert count(model.init) == expected
