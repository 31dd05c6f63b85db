"""Writes llm_int8.json: what bitsandbytes computes with outliers, on a CPU.

  .venv-peers/bin/python tests/golden/make_llm_int8.py

Element t (C order) of torch's [out, in] = [12, 32] weight, and of activations
[5, 32], is sin(0.7 t + 0.3) (0.5 + (37 t mod 101) / 101) rounded to float16;
activations are 2.5 times that, and those of `OUTLIERS` as they say. Tensors are
hexadecimal bytes.
"""

import json
import pathlib

import numpy as np
import torch
from bitsandbytes import functional

OUTLIERS = {(2, 7): 9.0, (0, 7): -20.0, (4, 3): 6.0, (1, 12): -7.5}


def matrix(rows, columns, scale=1.0):
  t = np.arange(rows * columns, dtype=np.float64)
  x = scale * np.sin(0.7 * t + 0.3) * (0.5 + (37 * t % 101) / 101)
  return torch.tensor(np.float16(x).reshape(rows, columns))


def case(threshold):
  x, w = matrix(5, 32, 2.5), matrix(12, 32)
  for place, value in OUTLIERS.items():
    x[place] = value
  codes, scale, _ = functional.int8_vectorwise_quant(w)
  x_codes, x_scale, columns = functional.int8_vectorwise_quant(
    x, threshold=threshold
  )
  if columns is None:
    y = torch.ops.bitsandbytes.int8_scaled_mm(x_codes, codes, x_scale, scale)
  else:
    # The layer itself multiplies activations that are not rounded on a CPU.
    y, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
      x, x_codes, codes, x_scale, scale, columns
    )
  found = {
    "codes": codes,
    "scale": scale,
    "x_codes": x_codes,
    "x_scale": x_scale,
    "y": y.float(),
  }
  found = {name: a.numpy().tobytes().hex() for name, a in found.items()}
  columns = [] if columns is None else columns.tolist()
  return {"threshold": threshold, "columns": columns} | found


def make():
  """Returns what the file holds."""
  return [case(6.0), case(0.0)]


if __name__ == "__main__":
  path = pathlib.Path(__file__).with_name("llm_int8.json")
  path.write_text(json.dumps(make(), indent=1))
