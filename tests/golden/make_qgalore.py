"""Writes qgalore.json: what Q-GaLore's authors' code does to small matrices.

  pip install --no-deps --target DIR q-galore-torch==1.0
  PYTHONPATH=DIR .venv-peers/bin/python tests/golden/make_qgalore.py

Three matrices of gradients, over twelve steps: one of each shape whose
strongest direction hardly moves, and one that is another one in each step. Of
each step: the first vector of the new projector, and the gap after it. Of the
last projector: what it was and what four bits leave of it. And a weight in
eight bits, to nearest.
"""

import json
import pathlib

import numpy as np
import torch
from q_galore_torch import q_galore_adamw8bit, q_galore_projector

STEPS = 12


def gradient(kind, k):
  rng = np.random.default_rng([kind, k])
  shape = (8, 16) if kind % 2 else (16, 8)
  noise = rng.normal(size=shape)
  fixed = np.random.default_rng(kind)
  u, v = fixed.normal(size=shape[0]), fixed.normal(size=shape[1])
  if kind == 2:
    u, v = 4 * np.eye(shape[0])[k], 4 * np.eye(shape[1])[k % 8]
  return torch.tensor(np.outer(u, v) + 0.1 * noise).float()


def followed(kind):
  projector = q_galore_projector.GaLoreProjector(
    4,
    update_proj_gap=1,
    quant=True,
    group_size=16,
    n_bit=4,
    cos_threshold=0.4,
    gamma_proj=2,
    queue_size=2,
  )
  steps = []
  for k in range(STEPS):
    made, g = projector.svd_count, gradient(kind, k)
    small = projector.project(g, k)
    due = projector.svd_count > made
    # Ours counts a turned vector as the same; theirs would not.
    assert all(c > 0 or abs(c) < 0.3 for c in projector.queue)
    steps.append(
      dict(
        due=due,
        first=projector.past_ortho_vector.tolist(),
        gap=projector.update_proj_gap,
      )
    )
  side = "right" if g.shape[0] >= g.shape[1] else "left"
  whole = projector.get_orthogonal_matrix(g, 4, type=side)
  codes, scales, zeros, shape = projector._quantize(whole, 16, 4)
  left = (scales * (codes - zeros)).reshape(shape)
  return dict(
    steps=steps,
    projector=whole.tolist(),
    codes=codes.tolist(),
    quantized=left.tolist(),
    small_shape=list(small.shape),
  )


def weight():
  t = np.arange(6 * 8)
  w = torch.tensor(0.5 * np.sin(0.7 * t).reshape(6, 8)).float()
  make = q_galore_adamw8bit.AdamW8bit
  codes, scales, zeros = make._quantize(None, w, 16)
  left = make._dequantize(None, codes, torch.float32, 16, scales, zeros)
  return dict(
    w=w.tolist(),
    codes=codes.reshape(-1, 16).tolist(),
    scales=scales.tolist(),
    zeros=zeros.tolist(),
    left=left.tolist(),
  )


def main():
  out = dict(matrices=[followed(kind) for kind in range(3)], weight=weight())
  file = pathlib.Path(__file__).with_name("qgalore.json")
  file.write_text(json.dumps(out) + "\n")


if __name__ == "__main__":
  main()
