"""Matrices in panels of every kind that the CPU supports, and their values."""

import functools

import jax.numpy as jnp
import numpy as np

from kernels_pallas.quantized_matmul.cpu import panels

NF4 = (
  -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343,
  -0.09105004, 0.0, 0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983,
  0.562617, 0.72295684, 1.0,
)  # fmt: skip

IQ4 = (
  *(-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0),
  *(1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0),
)
FP4 = (
  *(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
  *(-0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
)

Q4_0 = tuple(float(code - 8) for code in range(16))

KINDS = {  # codebook, dtype of codes, inputs, outputs, group, scale, offset
  "nf4": (NF4, "uint8", 128, 40, 64, "float32", None),
  "bytes": (IQ4, "uint8", 100, 33, 32, "float16", None),
  "halves": (FP4, "uint8", 128, 40, 16, "bfloat16", "float32"),
  "affine": (panels.AFFINE, "uint8", 96, 33, 32, "float16", "float16"),
  "signed": (Q4_0, "uint8", 100, 16, 32, "bfloat16", None),
  "small groups": (panels.AFFINE, "uint8", 36, 5, 8, "float16", "float32"),
  "int8": (panels.AFFINE, "int8", 64, 70, 32, "float16", None),
  "int8, affine": (panels.AFFINE, "int8", 30, 17, 12, "float32", "float16"),
  "bfloat16": (panels.AFFINE, "bfloat16", 45, 31, 45, None, None),
  "float32": (panels.AFFINE, "float32", 45, 31, 45, None, None),
}


def parts(kind, lead=()):
  """Returns random (codes, scale, offset) of a kind, and packing options."""
  codebook, dtype, inputs, outputs, group, scale, offset = KINDS[kind]
  rng = np.random.default_rng(0)
  if dtype == "uint8":
    codes = rng.integers(0, 16, (*lead, inputs, outputs), np.uint8)
  elif dtype == "int8":
    codes = rng.integers(-128, 128, (*lead, inputs, outputs), np.int8)
  else:
    codes = rng.standard_normal((*lead, inputs, outputs)).astype(dtype)
  shape = (*lead, -(-inputs // group), outputs)

  def part(name):
    if name is None:
      return None
    return rng.uniform(-0.2, 0.2, shape).astype(jnp.dtype(name))

  how = dict(codebook=codebook)
  if scale is not None:
    how["group"] = group
  return (codes, part(scale), part(offset)), how


def decoded(codes, scale, offset, codebook, group=None):
  """Returns the float64 matrix, entry by entry."""
  out = np.zeros(codes.shape)
  for i in range(codes.shape[0]):
    for o in range(codes.shape[1]):
      code = codes[i, o]
      value = codebook[code] if codes.dtype == np.uint8 else float(code)
      if scale is not None:
        value = np.float32(value) * np.float64(scale[i // group, o])
      if offset is not None:
        value += np.float64(offset[i // group, o])
      out[i, o] = value
  return out


@functools.lru_cache
def case(kind):
  """Returns (packed, its float64 matrix)."""
  arrays, how = parts(kind)
  return panels.pack(*arrays, **how), decoded(*arrays, **how)
