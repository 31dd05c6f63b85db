"""InternVL's config.json: what is read and written, and what is refused."""

import json
import pathlib

import pytest

from research.interop.vision import config as vision_config
from research.interop.vision import config_write
from research.typing import UserError

FILE = pathlib.Path(__file__).parents[3] / "golden/vlm/internvl/config.json"


def config(**vision):
  found = json.loads(FILE.read_text())
  found["vision_config"] |= vision
  return found


@pytest.mark.parametrize(
  "vision",
  [
    dict(use_mean_pooling=True),
    dict(use_mean_pooling=False),
    dict(norm_type="rms_norm", attention_bias=False),
    dict(use_absolute_position_embeddings=False),
    dict(image_size=[24, 32]),
  ],
)
def test_what_is_written_reads_back_as_the_same_model(vision):
  model = vision_config.vision_language_model(config(**vision), "config")
  written = json.loads(json.dumps(config_write.describe(model)))
  assert written["model_type"] == "internvl"
  again = vision_config.vision_language_model(written, "config")
  assert again == model
  for name, value in vision.items():
    if vision.get("use_absolute_position_embeddings", True):
      assert written["vision_config"][name] == value


@pytest.mark.parametrize(
  "vision, more, message",
  [
    (dict(use_qk_norm=True), {}, "use_qk_norm is True.*not supported"),
    (dict(use_mask_token=True), {}, "use_mask_token is True"),
    (dict(norm_type="batch_norm"), {}, "norm_type is 'batch_norm'"),
    (dict(hidden_act="relu"), {}, "hidden_act is 'relu', expected gelu"),
    (dict(patch_size=[4, 8]), {}, "patch_size is .*, expected a square"),
    (dict(image_size="16"), {}, "image_size is '16'"),
    (dict(num_attention_heads=5), {}, "a divisor of 24"),
    ({}, dict(downsample_ratio=0.3), "one over a whole number"),
    ({}, dict(vision_feature_select_strategy="full"), "expected default"),
    ({}, dict(vision_feature_layer=[-1, -2]), "a number of a layer"),
  ],
)
def test_what_is_another_model_is_refused_by_name(vision, more, message):
  with pytest.raises(UserError, match=message):
    vision_config.vision_language_model(config(**vision) | more, "config")
