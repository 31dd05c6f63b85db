"""Prompts' strings, as the papers and published processors write them."""

import dataclasses

from research.vlm.images.preprocessor import describe
from research.vlm.images.presets import PRESETS, preset
from research.vlm.images.prompts import Text, text_of, token_count
from research.vlm.images.tiling import Idefics3, NanoVLM, Overlap, PanAndScan


def tiny(name, tiling, height, width):
  """Returns an image's text with `*` as placeholder."""
  it = dataclasses.replace(preset(name), tiling=tiling)
  pieces = it.pieces(it.plan(height, width))
  return text_of(pieces, "*"), pieces


def test_smolvlm_tags_rows_and_columns():
  tiling = Idefics3(longest=32, tile=16, patch=4, pool=4)
  fake = "<fake_token_around_image>"
  text, pieces = tiny("smolvlm-256m", tiling, 32, 32)
  assert text == (
    f"{fake}<row_1_col_1>*{fake}<row_1_col_2>*\n"
    f"{fake}<row_2_col_1>*{fake}<row_2_col_2>*\n\n"
    f"{fake}<global-img>*{fake}"
  )
  assert token_count(pieces) == 2 * (2 * 3 + 1) + 1 + 3
  whole = dataclasses.replace(tiling, splitting="none")
  text, _ = tiny("smolvlm-256m", whole, 32, 32)
  assert text == f"{fake}<global-img>*{fake}"


def test_nanovlm_has_no_wrappers_and_the_whole_view_first():
  tiling = NanoVLM(longest=32, tile=16, patch=4, pool=4)
  text, _ = tiny("nanovlm-460m", tiling, 16, 32)
  assert text == "<|global_image|>*<row_1_col_1>*<row_1_col_2>*"
  alone = dataclasses.replace(tiling, scale="shrink")
  assert tiny("nanovlm-460m", alone, 9, 9)[0] == "<|global_image|>*"


def test_gemma3_introduces_its_crops():
  tiling = PanAndScan(16, min_crop=8, patch=4, pool=4)
  text, pieces = tiny("gemma3-pan-and-scan", tiling, 16, 32)
  view = "\n\n<start_of_image>*<end_of_image>\n\n"
  assert text == (
    f"Here is the original image {view} and here are some crops to help you "
    f"see better {view} {view}"
  )
  words = sum(isinstance(piece, Text) for piece in pieces)
  assert token_count(pieces) == 3 * 5
  assert token_count(pieces, lambda text: 10) == 3 * 5 + 10 * words
  assert tiny("gemma3-pan-and-scan", tiling, 16, 16)[0] == view


def test_molmo_ends_its_rows():
  tiling = Overlap(16, max_tiles=2, margins=(1, 1), patch=4, pool=2)
  text, _ = tiny("molmo", tiling, 16, 24)
  row, wide = "**<im_col>", "***<im_col>"
  assert text == (f"<im_start>{row}{row}<im_end><im_start>{wide}{wide}<im_end>")


def test_describe_adds_up_for_every_preset():
  for name, it in PRESETS.items():
    text = describe(it, 1080, 1920, name)
    plan = it.plan(1080, 1920)
    lines = dict(line.strip().split("  ", 1) for line in text.splitlines()[1:])
    assert text.startswith(name)
    assert lines["views"].strip().startswith(f"{plan.views} of ")
    sum_, soft = lines["soft tokens"].split(" = ")
    assert int(soft) == plan.soft_tokens
    # The sum as it is printed.
    terms = [term.replace("ends of rows", "") for term in sum_.split(" + ")]
    assert sum(eval(t.replace(" x ", "*")) for t in terms) == plan.soft_tokens  # noqa: S307, E501
    assert int(lines["total"]) == int(lines["wrapper tokens"]) + int(soft)


def test_describe_says_what_a_page_costs_smolvlm():
  text = describe(preset("smolvlm-256m"), 1080, 1920, "smolvlm-256m")
  assert "17 views" not in text
  assert "views           13 of 512 x 512, 3 x 4 tiles" in text
  assert "soft tokens     13 x 8 x 8 = 832" in text
