"""Writes learned positions as transformers resizes them, to positions.npz.

  .venv-peers/bin/python tests/golden/make_positions.py

  table      fp32 [17, 6]       CLIP's: the class token, then a grid of 4 x 4
  <R>x<C>    fp32 [1 + R C, 6]  the same for images of R x C patches

All is computed in fp64 and rounded.
"""

import pathlib

import numpy as np
import torch
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

FILE = pathlib.Path(__file__).with_name("positions.npz")
PATCH = 8
GRIDS = (6, 6), (7, 3), (2, 9), (3, 3), (1, 5)


def main() -> None:
  config = CLIPVisionConfig(
    hidden_size=6, num_attention_heads=2, image_size=4 * PATCH, patch_size=PATCH
  )
  theirs = CLIPVisionEmbeddings(config).double()
  table = np.random.default_rng(7).normal(size=(17, 6)).astype(np.float32)
  theirs.position_embedding.weight.data = torch.from_numpy(table).double()
  out = {"table": table}
  for rows, columns in GRIDS:
    patches = torch.zeros(1, 1 + rows * columns, 6)
    with torch.no_grad():
      found = theirs.interpolate_pos_encoding(
        patches, rows * PATCH, columns * PATCH
      )
    out[f"{rows}x{columns}"] = found[0].numpy().astype(np.float32)
  np.savez_compressed(FILE, **out)


if __name__ == "__main__":
  main()
