"""Images of no square, two in a row, through a cache: as transformers does.

Each family's own preprocessor makes the views: tiles, crops, or one.
"""

import shutil

import numpy as np
import pytest

from research.generation import generate
from research.interop import load
from research.vlm import data
from tests import support_golden

IMAGES_OF = ((0, 1), (2,))
"""Of each row of the goldens."""

NAMES = (
  "smolvlm",
  "gemma3",
  "internvl",
  "paligemma",
  "llava",
  "llava_full",
  "idefics3",
)
ONE_VIEW = ("paligemma", "llava", "llava_full")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.sample(2)
def test_tokens_after_images_of_no_square(name, tmp_path):
  golden = support_golden.generated(name)
  support_golden.write(tmp_path, name)
  file = "preprocessor_config.json"
  shutil.copy(support_golden.GOLDEN / "vlm" / name / file, tmp_path / file)
  it = load.load_model(tmp_path, towers="all")
  images = [[golden[f"image_{i}"] for i in own] for own in IMAGES_OF]
  most = max(
    sum(it.preprocessor.plan(*image.shape[:2]).views for image in own)
    for own in images
  )
  assert (most > 2) == (name not in ONE_VIEW)
  prompts = [data.Prompt.from_images(x, it.preprocessor, most) for x in images]
  params = it.model.with_images_compiled(
    it.params, data.batch_images(prompts, it.model.square)
  )
  soft = params["embed"].features / it.model.scale
  used = [x[: made.soft_tokens] for x, made in zip(soft, prompts, strict=True)]
  support_golden.assert_close(np.concatenate(used), golden["features"])
  rows = [
    row[:n].tolist()
    for row, n in zip(golden["tokens"], golden["lengths"], strict=True)
  ]
  found = generate.generate(
    it.model.language,
    params,
    rows,
    golden["generated"].shape[1],
    source=it.model.token_source(),
  )
  assert found.tokens == golden["generated"].tolist()
