"""Packed matrices of every kind that TPU kernels support, and their values."""

import functools

import jax.numpy as jnp
import numpy as np

from kernels_pallas.quantized_matmul import planar
from kernels_pallas.quantized_matmul.cpu import panels
from tests.kernels_pallas.panel_cases import NF4, Q4_0

KINDS = {  # codebook, dtype of codes, inputs, outputs, group, scale, offset
  "nf4": (NF4, "uint8", 192, 150, 64, "float32", None),
  "affine": (panels.AFFINE, "uint8", 300, 130, 32, "float16", "float16"),
  "signed": (Q4_0, "uint8", 260, 140, 128, "bfloat16", None),
  "wide groups": (panels.AFFINE, "uint8", 500, 100, 256, "float32", "float32"),
  "int8, channels": (panels.AFFINE, "int8", 200, 140, 200, "float32", None),
  "int8, groups": (panels.AFFINE, "int8", 256, 70, 16, "bfloat16", "float16"),
}


@functools.lru_cache
def case(kind, lead=()):
  """Returns (packed, its unpacked parts, its float64 matrix)."""
  codebook, dtype, inputs, outputs, group, scale, offset = KINDS[kind]
  rng = np.random.default_rng(0)
  shape = (*lead, inputs, outputs)
  if dtype == "uint8":
    codes = rng.integers(0, 16, shape, np.uint8)
    matrix = np.asarray(codebook)[codes]
  else:
    codes = rng.integers(-128, 128, shape, np.int8)
    matrix = codes.astype(np.float64)

  def part(name):
    if name is None:
      return None
    size = (*lead, -(-inputs // group), outputs)
    return rng.uniform(-0.2, 0.2, size).astype(jnp.dtype(name))

  parts = codes, part(scale), part(offset)
  # Rows of one scale, by plain indexing.
  own = np.arange(inputs) // group
  matrix = matrix * parts[1].astype(np.float64)[..., own, :]
  if offset is not None:
    matrix = matrix + parts[2].astype(np.float64)[..., own, :]
  w = planar.pack(*parts, group=group, codebook=codebook)
  return w, parts, matrix
