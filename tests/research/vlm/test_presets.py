"""Published models: sizes of the real ones, and reduced ones that run."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.typing import UserError
from research.vlm import presets
from research.vlm.encoders import vit
from research.vlm.presets import PRESETS

# Parameters of the published checkpoints without SigLIP's pooling head:
# specifications' arithmetic, and the counts on the models' pages.
TOTALS = {
  "smolvlm-256m": 256_484_928,
  "smolvlm-500m": 507_482_304,
  "nanovlm-222m": 222_081_600,
  "llava-1.5-7b": 303_507_456 + 20_979_712 + 6_738_415_616,
  "llava-1.5-13b": 303_507_456 + 31_467_520 + 13_015_864_320,
}


def _shapes(model):
  return jax.eval_shape(model.init, jax.random.key(0))


def _count(shapes):
  return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", TOTALS)
def test_parameters_of_published_models(name):
  assert _count(_shapes(PRESETS[name].model())) == TOTALS[name]


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


@pytest.mark.parametrize("name", PRESETS)
def test_reduced_presets_have_as_many_features_as_placeholders(name):
  """On an image that is no square; with a hundredth of the weights."""
  preset = PRESETS[name]
  plan = preset.preprocessor.plan(96, 64)
  model = preset.reduced(64).model()
  params = _shapes(model)
  pixels = jax.ShapeDtypeStruct((2, plan.views, *plan.view, 3), jnp.uint8)
  soft = jax.eval_shape(model.encode, params, pixels)
  assert soft.shape == (2, plan.soft_tokens, model.language.width)
  assert _count(params) < 25e6


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
