"""Vision language models assembled of parts: whose encoder they start with."""

import dataclasses
import pathlib

import chex
import jax
import jax.numpy as jnp
import pytest

from research.interop import load
from research.interop.loaded import Loaded
from research.interop.vision import Assembled
from research.nn import logits
from research.typing import UserError
from research.vlm import connectors
from research.vlm.contrastive.dual_encoder import DualEncoder
from research.vlm.encoders import EncoderSizes, siglip, siglip_text, vit
from research.vlm.images.normalise import CLIP
from tests import support, support_vlm

SIZES = EncoderSizes(width=24, depth=2, heads=2, hidden=28, patch=4, grid=4)


@dataclasses.dataclass(frozen=True)
class Source:
  """Of a model that is there."""

  model: object
  params: object
  preprocessor: object = None

  def load(self, shardings=None):
    del shardings
    source = {"format": "test"}
    how = self.preprocessor
    return Loaded(self.model, self.params, None, source, preprocessor=how)


def assembled(encoder=None):
  base = support_vlm.model()
  return Assembled(
    language=Source(base.language, support_vlm.params()["language"]),
    vision=base.vision,
    encoder=encoder,
    connector=base.connector,
    preprocessor=support_vlm.PREPROCESSOR,
    seed=3,
  )


def two_towers():
  image = siglip(SIZES, head=True)
  text = siglip_text(SIZES, vocab=66, length=5)
  params = vit.new_params(image, jax.random.key(7))
  return Source(DualEncoder(image=image, text=text), {"image": params})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vision language", "contrastive"])
def test_it_starts_with_the_weights_of_a_trained_encoder(kind):
  if kind == "contrastive":
    source = two_towers()
    expected = dict(source.params["image"])
    assert expected.pop("pooling")
  else:
    source = Source(support_vlm.model(), support_vlm.params())
    expected = source.params["vision"]
  fresh, found = assembled().load(), assembled(source).load()
  chex.assert_trees_all_equal(found.params["vision"], expected)
  others = {k: found.params[k] for k in ("connector", "language")}
  chex.assert_trees_all_equal(others, {k: fresh.params[k] for k in others})
  with pytest.raises(AssertionError):
    chex.assert_trees_all_equal(fresh.params["vision"], expected)


def test_another_encoder_is_refused_by_its_differences():
  wider = dataclasses.replace(SIZES, width=32)
  source = Source(
    dataclasses.replace(support_vlm.model(), vision=siglip(wider)),
    {"vision": 0},
  )
  with pytest.raises(UserError, match="found width 32, expected 24"):
    assembled(source).load()


@pytest.mark.parametrize("kind", ["vision language", "contrastive"])
def test_an_encoder_of_other_pixels_is_refused(kind):
  if kind == "contrastive":
    how = dataclasses.replace(support_vlm.PREPROCESSOR, normalise=CLIP)
    source = dataclasses.replace(two_towers(), preprocessor=how)
  else:
    model = dataclasses.replace(support_vlm.model(), normalise=CLIP)
    source = Source(model, support_vlm.params())
  with pytest.raises(UserError, match="Assembled.preprocessor: found Normal"):
    assembled(source).load()


@pytest.mark.slow
def test_a_language_model_in_gguf_gets_towers():
  """Packed as its file has it, it reads soft tokens as when decoded."""
  file = pathlib.Path(__file__).parents[3] / "golden/models/gguf_mixed"
  tokens, found = [5, 6, 7], []
  for packed in (True, False):
    read = load.load_model(file / "model.gguf", packed=packed)
    inner = connectors.Linear(size=read.model.width)
    loaded = dataclasses.replace(
      assembled(),
      language=Source(read.model, read.params),
      connector=connectors.Squares(side=2, inner=inner),
    ).load()
    model = loaded.model
    rows = jnp.array([[model.image_token] * 4 + tokens] * 2)
    pixels = jnp.asarray(support_vlm.pixels(2, 1))
    seen = model.with_images(loaded.params, pixels)
    found.append(logits(model.language, seen, rows))
  chex.assert_trees_all_close(*found, rtol=0, atol=1e-4)
  assert jnp.abs(found[0][0] - found[0][1]).max() > 1e-2


def test_a_language_model_has_no_encoder():
  source = Source(support.model("llama"), {})
  with pytest.raises(UserError, match="found a Transformer"):
    assembled(source).load()
