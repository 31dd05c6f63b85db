"""Published models: sizes of the real ones, and reduced ones that run."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree
from research.nn.rope import InterleavedSections, Sections
from research.typing import UserError
from research.vlm import arithmetic, presets
from research.vlm.cross_attention import LatestImage
from research.vlm.encoders import GroupedViews, vit
from research.vlm.encoders.clipped import BOUNDS
from research.vlm.presets import PRESETS

# Parameters of the published checkpoints without SigLIP's pooling head:
# specifications' arithmetic, and the counts on the models' pages. Those of the
# last ones are of transformers 5.24's classes, without arrays (`meta`).
TOTALS = {
  "smolvlm-256m": 256_484_928,
  "smolvlm-500m": 507_482_304,
  "nanovlm-222m": 222_081_600,
  "llava-1.5-7b": 303_507_456 + 20_979_712 + 6_738_415_616,
  "llava-1.5-13b": 303_507_456 + 31_467_520 + 13_015_864_320,
  "qwen2-vl-2b": 2_208_985_600,
  "qwen2-vl-7b": 8_291_375_616,
  "qwen2.5-vl-3b": 3_754_622_976,
  "qwen2.5-vl-7b": 8_292_166_656,
  "qwen3-vl-4b": 4_437_815_808,
  "qwen3-vl-8b": 8_767_123_696,
  "internvl3.5-1b": 1_060_897_792,
  "internvl3.5-8b": 8_528_318_464,
  "gemma4-e2b": 4_797_113_600,
  "gemma4-e4b": 7_632_344_064,
  "gemma4-31b": 31_273_086_512,
  "molmo2-4b": 4_850_869_200,
  # But for OPT's learned positions.
  "blip-2-opt-2.7b": 3_744_679_936 - 2_050 * 2_560,
  # CLIP L/14 of 224 pixels, and LLaMA-7B of three more tokens. OpenFlamingo's
  # `helpers.py`: latents, a norm and six layers; eight layers among the 32.
  "open-flamingo-9b": 303_507_456 - 320 * 1_024
  + 6_738_415_616 + 6 * 4_096
  + 66 * 1_024 + 6 * (6 * 1_024 + 4 * 1_024 * 512 + 8 * 1_024**2)
  + 8 * (4 * 4_096 + 2 * 5_120 * 512 + 8 * 4_096**2 + 2),
}  # fmt: skip

SOFT = {
  "qwen2-vl-7b": ((480, 640), 391, 393),
  "qwen2.5-vl-3b": ((1_000, 3_000), 36 * 107, 3_854),
  "qwen3-vl-8b": ((480, 640), 300, 302),
  "internvl3.5-8b": ((480, 640), 13 * 256, 3_330),
  "internvl3.5-1b": ((1_080, 1_920), 9 * 256, 2_306),
  "gemma4-31b": ((1_000, 3_000), 252, 254),
  "molmo2-4b": ((480, 640), 14**2 + 23**2, 725 + 14 + 23 + 4),
  "blip-2-opt-2.7b": ((480, 640), 32, 32),
  "open-flamingo-9b": ((480, 640), 1, 1),
}
"""Image -> soft tokens, and with what is around them: transformers' processors'
(Qwen-VL, Gemma 4, Molmo 2, BLIP-2), and those of the papers' code."""


def _shapes(model):
  return jax.eval_shape(model.init, jax.random.key(0))


def _count(shapes):
  return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", TOTALS)
def test_parameters_of_published_models(name):
  shapes, bounds = _shapes(PRESETS[name].model()), 0
  if name.startswith("gemma4"):
    # Buffers of transformers: bounds, factors of layers, statistics.
    bounds = sum(
      math.prod(x.shape)
      for path, x in tree.flatten_paths(shapes)
      if path.endswith((*BOUNDS, "output_scale/scale"))
      or path.startswith("connector/standardise/")
    )
  assert _count(shapes) - bounds == TOTALS[name]


def test_positions_of_qwen_s_are_those_of_three_axes():
  """And shares of a smaller head stay what they are, as far as they can."""
  for name, axes in (
    ("qwen2-vl-2b", Sections(sizes=(16, 24, 24))),
    ("qwen3-vl-4b", InterleavedSections(sizes=(24, 20, 20))),
  ):
    model = PRESETS[name].model()
    assert all(
      block.attention.rope.axes == axes for block in model.language.stack.blocks
    )
    [block] = PRESETS[name].reduced(64).model().language.stack.blocks
    sizes = block.attention.rope.axes.sizes
    assert 2 * sum(sizes) == block.attention.head_dim


def test_parameters_of_published_parts():
  paligemma = _shapes(PRESETS["paligemma-3b-224"].model())
  assert _count(paligemma["connector"]) == 2_361_344
  # Gemma 2B of 256,000 rows, and rows for places, segments and images.
  assert _count(paligemma["language"]) == 2_506_172_416 + 1_216 * 2_048
  # "0.3B" of vision, and "4.4B" and "8.2B" of language, says the readme.
  for name, billions in (("4b", 4.4), ("8b", 8.2)):
    onevision = _shapes(PRESETS[f"llava-onevision-1.5-{name}"].model())
    assert round(_count(onevision["language"]) / 1e9, 1) == billions
    assert round(_count(onevision["vision"]) / 1e9, 1) == 0.3


@pytest.mark.parametrize("name", SOFT)
def test_soft_tokens_of_an_image(name):
  (height, width), soft, total = SOFT[name]
  cost = arithmetic.image_cost(PRESETS[name], height, width)
  assert (cost.soft_tokens, cost.total_tokens) == (soft, total)
  # Flamingo's prompt has the image's place; layers read its 64 latents.
  assert cost.media_tokens == (64 if name.startswith("open-flamingo") else 0)


@pytest.mark.parametrize("name", PRESETS)
def test_reduced_presets_have_as_many_features_as_placeholders(name):
  """On an image that is no square; with a hundredth of the weights."""
  preset = PRESETS[name]
  plan = preset.preprocessor.plan(96, 64)
  model = preset.reduced(64).model()
  params = _shapes(model)
  images = jax.ShapeDtypeStruct((2, plan.views, *plan.view, 3), jnp.uint8)
  groups = preset.preprocessor.tiling.groups(plan)
  if groups is not None:
    groups = jax.ShapeDtypeStruct((2, *groups.shape), jnp.int32)
    images = GroupedViews(images, groups)
  soft = jax.eval_shape(model.encode, params, images)
  model.check_placeholders(preset.preprocessor)
  count, width = plan.soft_tokens, model.language.width
  if isinstance(model.placement, LatestImage):
    count, width = 64 * plan.views, model.vision.width
  # DeepStack's are as wide as several tokens, for as many layers.
  deeper = len(model.features.layers) if "qwen3-vl" in name else 1
  assert soft.shape == (2, count, deeper * width)
  towers = {k: params[k] for k in ("vision", "language")}
  assert _count(towers) < 30e6


def test_pixels_that_are_left_over_are_not_seen():
  """18 pixels are 4 patches of 4 and 2 pixels, as a convolution has it."""
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(1, 18, 19, 3)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(4, 4, 3, 5)), jnp.float32)
  want = jax.lax.conv_general_dilated(
    images, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  got = vit.patchify(images, 4) @ kernel.reshape(-1, 5)
  np.testing.assert_allclose(got, want.reshape(1, 16, 5), rtol=1e-4, atol=1e-5)
  with pytest.raises(UserError, match="3 x 19 pixels, expected at least one"):
    vit.patchify(images[:, :3], 4)


def test_an_unknown_preset_is_named():
  with pytest.raises(UserError, match="'llava-9'.*smolvlm-256m"):
    presets.preset("llava-9")
