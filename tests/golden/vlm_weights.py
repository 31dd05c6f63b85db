"""The weights of the tiny vision language models: drawn by name, not stored."""

import zlib

import numpy as np


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Returns the fp32 tensor that a file has under `name`."""
  generator = np.random.default_rng(zlib.crc32(name.encode()))
  value = generator.standard_normal(shape)
  if "norm" in name and name.endswith("weight") and len(shape) == 1:
    value = 1 + 0.2 * value
  elif name.endswith(("_min", "_max")):
    # Bounds of Gemma 4's products, which some of them reach.
    value = (1 + 0.2 * value) * (1 if name.endswith("_max") else -1)
  elif name.endswith("layer_scalar"):
    value = 1 + 0.2 * value
  elif name.endswith("bias") or not shape:
    value = 0.2 * value
  else:
    value = 0.3 * value
  return np.asarray(value, np.float32)
