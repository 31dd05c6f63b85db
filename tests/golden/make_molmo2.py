"""Writes what transformers says of a tiny Molmo 2.

  .venv-peers/bin/python tests/golden/make_molmo2.py [--to DIR]

A folder `vlm/molmo2` with config.json, tensors.json (see make_vlm.py) and
golden.npz, whose arrays are those of make_qwen_vl.py without positions, and

  groups      int32 [P, 4]    the patches that each soft token pools, numbered
                              over all images' views; -1 for none
"""

import argparse
import functools
import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import make_models  # noqa: E402
import make_qwen_vl  # noqa: E402
import make_siglip2  # noqa: E402
import make_vlm  # noqa: E402
import vlm_inputs  # noqa: E402

FOLDER = pathlib.Path(__file__).parent / "vlm"
NAME, CLASS = "molmo2", "Molmo2ForConditionalGeneration"
VOCAB, EXTRA, PATCH, NEW = 64, 8, 4, 6
START, END, IMAGE, COLUMN, LOW = 64, 65, 66, 67, 68
SHAPES = ((20, 47), (31, 18), (9, 9))
"""Of the images, (height, width)."""

PROCESSOR = dict(
  size={"height": 20, "width": 20},
  max_crops=4,
  overlap_margins=[1, 1],
  patch_size=PATCH,
  pooling_size=[2, 2],
)
"""Views of 5 x 5 patches, of which 3 x 3 are a tile's own: as with 27, groups
of 2 x 2 reach over tiles."""

CONFIG = dict(
  model_type=NAME,
  text_config=dict(
    vocab_size=VOCAB,
    additional_vocab_size=EXTRA,
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    rope_parameters=dict(rope_type="default", rope_theta=10_000.0),
  ),
  vision_config=dict(
    hidden_size=24,
    intermediate_size=36,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=3,
    head_dim=8,
    image_size=[20, 20],
    patch_size=PATCH,
  ),
  adapter_config=dict(
    vision_feature_layer=[2, 0],
    hidden_size=24,
    num_attention_heads=3,
    num_key_value_heads=3,
    head_dim=8,
    intermediate_size=28,
    text_hidden_size=32,
  ),
  image_start_token_id=START,
  image_end_token_id=END,
  image_patch_id=IMAGE,
  image_col_id=COLUMN,
  low_res_image_start_token_id=LOW,
  image_low_res_id=69,
  frame_start_token_id=70,
  frame_end_token_id=71,
)


def build(folder: pathlib.Path):
  """Returns transformers' model in fp64; see `make_vlm.build_from`."""
  return make_vlm.build_from(CONFIG, CLASS, folder)


def images() -> list[np.ndarray]:
  """Returns the images, uint8 [H, W, 3].

  Their seeds are such that torch, which sums in another order where an image is
  small, rounds no pixel to another level than it does in large ones.
  """
  return [
    vlm_inputs.images([shape], seed=9 + i)[0] for i, shape in enumerate(SHAPES)
  ]


@functools.cache
def processed(own: tuple[int, ...]) -> dict[str, torch.Tensor]:
  """Returns what the published processor makes of some of the images.

  To be called before `make_models.float64`, in which torchvision would resize
  in double precision.
  """
  pictures = images()
  processor = transformers.Molmo2ImageProcessor(**PROCESSOR)
  made = processor(images=[pictures[i] for i in own], return_tensors="pt")
  return dict(made) | dict(pixel_values=made["pixel_values"].double())


def image_ids(grid) -> list[int]:
  """Returns the tokens of an image, as Molmo2Processor writes them."""
  low_rows, low_columns, rows, columns = map(int, grid)
  low = [LOW, *([IMAGE] * low_columns + [COLUMN]) * low_rows, END]
  return [*low, START, *([IMAGE] * columns + [COLUMN]) * rows, END]


ALL = (0, 1, 2)


def golden(model) -> dict[str, np.ndarray]:
  """Returns all arrays of a model; see the top of this file."""
  pictures, every = images(), processed(ALL)
  image_tokens = [image_ids(grid) for grid in every["image_grids"]]
  tokens, lengths = vlm_inputs.rows(image_tokens, VOCAB)
  given = {
    k: every[k] for k in ("pixel_values", "image_token_pooling", "image_grids")
  }
  found = model.get_image_features(**given, return_dict=True)
  out = {f"image_{i}": picture for i, picture in enumerate(pictures)}
  out |= dict(
    grids=every["image_grids"],
    groups=every["image_token_pooling"],
    tokens=tokens,
    lengths=lengths,
    features=torch.cat(list(found.pooler_output)),
  )
  made = dict(
    logits=np.zeros((2, tokens.shape[1], VOCAB)),
    generated=np.zeros((2, NEW)),
    margin=np.zeros((2, NEW)),
  )
  for i, own in enumerate(vlm_inputs.IMAGES_OF):
    ids = torch.from_numpy(tokens[i : i + 1, : lengths[i]])
    given = dict(processed(own))
    given.pop("image_num_crops")
    # All tokens of images, those around them included.
    given |= dict(input_ids=ids, mm_token_type_ids=(ids >= VOCAB).int())
    made["logits"][i, : lengths[i]] = model(**given).logits[0]
    new, margin = make_qwen_vl.greedy(model, given)
    made["generated"][i], made["margin"][i] = new, margin
  assert made["margin"].min() > 1e-3
  return out | made


def make(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Writes the family's folder below `folder`; returns the arrays."""
  with tempfile.TemporaryDirectory() as made, torch.no_grad():
    files = pathlib.Path(made)
    model = build(files)
    for own in (ALL, *vlm_inputs.IMAGES_OF):
      processed(own)
    with make_models.float64():
      arrays = make_siglip2.rounded(golden(model))
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
