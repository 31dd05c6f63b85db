"""Folders of `golden/vlm`: tiny models as transformers 5 computes them."""

import functools
import json
import pathlib
import sys

import numpy as np
import safetensors.numpy

GOLDEN = pathlib.Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
import vlm_weights  # noqa: E402


def tensors(name):
  """Returns the tensors of the family's file, by name."""
  shapes = json.loads((GOLDEN / "vlm" / name / "tensors.json").read_text())
  return {k: vlm_weights.draw(k, tuple(s)) for k, s in shapes.items()}


def config(name):
  """Returns its config.json, as transformers wrote it."""
  return json.loads((GOLDEN / "vlm" / name / "config.json").read_text())


def write(folder, name, arrays=None, values=None):
  """Writes a directory; by default that of the goldens."""
  values = config(name) if values is None else values
  arrays = tensors(name) if arrays is None else arrays
  (folder / "config.json").write_text(json.dumps(values))
  safetensors.numpy.save_file(arrays, folder / "model.safetensors")


@functools.cache
def golden(name):
  """Returns the arrays that transformers computed."""
  with np.load(GOLDEN / "vlm" / name / "golden.npz") as file:
    return dict(file)


def assert_close(found, expected, tolerance=1e-5):
  """Products of fp32, a few layers of them: 1e-5 of the largest value."""
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found / scale, expected / scale, atol=tolerance)
