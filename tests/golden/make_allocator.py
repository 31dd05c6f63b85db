"""Writes what PEFT's allocator for AdaLoRA leaves of drawn updates.

  .venv-peers/bin/python tests/golden/make_allocator.py [--to DIR]

allocator.json: `e` [steps, 2, r] of two matrices (5 in, 4 out and 4 in, 3 out)
after each step of plain gradient descent at rate 0.1. Values and gradients are
drawn, see `drawn`; `regular` is the mean distance of A and B from orthogonal,
at the end.
"""

import argparse
import json
import pathlib
import zlib

import numpy as np
import peft
import torch

RANK, STEPS, RATE = 4, 12, 0.1
SIZES = {"one": (5, 4), "two": (4, 3)}


def drawn(matrix: str, array: str, step: int) -> np.ndarray:
  """Returns values (step -1) or the gradient of a, b or e, rank first."""
  size_in, size_out = SIZES[matrix]
  shape = dict(a=(RANK, size_in), b=(RANK, size_out), e=(RANK,))[array]
  seed = zlib.crc32(f"{matrix}/{array}/{step}".encode())
  return np.random.default_rng(seed).standard_normal(shape)


class Two(torch.nn.Module):
  def __init__(self):
    super().__init__()
    for name, (size_in, size_out) in SIZES.items():
      setattr(self, name, torch.nn.Linear(size_in, size_out, bias=False))

  def forward(self, x):
    return self.two(self.one(x))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  here = pathlib.Path(__file__).parent
  parser.add_argument("--to", type=pathlib.Path, default=here)
  args = parser.parse_args()
  config = peft.AdaLoraConfig(
    init_r=RANK,
    target_r=2,
    tinit=2,
    tfinal=3,
    deltaT=2,
    total_step=STEPS,
    target_modules=list(SIZES),
  )
  model = peft.get_peft_model(Two(), config).double()
  layers = {name: getattr(model.base_model.model, name) for name in SIZES}

  def parts():
    for name, layer in layers.items():
      yield name, "a", layer.lora_A["default"]
      yield name, "b", layer.lora_B["default"]
      yield name, "e", layer.lora_E["default"]

  def theirs(name, array, step):
    x = drawn(name, array, step)
    x = x.T if array == "b" else x[:, None] if array == "e" else x
    return torch.from_numpy(np.ascontiguousarray(x))

  for name, array, p in parts():
    p.data.copy_(theirs(name, array, -1))
  rows = []
  for step in range(STEPS):
    for name, array, p in parts():
      p.grad = theirs(name, array, step)
      p.data -= RATE * p.grad
    model.base_model.update_and_allocate(step)
    e = {n: p.data[:, 0].tolist() for n, array, p in parts() if array == "e"}
    rows.append([e[name] for name in SIZES])
  off = []
  for _, array, p in parts():
    if array != "e":
      gram = p @ p.T if array == "a" else p.T @ p
      off.append(torch.norm(gram - torch.eye(RANK, dtype=p.dtype)).item())
  out = dict(e=rows, regular=float(np.mean(off)))
  (args.to / "allocator.json").write_text(json.dumps(out) + "\n")
  print(np.count_nonzero(np.array(rows), axis=(1, 2)), out["regular"])


if __name__ == "__main__":
  main()
