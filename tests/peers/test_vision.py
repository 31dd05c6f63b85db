"""Vision language models against transformers, live: read, and written back."""

import make_models
import make_qwen_vl
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

  assert_opened(make_vlm.CLASSES[name], ours, theirs)


def assert_opened(kind, folder, theirs):
  """transformers opens what we wrote, and has the same weights."""
  again = getattr(transformers, kind).from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  )
  before, after = (
    {k: v.float().numpy() for k, v in m.state_dict().items()}
    for m in (theirs, again)
  )
  assert set(after) == set(before)
  for key, value in before.items():
    np.testing.assert_array_equal(after[key], value, err_msg=key)
  return again


@pytest.mark.parametrize("name", make_qwen_vl.FAMILIES)
def test_native_resolution_read_and_written_back(name, heptad, tmp_path):
  """Images of three shapes in two rows; generated as transformers does."""
  theirs = make_qwen_vl.build(name, tmp_path / "theirs")
  with torch.no_grad(), make_models.float64():
    made = make_qwen_vl.golden(theirs, name)
  want = {k: np.asarray(v) for k, v in made.items()}
  ours = tmp_path / "ours"
  got = heptad.bridge(
    "native",
    tmp_path / "theirs",
    adapter=ours,
    **{k: v for k, v in want.items() if k.startswith("image_")},
    counts=np.array([2, 1]),
    tokens=want["tokens"].astype(np.int32),
    lengths=want["lengths"],
    steps=np.array(make_qwen_vl.NEW),
  )
  features = want["features"]
  if "deeper" in want:
    features = np.concatenate([features[:, None], want["deeper"]], axis=1)
  assert support.relative_error(got["features"], features) < 1e-5
  for i, n in enumerate(want["lengths"]):
    error = support.relative_error(got["logits"][i, :n], want["logits"][i, :n])
    assert error < 1e-5
  np.testing.assert_array_equal(got["generated"], want["generated"])
  again = assert_opened(make_qwen_vl.CLASSES[name], ours, theirs)
  # The weights are not all: what config.json says is theirs, too.
  with torch.no_grad(), make_models.float64():
    rows = make_qwen_vl.golden(again.double().eval(), name)
  assert support.relative_error(np.asarray(rows["logits"]), want["logits"]) < (
    1e-9
  )
