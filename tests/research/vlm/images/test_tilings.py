"""Counts of views and tokens, by hand, by the literature, and by the views.

The published processors' counts for 2,000 sizes, and hashes of their pixels,
are in `test_published.py`.
"""

import dataclasses
import math

import numpy as np
import pytest

from research.errors import UserError
from research.vlm.images.patches import patchify
from research.vlm.images.presets import PRESETS, preset
from research.vlm.images.prompts import Soft, token_count
from research.vlm.images.tiling import (
  AnyRes,
  Budget,
  CentreCrop,
  Idefics3,
  InternVL,
  NaFlex,
  NanoVLM,
  Native,
  Overlap,
  PadToSquare,
  PanAndScan,
  Square,
)

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (128, 128, 3), dtype=np.uint8)


def total(name, height, width):
  """Returns soft tokens, and all positions."""
  it = preset(name)
  plan = it.plan(height, width)
  return plan.soft_tokens, token_count(it.pieces(plan))


@pytest.mark.parametrize(
  "size, tokens",
  [
    ((336, 336), 1176),
    ((480, 640), 2340),
    ((640, 480), 2352),
    ((1000, 200), 1656),
    ((200, 1000), 1598),
    ((672, 672), 2928),
    ((1080, 1920), 1948),
    ((337, 400), 2536),
    ((3000, 1000), 2376),
  ],
)
def test_llava_next(size, tokens):
  assert total("llava-next", *size) == (tokens, tokens)


@pytest.mark.parametrize(
  "width, height, rows, columns, tokens",
  [
    (386, 386, 4, 4, 1088),
    (512, 384, 3, 4, 832),
    (640, 480, 3, 4, 832),
    (2048, 1365, 3, 4, 832),
    (451, 300, 3, 4, 832),
    (600, 400, 3, 4, 832),
    (1000, 200, 1, 4, 320),
  ],
)
def test_smolvlm(width, height, rows, columns, tokens):
  plan = preset("smolvlm-256m").plan(height, width)
  assert (plan.rows, plan.columns, plan.soft_tokens) == (rows, columns, tokens)
  # rows (cols (S + 2) + 1) + S + 3 positions, S = 64
  length = rows * (columns * 66 + 1) + 67
  assert total("smolvlm-256m", height, width) == (tokens, length)


def test_smolvlm_without_splitting_or_enlarging():
  whole = dataclasses.replace(preset("smolvlm-256m").tiling, splitting="none")
  small = dataclasses.replace(preset("smolvlm-256m").tiling, scale="shrink")
  for tiling in (whole, small):
    it = dataclasses.replace(preset("smolvlm-256m"), tiling=tiling)
    plan = it.plan(386, 386)
    assert (plan.rows, plan.columns, plan.views) == (0, 0, 1)
    assert token_count(it.pieces(plan)) == 64 + 3
  plan = small.plan(386, 700)  # up to whole tiles, not to 2048
  assert (plan.canvas, plan.views) == ((1024, 1024), 5)
  assert small.plan(4000, 3000) == preset("smolvlm-256m").plan(4000, 3000)


@pytest.mark.parametrize(
  "name, tokens",
  [("smolvlm-500m", 64), ("smolvlm-2.2b", 81), ("idefics3", 169)],
)
def test_tokens_of_a_tile(name, tokens):
  rows, columns = preset(name).plan(480, 640).grids[0]
  assert rows * columns == tokens


@pytest.mark.parametrize(
  "size, tiles, tokens",
  [
    ((448, 448), (1, 1), 258),
    ((480, 640), (3, 4), 3330),
    ((30, 40), (3, 4), 3330),
    ((1080, 1920), (2, 4), 2306),
    ((300, 1200), (1, 4), 1282),
  ],
)
def test_internvl(size, tiles, tokens):
  plan = preset("internvl").plan(*size)
  assert (plan.rows, plan.columns) == tiles
  assert total("internvl", *size)[1] == tokens


@pytest.mark.parametrize(
  "size, resized, tokens",
  [
    ((480, 640), (476, 644), 391),
    ((28, 28), (56, 56), 4),
    ((1000, 3000), (560, 1708), 1220),
    ((4000, 6000), (812, 1204), 1247),
    ((42, 42), (56, 56), 4),
    ((70, 70), (56, 56), 4),  # 2.5 rounds to 2
  ],
)
def test_qwen_with_the_class_s_own_limits(size, resized, tokens):
  plan = Native().plan(*size)
  assert (plan.content, plan.soft_tokens) == (resized, tokens)


@pytest.mark.parametrize(
  "name, tokens",
  [
    ("paligemma-224", 256),
    ("paligemma-448", 1024),
    ("paligemma-896", 4096),
    ("llava-1.5", 576),
    ("llava-1.5-stage1", 576),
    ("siglip-b-224", 196),
    ("nanovlm-222m", 49),
  ],
)
def test_fixed_counts(name, tokens):
  for size in ((480, 640), (1, 900), (2000, 30)):
    assert total(name, *size) == (tokens, tokens)


def test_gemma3_has_259_positions_more_than_its_placeholder():
  assert total("gemma3", 480, 640) == (256, 260)


def test_gemma4_fills_its_budget_where_the_shape_allows():
  """A 20 x 14 grid is 280 tokens: 960 x 672 pixels."""
  assert preset("gemma4").plan(960, 672).grids == ((20, 14),)
  assert preset("gemma4").plan(96, 67).soft_tokens <= 280
  assert preset("gemma4").plan(1, 5000).grids == ((1, 280),)


def test_molmo_s_two_maps():
  # 336 x 336: one tile (224 + 112), so that both maps are 12 x 12
  tokens = 12 * 12
  assert total("molmo", 336, 336) == (2 * tokens, 2 * (tokens + 12 + 2))
  plan = preset("molmo").plan(560, 784)  # 2 x 3 windows of 224, 112 more
  assert (plan.rows, plan.columns, plan.content) == (2, 3, (560, 784))
  assert plan.grids == ((12, 12), (20, 28))


def test_nanovlm_s_whole_view_comes_first_and_one_tile_is_both():
  it = preset("nanovlm-460m")
  small = dataclasses.replace(it.tiling, scale="shrink")
  assert small.plan(300, 500).views == 1
  assert it.plan(480, 640).views == 1 + 3 * 4
  assert total("nanovlm-460m", 480, 640) == (13 * 64, 13 * 65)
  slopes = np.add.outer(np.arange(40) * 2, np.arange(64))
  image = (slopes[..., None] + np.array([0, 30, 60])).astype(np.uint8)
  tiling = NanoVLM(longest=64, tile=32, patch=8, pool=2)
  pixels = tiling.views(image).pixels
  assert pixels.shape == (5, 32, 32, 3)
  top = np.concatenate([pixels[1], pixels[2]], axis=1)
  bottom = np.concatenate([pixels[3], pixels[4]], axis=1)
  canvas = np.concatenate([top, bottom])
  whole = pixels[0].astype(int)
  halved = canvas.reshape(32, 2, 32, 2, 3).mean((1, 3))
  assert np.abs(whole - halved).mean() < 1  # the same picture, smaller


# Small enough that views are made thousands of times.
TINY = {
  "square": Square(16, patch=4, pool=2),
  "centre_crop": CentreCrop(18, 16, patch=4, pool=1),
  "pad_to_square": PadToSquare(16, patch=4, pool=1),
  "anyres": AnyRes(
    16, ((16, 32), (32, 16), (32, 32), (48, 16), (16, 48)), patch=4
  ),
  "idefics3": Idefics3(longest=48, tile=16, patch=4, pool=2),
  "idefics3_shrink": Idefics3(48, 16, patch=4, pool=2, scale="shrink"),
  "internvl": InternVL(16, max_tiles=6, patch=4, pool=2),
  "nanovlm": NanoVLM(48, 16, patch=4, pool=2),
  "native": Native(patch=4, merge=2, min_pixels=64, max_pixels=1600),
  "naflex": NaFlex(budget=64, patch=4),
  "budget": Budget(budget=20, patch=2, pool=3),
  "pan_and_scan": PanAndScan(16, min_crop=8, patch=4, pool=2),
  "molmo": Overlap(16, max_tiles=6, margins=(1, 1), patch=2, pool=2),
  "molmo2": Overlap(
    14, max_tiles=6, margins=(1, 1), patch=2, pool=2, fit="stretch",
    resample="bilinear_sampled",
  ),
}  # fmt: skip


def random_sizes(count, least, most):
  """Returns (height, width), powers of two of which are uniform."""
  exponents = np.random.default_rng(0).uniform(least, most, (count, 2))
  return np.round(2**exponents).astype(int).tolist()


@pytest.mark.parametrize("kind", TINY)
def test_the_plan_is_what_the_views_are(kind):
  """Of 2,000 sizes, patches and gathered features; of some, the views."""
  tiling = TINY[kind]
  patch = tiling.patch
  pool = getattr(tiling, "pool", getattr(tiling, "merge", 1))
  refused = 0
  for number, (height, width) in enumerate(random_sizes(2000, 0, 7)):
    try:
      plan = tiling.plan(height, width)
    except UserError:
      refused += 1
      continue
    assert plan.patches == (plan.view[0] // patch, plan.view[1] // patch)
    if kind == "anyres":
      assert len(tiling.sources(plan)) == plan.soft_tokens
    elif kind in ("molmo", "molmo2"):
      assert len(tiling.groups(plan)) == plan.soft_tokens
    else:  # the same number of tokens from each view
      each = (plan.patches[0] // pool) * (plan.patches[1] // pool)
      assert plan.views * each == plan.soft_tokens
    if number % 10 == 0:
      image = PIXELS[:height, :width]
      pixels = tiling.views(image, plan).pixels
      assert pixels.dtype == np.uint8
      assert pixels.shape == (plan.views, *plan.view, 3)
  # Lines, to Qwen; and crops that pan and scan would have nothing in.
  assert refused <= (200 if kind in ("native", "pan_and_scan") else 0)


@pytest.mark.parametrize("name", PRESETS)
def test_a_prompt_has_as_many_placeholders_as_there_are_features(name):
  it = PRESETS[name]
  for height, width in random_sizes(100, 3, 12):
    try:
      plan = it.plan(height, width)
    except UserError:
      continue
    pieces = it.pieces(plan)
    soft = sum(piece.count for piece in pieces if isinstance(piece, Soft))
    assert soft == plan.soft_tokens
    assert token_count(pieces) >= soft


@pytest.mark.parametrize("kind", TINY)
def test_empty_images_are_refused(kind):
  for size in ((0, 5), (5, 0)):
    with pytest.raises(UserError, match="at least one"):
      TINY[kind].plan(*size)


def test_a_plan_is_for_one_size():
  tiling = TINY["anyres"]
  with pytest.raises(UserError, match="upright"):
    tiling.views(np.zeros((8, 9, 3), np.uint8), tiling.plan(9, 8))


def test_qwen_refuses_a_line():
  assert Native().plan(1, 200).views == 1
  with pytest.raises(UserError, match="more than 200 times"):
    Native().plan(1, 201)


def test_a_crop_that_would_be_empty_is_refused():
  """9 in 4 crops of 3: the last one starts where the image ends."""
  with pytest.raises(UserError, match="last of 4 crops is empty"):
    PanAndScan(16, min_crop=1).plan(2, 9)


@pytest.mark.parametrize(
  "make, words",
  [
    (
      lambda: CentreCrop(224, 336),
      "shortest: found 224, expected at least 336",
    ),
    (lambda: AnyRes(canvases=((336, 500),)), "multiples of tile, 336"),
    (
      lambda: InternVL(min_tiles=3, max_tiles=2),
      "max_tiles: found 2, expected at least 3",
    ),
    (
      lambda: Native(min_pixels=5000, max_pixels=100),
      "max_pixels: found 100, expected at least 5,000",
    ),
    (lambda: Overlap(margins=(12, 12)), "larger than both margins"),
    (lambda: preset("llava"), "expected one of.*llava-1.5"),
  ],
)
def test_settings_that_make_no_sense(make, words):
  with pytest.raises(UserError, match=words):
    make()


def test_anyres_puts_the_map_together_again():
  """Tiles' features in order, unpadded: a map's own index finds its pixels."""
  tiling = TINY["anyres"]
  for size in ((20, 30), (30, 20), (9, 60), (60, 9), (17, 33)):
    plan = tiling.plan(*size)
    side = plan.patches[0]
    rows, columns = plan.rows * side, plan.columns * side
    canvas = np.arange(rows * columns).reshape(rows, columns)
    tiles = canvas.reshape(plan.rows, side, plan.columns, side).swapaxes(1, 2)
    # Features of the whole view are -2, of a row's end -1.
    features = np.concatenate(
      [np.full(side * side, -2), tiles.reshape(-1), [-1]]
    )
    found = features[tiling.sources(plan)]
    assert (found[: side * side] == -2).all()
    lines = found[side * side :].reshape(plan.grids[1][0], -1)
    assert (lines[:, -1] == -1).all()
    kept = lines[:, :-1]
    top = (rows - kept.shape[0]) // 2
    left = (columns - kept.shape[1]) // 2
    want = canvas[top : rows - top, left : columns - left]
    np.testing.assert_array_equal(kept, want)


def test_every_patch_of_molmo_s_canvas_counts_once():
  tiling = TINY["molmo"]
  plan = tiling.plan(40, 60)
  canvas = RNG.integers(0, 256, (*plan.canvas, 3), dtype=np.uint8)
  # An image of the canvas's size is not resized.
  plan = tiling.plan(*plan.canvas)
  views = tiling.views(canvas, plan)
  patches = np.stack([patchify(view, 2)[0] for view in views.pixels])
  flat = patches.reshape(-1, 2, 2, 3)
  groups = tiling.groups(plan)[math.prod(plan.grids[0]) :]
  assert (groups >= 0).all() and len(np.unique(groups)) == groups.size
  rows, columns = plan.grids[1]
  grid = flat[groups].reshape(rows, columns, 2, 2, 2, 2, 3)
  joined = grid.transpose(0, 2, 4, 1, 3, 5, 6).reshape(canvas.shape)
  np.testing.assert_array_equal(joined, canvas)


def test_patches_in_groups_and_back():
  view = RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8)
  for merge in (1, 2):
    patches, places = patchify(view, 2, merge)
    for patch, (row, column) in zip(patches, places, strict=True):
      y, x = 2 * row, 2 * column
      np.testing.assert_array_equal(patch, view[y : y + 2, x : x + 2])
  first = places[:4].tolist()
  assert first == [[0, 0], [0, 1], [1, 0], [1, 1]]
  with pytest.raises(UserError, match="multiples of 8"):
    patchify(view, 4, 2)
