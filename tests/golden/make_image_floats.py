"""Writes image_floats.npz: what nanoVLM's and Molmo's own code makes of images.

  .venv-peers/bin/python tests/golden/make_image_floats.py \\
    --nanovlm=DIR --molmo=DIR

The folders are checkouts of huggingface/nanoVLM and allenai/molmo. Both resize
in floats, which they keep, so that pixels are compared within a level; counts,
tokens and places exactly. Of each picture of `make_images`: `nanovlm HxW`,
levels of 255 `[N, T, T, 3]`; `molmo HxW`, likewise; `molmo_tokens HxW`, 0
start, 1 feature, 2 end of a row, 3 end; and `molmo_places HxW`, of each view's
pooled feature the token that it takes the place of, or a negative number.
"""

import argparse
import importlib.util
import pathlib
import sys
import types

import make_images
import numpy as np
import PIL.Image
import torchvision.transforms as transforms

PATH = pathlib.Path(__file__).parent / "image_floats.npz"
SIZES = [(20, 30), (41, 23), (9, 60), (33, 33)]
NANOVLM = dict(longest=48, tile=16)
MOLMO = dict(tile=32, most=6, margins=(4, 4), patch=2, pool=2)


def _module(name, path):
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def nanovlm(folder, image):
  its = _module("nano", folder / "data" / "custom_transforms.py")
  process = transforms.Compose(
    [
      its.DynamicResize(NANOVLM["tile"], NANOVLM["longest"], True),
      transforms.ToTensor(),
      its.GlobalAndSplitImages(NANOVLM["tile"]),
    ]
  )
  views, _ = process(PIL.Image.fromarray(image))
  return views.numpy().transpose(0, 2, 3, 1) * 255


def _molmo(folder):
  """Returns Molmo's preprocessor, without the rest of its package."""
  ids = {"START": 0, "PATCH": 1, "COL": 2, "END": 3, "PROMPT": 4}
  tokenizer = types.ModuleType("olmo.tokenizer")
  tokenizer.DEFAULT_IM_START_TOKEN = "START"
  tokenizer.DEFAULT_IMAGE_PATCH_TOKEN = "PATCH"
  tokenizer.DEFAULT_IM_COL_TOKEN = "COL"
  tokenizer.DEFAULT_IM_END_TOKEN = "END"
  tokenizer.IMAGE_PROMPT = "PROMPT"
  tokenizer.get_special_token_ids = lambda _: ids
  formatter = types.ModuleType("olmo.data.data_formatter")
  formatter.DataFormatter = object
  olmo = types.ModuleType("olmo")
  olmo.tokenizer = tokenizer
  sys.modules |= {
    "olmo": olmo, "olmo.tokenizer": tokenizer,
    "olmo.data": types.ModuleType("olmo.data"),
    "olmo.data.data_formatter": formatter,
  }  # fmt: skip
  path = folder / "olmo" / "data" / "model_preprocessor.py"
  side = MOLMO["tile"] // MOLMO["patch"] // MOLMO["pool"]
  return _module("molmo", path).MultiModalPreprocessor(
    tokenizer=None, normalize="openai", crop_mode="overlap-and-resize-c2",
    max_crops=MOLMO["most"], overlap_margins=MOLMO["margins"],
    base_image_input_size=(MOLMO["tile"],) * 2,
    image_token_length_w=side, image_token_length_h=side,
    image_patch_size=MOLMO["patch"],
  )  # fmt: skip


def molmo(made, image):
  patches, tokens, order, _ = made.image_to_patches_and_tokens(image)
  side, patch = MOLMO["tile"] // MOLMO["patch"], MOLMO["patch"]
  cut = patches.reshape(-1, side, side, patch, patch, 3).swapaxes(2, 3)
  views = cut.reshape(-1, side * patch, side * patch, 3)
  std, mean = (
    np.array(make_images.CLIP[key], np.float32)
    for key in ("image_std", "image_mean")
  )
  places = made.build_image_input_idx(tokens, order).reshape(-1)
  return (views * std + mean) * 255, tokens, places


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--nanovlm", type=pathlib.Path, required=True)
  parser.add_argument("--molmo", type=pathlib.Path, required=True)
  given = parser.parse_args()
  made, out = _molmo(given.molmo), {}
  for height, width in SIZES:
    image, size = make_images.picture(height, width), f"{height}x{width}"
    out[f"nanovlm {size}"] = nanovlm(given.nanovlm, image).astype(np.float16)
    levels, tokens, places = molmo(made, image)
    out[f"molmo {size}"] = levels.astype(np.float16)
    out[f"molmo_tokens {size}"] = tokens.astype(np.int8)
    out[f"molmo_places {size}"] = places.astype(np.int16)
  np.savez_compressed(PATH, **out)


if __name__ == "__main__":
  main()
