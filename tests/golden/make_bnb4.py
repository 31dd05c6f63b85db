"""Writes bnb4.json: what bitsandbytes makes of small matrices in 4 bits.

  .venv-peers/bin/python tests/golden/make_bnb4.py

Element t (C order) of torch's [out, in] matrix is
sin(0.7 t + 0.3) (0.5 + (37 t mod 101) / 101), rounded to the dtype. Tensors are
hexadecimal bytes; `dense` is the decoded matrix in float32.
"""

import json
import pathlib

import numpy as np
import torch
from bitsandbytes import functional

CASES = [  # out, in, kind, two levels, block, dtype
  (4, 64, "nf4", True, 64, "float32"),
  (4, 64, "fp4", True, 64, "float32"),
  (24, 128, "nf4", False, 32, "float32"),
  (5, 7, "nf4", True, 64, "float32"),
  (5, 7, "fp4", False, 64, "float32"),
  (33, 45, "nf4", False, 64, "bfloat16"),
  (12, 192, "nf4", True, 64, "bfloat16"),
  (300, 70, "nf4", True, 64, "float32"),
]


def matrix(outputs, inputs, dtype):
  t = np.arange(outputs * inputs, dtype=np.float64)
  x = np.sin(0.7 * t + 0.3) * (0.5 + (37 * t % 101) / 101)
  x = torch.tensor(x.astype(np.float32).reshape(outputs, inputs))
  return x.to(getattr(torch, dtype))


def case(outputs, inputs, kind, double, block, dtype):
  packed, state = functional.quantize_4bit(
    matrix(outputs, inputs, dtype),
    blocksize=block,
    quant_type=kind,
    compress_statistics=double,
  )
  tensors = {"weight": packed}
  for name, x in state.as_dict(packed=True).items():
    tensors[f"weight.{name}"] = x
  tables = ("weight.quant_map", "weight.nested_quant_map")
  dense = functional.dequantize_4bit(packed, state).float()
  return {
    "case": [outputs, inputs, kind, double, block, dtype],
    "tensors": {
      name: [str(x.dtype).removeprefix("torch."), x.numpy().tobytes().hex()]
      for name, x in tensors.items()
      if name not in tables or inputs == 64
    },
    "dense": np.ascontiguousarray(dense.numpy()).tobytes().hex()
    if outputs < 100
    else None,
  }


def make():
  """Returns what the file holds."""
  return [case(*c) for c in CASES]


if __name__ == "__main__":
  path = pathlib.Path(__file__).with_name("bnb4.json")
  path.write_text(json.dumps(make(), indent=0) + "\n")
