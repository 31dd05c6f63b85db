"""Writes hqq.json: what HQQ's own package makes of a small matrix.

  .venv-peers/bin/python tests/golden/make_hqq.py

Element t (C order) of torch's [out, in] = [16, 128] is
sin(0.7 t + 0.3) (0.5 + (37 t mod 101) / 101), rounded to float32. Groups of 64
run along the inputs. Codes are one hexadecimal digit each, in C order; scales
and zeros are hexadecimal bytes of float32.
"""

import json
import pathlib

import numpy as np
import torch
from hqq.core.quantize import Quantizer

SHAPE, GROUP = (16, 128), 64


def case(bits):
  t = np.arange(SHAPE[0] * SHAPE[1], dtype=np.float64)
  x = np.sin(0.7 * t + 0.3) * (0.5 + (37 * t % 101) / 101)
  codes, meta = Quantizer.quantize(
    torch.tensor(np.float32(x).reshape(SHAPE)),
    nbits=bits,
    group_size=GROUP,
    round_zero=bits == 4,  # as HQQLinear has it
    axis=1,
    bitpack=False,
    compute_dtype=torch.float32,
    device="cpu",
  )
  digits = codes.numpy().astype(int).ravel()
  return {
    "bits": bits,
    "codes": "".join(f"{code:x}" for code in digits),
    "scale": meta["scale"].numpy().tobytes().hex(),
    "zero": meta["zero"].numpy().tobytes().hex(),
  }


def make():
  """Returns what the file holds."""
  return [case(bits) for bits in (4, 3, 2)]


if __name__ == "__main__":
  path = pathlib.Path(__file__).with_name("hqq.json")
  path.write_text(json.dumps(make(), indent=1))
