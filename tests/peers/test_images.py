"""Photographs, as ours and as transformers' processors make views of them.

Ours are Pillow's pixels, and have to be the PIL backend's to the last bit of
float32. transformers 5 takes torchvision where it is installed: how far that
one is from its own PIL backend is stated here, in levels of 255. Molmo 2 has no
PIL backend, nanoVLM and Molmo no class; `TORCH_ONLY` compares the first one.
"""

import io
import json

import make_images
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import skimage.data
import sklearn.datasets
import transformers
from transformers import image_transforms

OURS = """
import json, sys
import numpy as np
from research.vlm.images import from_preprocessor_config, patchify
from research.vlm.images.tiling import Budget, NaFlex, Native

cases = json.load(open(sys.argv[1]))
images, out = np.load(sys.argv[2]), {}
for name, (config, patch, pool) in cases.items():
  it = from_preprocessor_config(config, patch=patch, pool=pool)
  for key in images.files:
    views = it.views(images[key])
    pixels = views.pixels if "Molmo2" in name else it.floats(views)
    if isinstance(it.tiling, Native | NaFlex | Budget):
      merge = getattr(it.tiling, "merge", 1)
      pixels = patchify(pixels[0], it.tiling.patch, merge)[0]
    out[f"{name} {key}"] = pixels
np.savez(sys.argv[3], **out)
"""

PUBLISHED = {
  "CLIP": (dict(size={"shortest_edge": 336}, crop_size=336), 14, 1),
  "Siglip": (dict(size={"height": 224, "width": 224}), 16, 1),
  "Llava": (
    dict(size={"shortest_edge": 336}, crop_size=336, do_pad=True), 14, 1,
  ),
  "LlavaNext": (dict(size={"shortest_edge": 336}, crop_size=336), 14, 1),
  "Idefics3": ({}, 14, 2),
  "SmolVLM": (
    dict(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}),
    16, 4,
  ),
  "GotOcr2": (
    dict(size={"height": 448, "width": 448}, crop_to_patches=True,
         **make_images.IMAGENET), 14, 2,
  ),
  "Qwen2VL": ({}, None, None),
  "Siglip2": ({}, None, None),
  "Gemma3": (
    dict(size={"height": 896, "width": 896}, do_pan_and_scan=True,
         pan_and_scan_min_crop_size=100, pan_and_scan_max_num_crops=4,
         pan_and_scan_min_ratio_to_activate=1.2), 14, 4,
  ),
  "Gemma4": ({}, None, None),
}  # fmt: skip
TORCH_ONLY = {"Molmo2": ({}, None, None)}
LEVELS = {"Idefics3": 3, "SmolVLM": 3, "Qwen2VL": 8}
"""By how much torchvision's backend differs from PIL's; else by 2."""


def photographs():
  """Returns photographs and parts of them, tall, wide and tiny."""
  china = sklearn.datasets.load_sample_image("china.jpg")
  cat, coffee = skimage.data.chelsea(), skimage.data.coffee()
  return {
    "china": china,
    "astronaut": skimage.data.astronaut()[:, :300],
    "coffee": coffee[:337, :400],
    "wide": china[200:212],
    "tall": china[:, 300:306],
    "tiny": cat[100:107, 100:103],
    "pixel": cat[:1, :1],
  }


@pytest.fixture(scope="module")
def ours(shared_heptad):
  folder = shared_heptad.folder
  cases = {
    name: (make_images._config(name, **values), patch, pool)
    for name, (values, patch, pool) in (PUBLISHED | TORCH_ONLY).items()
  }
  paths = [folder / name for name in ("cases.json", "in.npz", "out.npz")]
  paths[0].write_text(json.dumps(cases))
  np.savez(paths[1], **photographs())
  shared_heptad.script(OURS, *paths)
  with np.load(paths[2]) as file:
    return dict(file)


def theirs(name, values, image, backend=None):
  config = make_images._config(name, **values)
  made = backend and getattr(transformers, f"{name}ImageProcessor")(**values)
  if made:
    assert made.backend == backend
  return make_images.pixels_of(config, image, made)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_float_is_the_pil_backend_s(name, ours):
  for key, image in photographs().items():
    want = theirs(name, PUBLISHED[name][0], image)
    found = ours[f"{name} {key}"]
    assert found.dtype == want.dtype == np.float32
    np.testing.assert_array_equal(found, want, err_msg=key)


@pytest.mark.parametrize("name", PUBLISHED)
def test_torchvision_s_backend_is_within_a_few_levels(name, ours):
  std = float(np.min(PUBLISHED[name][0].get("image_std", [0.26])))
  std = 1.0 if name == "Gemma4" else std
  for key in ("china", "wide", "tiny"):
    image = photographs()[key]
    want = theirs(name, PUBLISHED[name][0], image, "torchvision")
    found = ours[f"{name} {key}"]
    levels = np.abs(found.astype(np.float64) - want).max() * std * 255
    assert levels < LEVELS.get(name, 2) + 0.2, (key, levels)


def test_molmo2_s_pixels_are_torchvision_s(ours):
  for key, image in photographs().items():
    want = theirs("Molmo2", {}, image)
    np.testing.assert_array_equal(ours[f"Molmo2 {key}"], want, err_msg=key)


def pictures(folder):
  """Writes pictures of 97 x 141 of each mode, and turned by EXIF."""
  drawn = PIL.Image.fromarray(make_images.picture(97, 141))
  see_through = drawn.convert("RGBA")
  see_through.putalpha(drawn.convert("L"))
  modes = {mode: drawn.convert(mode) for mode in ("RGB", "L", "1", "LA", "P")}
  paths = {}
  for name, image in (modes | {"RGBA": see_through}).items():
    paths[name] = folder / f"{name}.png"
    image.save(paths[name])
  for turn in (2, 5, 6, 8):
    exif = PIL.Image.Exif()
    exif[0x0112] = turn
    paths[f"exif{turn}"] = folder / f"exif{turn}.jpg"
    drawn.save(paths[f"exif{turn}"], exif=exif)
  return paths


@pytest.mark.parametrize("name", ["Siglip", "CLIP", "Gemma4", "Idefics3"])
def test_files_of_every_mode_are_the_pil_backend_s(name, shared_heptad):
  """Gemma 4's of 97 x 141 and turned ones, too, to the last bit.

  torchvision's backend has half a percent of their values a level or two away,
  which its resizing rounds otherwise.
  """
  folder = shared_heptad.folder
  values, patch, pool = PUBLISHED[name]
  config = make_images._config(name, **values)
  paths = pictures(folder)
  cases = folder / "modes.json"
  cases.write_text(json.dumps({name: (config, patch, pool)}))
  opened = (
    OURS.replace("np.load(sys.argv[2])", "json.load(open(sys.argv[2]))")
    .replace("images.files", "images")
    .replace("images[key])", "open_image(images[key]))")
    .replace("import from_", "import open_image, from_")
  )
  listed, out = folder / "modes_in.json", folder / f"{name}_modes.npz"
  listed.write_text(json.dumps({k: str(v) for k, v in paths.items()}))
  shared_heptad.script(opened, cases, listed, out)
  with np.load(out) as found:
    for key, path in paths.items():
      upright = PIL.ImageOps.exif_transpose(PIL.Image.open(path))
      want = make_images.pixels_of(config, upright)
      np.testing.assert_array_equal(found[f"{name} {key}"], want, err_msg=key)


def test_transparency_is_composited_as_transformers_does(shared_heptad):
  """Every colour of grey on every alpha, on white."""
  grey, alpha = np.mgrid[:256, :256].astype(np.uint8)
  rgba = np.stack([grey, 255 - grey, grey // 2, alpha], axis=-1)
  file = io.BytesIO()
  PIL.Image.fromarray(rgba).save(file, "PNG")
  path, out = (shared_heptad.folder / x for x in ("alpha.png", "alpha.npy"))
  path.write_bytes(file.getvalue())
  shared_heptad.script(
    "import sys, numpy as np\n"
    "from research.vlm.images import open_image\n"
    "np.save(sys.argv[2], open_image(sys.argv[1]))",
    path, out,
  )  # fmt: skip
  want = image_transforms.convert_to_rgb(
    PIL.Image.open(path), return_numpy=True
  )
  np.testing.assert_array_equal(np.load(out), want)
