"""Folders of `golden/vlm`: tiny models as transformers 5 computes them."""

import functools
import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from kernels_pallas.masks import Mask
from research.nn import logits
from research.vlm import splice
from research.vlm.encoders import vit

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


@functools.cache
def generated(name):
  """Returns the arrays of make_vlm_generated.py."""
  with np.load(GOLDEN / "vlm" / name / "generated.npz") as file:
    return dict(file)


def assert_close(found, expected, tolerance=1e-5):
  """Products of fp32, a few layers of them: 1e-5 of the largest value."""
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found / scale, expected / scale, atol=tolerance)


def patches(pixels, side):
  """Returns patches, their coordinates, and the grid, of normalised views."""
  x = vit.patchify(jnp.asarray(pixels).transpose(0, 2, 3, 1), side)
  rows = pixels.shape[2] // side
  at = jnp.broadcast_to(vit.grid_coordinates(rows, rows), (*x.shape[:2], 2))
  return x, at, (rows, rows)


def soft_tokens(model, params, golden):
  """Returns what the connector makes of a golden's views, scaled."""
  x, at, grid = patches(golden["pixels"], model.vision.patch)
  return model.connect(params, model.encode_patches(params, x, at), grid)


def logits_with_images(model, params, golden):
  """Returns the logits of a golden's rows: the first sees two of its views."""
  soft = soft_tokens(model, params, golden)
  count = soft.shape[1]
  padding = jnp.zeros((count, soft.shape[2]))
  rows = jnp.stack(
    [soft[:2].reshape(2 * count, -1), jnp.concatenate([soft[2], padding])]
  )
  language = splice.with_features(params["language"], rows, model.image_token)
  tokens = jnp.asarray(golden["tokens"])
  mask = model.mask(tokens, jnp.full(2, tokens.shape[1])) or Mask.causal()
  if "answer" in golden:  # PaliGemma's, which was given as well
    mask = Mask.prefix_lm(jnp.argmax(golden["answer"], axis=-1))
  return logits(model.language, language, tokens, None, mask)
