"""Vision language models against transformers, live: read, and written back."""

import make_models
import make_vlm
import numpy as np
import pytest
import support
import torch
import transformers

NAMES = [
  name
  for name, kind in make_vlm.CLASSES.items()
  if kind.endswith("ForConditionalGeneration")
]


@pytest.mark.parametrize("name", NAMES)
def test_read_and_written_back(name, heptad, tmp_path):
  theirs = make_vlm.build(name, tmp_path / "theirs")
  with torch.no_grad(), make_models.float64():
    want = make_vlm.generative(theirs, make_vlm.FAMILIES[name], name)
  rows = dict(
    pixels=want["pixels"],
    tokens=want["tokens"].astype(np.int32),
    counts=np.array([2, 1]),
    answer=np.array([-1, -1], np.int32),
  )
  if "answer" in want:
    rows["answer"] = want["answer"].argmax(-1).astype(np.int32)
  ours = tmp_path / "ours"
  got = heptad.bridge("vision", tmp_path / "theirs", adapter=ours, **rows)
  assert support.relative_error(got["features"], want["features"]) < 1e-5
  assert support.relative_error(got["logits"], want["logits"]) < 1e-5

  # transformers opens what we wrote, and computes the same.
  again = getattr(transformers, make_vlm.CLASSES[name]).from_pretrained(
    ours, dtype=torch.float32, attn_implementation="eager"
  )
  before, after = (
    {k: v.float().numpy() for k, v in m.state_dict().items()}
    for m in (theirs, again)
  )
  assert set(after) == set(before)
  for key, value in before.items():
    np.testing.assert_array_equal(after[key], value, err_msg=key)
