"""Tiny models of Qwen's families, with goldens of transformers."""

from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from research.interop import vision
from research.text.tokenizer import Tokenizer
from research.vlm import data
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.presets import QWEN
from research.vlm.images.tiling.native import Native
from tests.support_golden import golden, write

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
IMAGE = 60
IMAGES_OF = ((0, 1), (2,))
"""The images of each row of the goldens."""


def opened(name, folder):
  """Returns the model and its parameters, read of a directory."""
  write(folder, name)
  model, params, _ = vision.model_from_directory(folder)
  return model, params


def preprocessor(model) -> Preprocessor:
  """Returns what makes patches of images, with no bounds on their number."""
  tiling = Native(patch=model.vision.patch, merge=model.square, min_pixels=1)
  return Preprocessor(tiling, model.normalise, QWEN, "<|image_pad|>")


def prompts(model, name):
  """Returns the images of each row on their way into a prompt."""
  found, how = golden(name), preprocessor(model)
  return [
    data.Prompt.from_images([found[f"image_{i}"] for i in own], how, 2)
    for own in IMAGES_OF
  ]


def images(model, name):
  """Returns the images of both rows, as the model takes them."""
  return data.batch_images(prompts(model, name), model.square)


def rows(name):
  """Returns the prompts, as lists of ids."""
  found = golden(name)
  pairs = zip(found["tokens"], found["lengths"], strict=True)
  return [row[:n].tolist() for row, n in pairs]


START, END = 61, 62
"""Tokens around an image."""


def tokenizer() -> Tokenizer:
  """Returns words `w0` to `w66`, of which three are Qwen's tokens of images."""
  words = {f"w{i}": i for i in range(67) if i not in (IMAGE, START, END)}
  around = {"<|vision_start|>": START, "<|vision_end|>": END}
  backend = Backend(
    models.WordLevel(words | around | {"<|image_pad|>": IMAGE}, unk_token="w0")
  )
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  backend.add_special_tokens(["<|vision_start|>", "<|vision_end|>"])
  return Tokenizer(backend=backend, eos=65, pad=0, stop=(65,))
