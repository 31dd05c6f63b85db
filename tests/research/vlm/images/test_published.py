"""Pixels and counts are those of the published processors.

`tests/golden/make_images.py` wrote what transformers' PIL backend makes of
pictures of integers, as hashes, and what its processors count for 2,000 sizes;
`tests/peers/test_images.py` compares live, on photographs.
"""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

from research.errors import UserError
from research.vlm.images.configs import from_preprocessor_config
from research.vlm.images.normalise import CLIP, HALF, IMAGENET, UNIT
from research.vlm.images.patches import patchify
from research.vlm.images.presets import preset
from research.vlm.images.prompts import RowEnds, Soft
from research.vlm.images.tiling import Budget, NaFlex, NanoVLM, Native, Overlap

GOLDEN = pathlib.Path(__file__).parents[3] / "golden"
_spec = importlib.util.spec_from_file_location(
  "make_images", GOLDEN / "make_images.py"
)
make_images = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_images)

HASHES = json.loads((GOLDEN / "images.json").read_text("utf-8"))
with np.load(GOLDEN / "image_counts.npz") as _file:
  COUNTS = dict(_file)
SIZES = COUNTS.pop("sizes").tolist()


def ours(config, patch, pool, image):
  """Returns what `make_images.pixels_of` does."""
  it = from_preprocessor_config(config, patch=patch, pool=pool)
  views = it.views(image)
  if config["image_processor_type"] == "Molmo2ImageProcessor":
    return views.pixels
  pixels = it.floats(views)
  if isinstance(it.tiling, Native | NaFlex | Budget):
    merge = getattr(it.tiling, "merge", 1)
    return patchify(pixels[0], it.tiling.patch, merge)[0]
  return pixels


@pytest.mark.parametrize("name", make_images.CASES)
def test_pixels_to_the_last_bit(name):
  config, patch, pool, sizes = make_images.CASES[name]
  for height, width in sizes:
    shape, digest = HASHES[f"{name} {height}x{width}"]
    pixels = ours(config, patch, pool, make_images.picture(height, width))
    assert list(pixels.shape) == shape, (height, width)
    assert make_images.digest(pixels) == digest, (height, width)


def test_a_changed_pixel_changes_the_hash():
  config, patch, pool, _ = make_images.CASES["clip"]
  image = make_images.picture(48, 64)
  image[20, 30, 1] ^= 64
  pixels = ours(config, patch, pool, image)
  assert make_images.digest(pixels) != HASHES["clip 48x64"][1]


def numbers(name, plan):
  """Returns what `make_images.counts` has of a preset."""
  if name in ("smolvlm-256m", "smolvlm-2.2b", "idefics3"):
    return plan.rows, plan.columns, plan.views
  if name == "llava-next":
    return plan.rows, plan.columns, plan.soft_tokens
  if name == "internvl":
    return (plan.views,)
  if name == "gemma3-pan-and-scan":
    return (plan.views - 1,)
  if name == "molmo2":
    return (*plan.grids[0], *plan.grids[1], plan.views)
  return plan.patches


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_2000_sizes(name):
  """-1 is a shape that the processor refuses."""
  it, wrong = preset(name), []
  for size, want in zip(SIZES, COUNTS[name].tolist(), strict=True):
    try:
      found = numbers(name, it.plan(*size))
    except UserError:
      found = (-1,) * len(want)
    if list(found) != want:
      wrong.append((size, found, want))
  assert not wrong, (len(wrong), wrong[:3])


@pytest.mark.parametrize(
  "values", [CLIP, HALF, IMAGENET, UNIT], ids=["clip", "half", "net", "unit"]
)
def test_normalisation_of_all_256_levels(values):
  """As numpy does it in the published order: float64 x 1/255, then float32."""
  levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 1, 256, 3)
  scaled = (levels.astype(np.float64) * (1 / 255)).astype(np.float32)
  want = (scaled - np.float32(values.mean)) / np.float32(values.std)
  found = values(levels)
  assert found.dtype == want.dtype == np.float32
  np.testing.assert_array_equal(found, want)
  # Any shape and any length, and views of others.
  many = np.random.default_rng(0).integers(0, 256, (3, 50, 321, 3), np.uint8)
  scaled = (many.astype(np.float64) * (1 / 255)).astype(np.float32)
  want = (scaled - np.float32(values.mean)) / np.float32(values.std)
  np.testing.assert_array_equal(values(many), want)
  np.testing.assert_array_equal(values(many[:, ::7, 5:]), want[:, ::7, 5:])


def floats(name):
  """Returns the golden arrays of a kind, by the picture's size."""
  with np.load(GOLDEN / "image_floats.npz") as file:
    found = {k: file[k] for k in file.files if k.startswith(f"{name} ")}
  return {tuple(map(int, k.split()[1].split("x"))): v for k, v in found.items()}


def close(found, want):
  """In levels: rounded once, and stored with eleven bits."""
  assert found.shape == want.shape
  return np.abs(found - want.astype(np.float64)).max() < 1.2


def test_nanovlm_s_views_within_a_level():
  tiling = NanoVLM(longest=48, tile=16, patch=4, pool=2)
  for size, want in floats("nanovlm").items():
    found = tiling.views(make_images.picture(*size)).pixels
    assert close(found, want), size
    # The tiles are not resized in floats.
    exact = np.abs(found[1:] - want[1:].astype(np.float64)).max()
    assert exact < 0.1, size


def test_molmo_s_views_within_a_level_its_tokens_and_places():
  tiling = Overlap(32, max_tiles=6, margins=(4, 4), patch=2, pool=2)
  ids = {"<im_start>": 0, "<im_col>": 2, "<im_end>": 3}
  tokens, places = floats("molmo_tokens"), floats("molmo_places")
  for size, want in floats("molmo").items():
    plan = tiling.plan(*size)
    found = tiling.views(make_images.picture(*size), plan).pixels
    assert close(found, want), size
    said = []
    for piece in RowEnds()(plan):
      said += (
        [1] * piece.count if isinstance(piece, Soft) else [ids[piece.text]]
      )
    assert said == tokens[size].tolist(), size
    # Molmo pools 2 x 2 patches inside of each view, to 8 x 8 cells.
    cells = np.arange(plan.encoder_tokens).reshape(-1, 8, 2, 8, 2)
    cells = cells.swapaxes(2, 3).reshape(-1, 4).tolist()
    features = np.flatnonzero(tokens[size] == 1)
    groups = map(tuple, tiling.groups(plan).tolist())
    place = dict(zip(groups, features.tolist(), strict=True))
    found = [place.get(tuple(cell), -1) for cell in cells]
    want = np.maximum(places[size], -1).tolist()
    assert found == want, size
