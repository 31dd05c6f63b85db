"""Writes what transformers says of a tiny SigLIP 2 with NaFlex.

  .venv-peers/bin/python tests/golden/make_siglip2.py [--to DIR]

A folder `vlm/siglip2` with config.json, tensors.json (see make_vlm.py) and
golden.npz. All is computed in fp64 and rounded:

  image_<i>         uint8 [H, W, 3]  of several shapes, in one batch
  grids             int32 [I, 2]     rows and columns of patches of each
  tokens            int32 [C, T]     texts
  hidden            fp32 [P, D]      last hidden state of all images' patches,
                                     one image after another, without padding
  image_embeds, text_embeds, logits_per_image
"""

import argparse
import pathlib
import sys
import tempfile

import numpy as np
import torch
from transformers.models.siglip2 import image_processing_pil_siglip2

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import make_models  # noqa: E402
import make_vlm  # noqa: E402
import vlm_inputs  # noqa: E402

FOLDER = pathlib.Path(__file__).parent / "vlm"
NAME, CLASS = "siglip2", "Siglip2Model"
VOCAB, PATCH, BUDGET = 67, 4, 24
SHAPES = ((24, 16), (5, 60), (30, 33), (70, 9), (6, 20))
"""Of the images, (height, width); the processor resizes all of them."""

CONFIG = dict(
  model_type=NAME,
  text_config=dict(
    vocab_size=VOCAB,
    hidden_size=24,
    intermediate_size=28,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=9,
    projection_size=24,
  ),
  vision_config=dict(
    hidden_size=24,
    intermediate_size=36,
    num_hidden_layers=3,
    num_attention_heads=3,
    patch_size=PATCH,
    num_patches=9,
  ),
)


def build(folder: pathlib.Path):
  """Returns transformers' model in fp64; see `make_vlm.build_from`."""
  return make_vlm.build_from(CONFIG, CLASS, folder)


def golden(model) -> dict[str, np.ndarray]:
  """Returns all arrays of a model; see the top of this file."""
  pictures, rng = vlm_inputs.images(SHAPES), np.random.default_rng(5)
  processor = image_processing_pil_siglip2.Siglip2ImageProcessorPil(
    patch_size=PATCH, max_num_patches=BUDGET
  )
  made = processor(images=pictures, return_tensors="pt")
  tokens = rng.integers(3, VOCAB, (4, 9))
  out = model(
    input_ids=torch.from_numpy(tokens),
    pixel_values=made["pixel_values"].double(),
    pixel_attention_mask=made["pixel_attention_mask"],
    spatial_shapes=made["spatial_shapes"],
  )
  hidden = out.vision_model_output.last_hidden_state
  grids = made["spatial_shapes"]
  assert len({tuple(grid) for grid in grids.tolist()}) == len(pictures)
  return {f"image_{i}": picture for i, picture in enumerate(pictures)} | dict(
    grids=grids,
    tokens=tokens,
    hidden=hidden[made["pixel_attention_mask"].bool()],
    image_embeds=out.image_embeds,
    text_embeds=out.text_embeds,
    logits_per_image=out.logits_per_image,
  )


def rounded(arrays: dict) -> dict[str, np.ndarray]:
  """Returns arrays as a golden file has them: fp32, int32, and uint8 images."""
  out = {k: np.asarray(v) for k, v in arrays.items()}
  for k, v in out.items():
    if not k.startswith("image_") or v.dtype.kind == "f":
      kind = np.float32 if v.dtype.kind == "f" else np.int32
      out[k] = v.astype(kind)
  return out


def make(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Writes the family's folder below `folder`; returns the arrays."""
  with tempfile.TemporaryDirectory() as made, torch.no_grad():
    files = pathlib.Path(made)
    model = build(files)
    with make_models.float64():
      arrays = rounded(golden(model))
    to = folder / NAME
    to.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "tensors.json"):
      (to / file).write_text((files / file).read_text())
  np.savez_compressed(to / "golden.npz", **arrays)
  return arrays


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--to", type=pathlib.Path, default=FOLDER)
  for k, v in make(parser.parse_args().to).items():
    print(k, v.shape, float(np.abs(v.astype(float)).max()))


if __name__ == "__main__":
  main()
