"""A tiny vision language model with random weights, and its words."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from research import tree
from research.text.tokenizer import Tokenizer
from research.vlm import VisionLanguageModel, connectors
from research.vlm.encoders import EncoderSizes, siglip
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.tiling.square import Square
from tests import support

IMAGE = 67
"""The first id after the vocabulary."""

PREPROCESSOR = Preprocessor(Square(tile=16, patch=4, pool=2))
"""Four by four patches, two by two soft tokens."""


@functools.cache
def model() -> VisionLanguageModel:
  """Returns the model: 16 pixels, patches of 4, squares of 2 by 2."""
  sizes = EncoderSizes(width=24, depth=2, heads=2, hidden=28, patch=4, grid=4)
  return VisionLanguageModel(
    vision=siglip(sizes),
    connector=connectors.Squares(
      side=2, inner=connectors.Linear(size=32, bias=False)
    ),
    language=support.model("llama", max_positions=128),
    image_token=IMAGE,
  )


@functools.cache
def params():
  """Returns random weights, large enough for pixels to change every logit."""
  rng = np.random.default_rng(0)

  def draw(path, x):
    value = 0.3 * rng.standard_normal(x.shape)
    if path.endswith("scale"):
      value = 1 + 0.1 * value
    return jnp.asarray(value, jnp.float32)

  return tree.map_paths(draw, jax.eval_shape(model().init, jax.random.key(0)))


@functools.cache
def tokenizer() -> Tokenizer:
  """Returns a tokenizer of 65 words, `w0` to `w64`; unknown ones are `w1`."""
  words = {f"w{i}": i for i in range(65)} | {"<end>": 65, "<begin>": 66}
  backend = Backend(models.WordLevel(words, unk_token="w1"))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  backend.add_special_tokens(["<end>", "<begin>"])
  return Tokenizer(backend=backend, bos=66, eos=65, pad=0, stop=(65,))


CHAT = (
  "{% for m in messages %}"
  "{% if m.role == 'user' %}w2 {% else %}w3 {% endif %}{{ m.content }} "
  "{% if m.role == 'assistant' %}<end> {% endif %}{% endfor %}"
  "{% if add_generation_prompt %}w3 {% endif %}"
)
"""A chat template in those words."""


@dataclasses.dataclass(frozen=True)
class ChatWords:
  """That tokenizer with the chat template, as a run file names it."""

  def load(self) -> Tokenizer:
    """Returns the tokenizer."""
    return dataclasses.replace(tokenizer(), chat_template=CHAT)


def pixels(rows: int, views: int, seed: int = 0) -> np.ndarray:
  """Returns random views, uint8 [rows, views, 16, 16, 3]."""
  shape = rows, views, 16, 16, 3
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
