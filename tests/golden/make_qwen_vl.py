"""Writes what transformers says of tiny Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

  .venv-peers/bin/python tests/golden/make_qwen_vl.py [--to DIR] [NAME ...]

For each a folder of `vlm/` with config.json, tensors.json (see make_vlm.py) and
golden.npz. All is computed in fp64 and rounded:

  image_<i>   uint8 [H, W, 3]       of several shapes, none a square
  grids       int32 [3, 2]          rows and columns of patches of each
  tokens      int32 [2, T]          row 0 has two images, row 1 one
  lengths     int32 [2]             tokens of each row that are not padding
  positions   int32 [2, T, 3]       `get_rope_index`, up to each row's length
  offsets     int32 [2]             its deltas
  features    fp32 [P, D]           soft tokens of all images, one after another
  deeper      fp32 [P, J, D]        Qwen3-VL's, for the first J layers
  logits      fp32 [2, T, V]        up to each row's length
  generated   int32 [2, 6]          greedily, each row alone, through the cache
  margin      fp32 [2, 6]           between the two likeliest tokens
  rope_*                            random rows for `get_rope_index`
"""

import argparse
import pathlib
import sys
import tempfile

import numpy as np
import torch
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import make_models  # noqa: E402
import make_vlm  # noqa: E402
import vlm_inputs  # noqa: E402

FOLDER = pathlib.Path(__file__).parent / "vlm"
VOCAB, IMAGE, START, END = 67, 60, 61, 62
PATCH, MERGE, NEW = 4, 2, 6
SHAPES = ((24, 16), (16, 40), (8, 32))
"""Of the images, (height, width): 6 x 4, 4 x 10 and 2 x 8 patches."""

CLIP = dict(
  image_mean=[0.48145466, 0.4578275, 0.40821073],
  image_std=[0.26862954, 0.26130258, 0.27577711],
)
HALF = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)


def _text(model_type, **more):
  return (
    dict(
      model_type=model_type,
      vocab_size=VOCAB,
      hidden_size=32,
      intermediate_size=44,
      num_hidden_layers=3,
      num_attention_heads=2,
      num_key_value_heads=1,
      max_position_embeddings=128,
      tie_word_embeddings=False,
      bos_token_id=1,
      eos_token_id=2,
    )
    | more
  )


def _vision(model_type, **more):
  return (
    dict(
      model_type=model_type,
      depth=3,
      num_heads=3,
      patch_size=PATCH,
      spatial_merge_size=MERGE,
      temporal_patch_size=2,
    )
    | more
  )


def _config(model_type, text, vision):
  return dict(
    model_type=model_type,
    text_config=text,
    vision_config=vision,
    image_token_id=IMAGE,
    video_token_id=63,
    vision_start_token_id=START,
    vision_end_token_id=END,
    tie_word_embeddings=False,
  )


_SECTIONS = dict(
  rope_type="default", rope_theta=10_000.0, mrope_section=[4, 2, 2]
)
FAMILIES = {
  "qwen2_vl": _config(
    "qwen2_vl",
    _text("qwen2_vl_text", rope_parameters=_SECTIONS),
    _vision("qwen2_vl_vision", embed_dim=24, hidden_size=32, mlp_ratio=2),
  ),
  "qwen2_5_vl": _config(
    "qwen2_5_vl",
    _text("qwen2_5_vl_text", rope_parameters=_SECTIONS),
    _vision(
      "qwen2_5_vl_vision",
      hidden_size=24,
      intermediate_size=28,
      out_hidden_size=32,
      window_size=16,
      fullatt_block_indexes=[1],
    ),
  ),
  "qwen3_vl": _config(
    "qwen3_vl",
    _text(
      "qwen3_vl_text",
      head_dim=16,
      rope_parameters=_SECTIONS | dict(mrope_interleaved=True),
    ),
    _vision(
      "qwen3_vl_vision",
      hidden_size=24,
      intermediate_size=28,
      out_hidden_size=32,
      num_position_embeddings=25,
      deepstack_visual_indexes=[0, 1],
    ),
  ),
}

CLASSES = {
  "qwen2_vl": "Qwen2VLForConditionalGeneration",
  "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
  "qwen3_vl": "Qwen3VLForConditionalGeneration",
}


def build(name: str, folder: pathlib.Path):
  """Returns transformers' model in fp64; see `make_vlm.build_from`."""
  return make_vlm.build_from(FAMILIES[name], CLASSES[name], folder)


def pixel_values(name: str, pictures) -> tuple[torch.Tensor, torch.Tensor]:
  """Returns what the published processor makes of images that fit."""
  processor = image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil(
    do_resize=False,
    patch_size=PATCH,
    merge_size=MERGE,
    **(HALF if name == "qwen3_vl" else CLIP),
  )
  made = processor(images=pictures, return_tensors="pt")
  return made["pixel_values"].double(), made["image_grid_thw"]


def rows(grids) -> tuple[np.ndarray, np.ndarray]:
  """Returns `vlm_inputs.rows` of images with grids of patches."""
  counts = [int(h * w) // MERGE**2 for _, h, w in grids.tolist()]
  image_tokens = [[START, *[IMAGE] * count, END] for count in counts]
  return vlm_inputs.rows(image_tokens, IMAGE)


def golden(model, name: str) -> dict[str, np.ndarray]:
  """Returns all arrays of a model; see the top of this file."""
  pictures = vlm_inputs.images(SHAPES)
  values, grids = pixel_values(name, pictures)
  tokens, lengths = rows(grids)
  found = model.model.get_image_features(values, grids, return_dict=True)
  out = {f"image_{i}": picture for i, picture in enumerate(pictures)}
  out |= dict(
    grids=grids[:, 1:],
    tokens=tokens,
    lengths=lengths,
    features=torch.cat(list(found.pooler_output)),
  )
  if name == "qwen3_vl":
    deeper = [torch.cat(list(x)) for x in found.deepstack_features]
    out["deeper"] = torch.stack(deeper, dim=1)
  size = tokens.shape[1]
  made = dict(
    positions=np.zeros((2, size, 3)),
    offsets=np.zeros(2),
    logits=np.zeros((2, size, VOCAB)),
    generated=np.zeros((2, NEW)),
    margin=np.zeros((2, NEW)),
  )
  ends = np.cumsum(grids.prod(-1).numpy())
  starts = ends - grids.prod(-1).numpy()
  for i, own in enumerate(vlm_inputs.IMAGES_OF):
    ids = torch.from_numpy(tokens[i : i + 1, : lengths[i]])
    given = dict(
      input_ids=ids,
      mm_token_type_ids=(ids == IMAGE).int(),
      image_grid_thw=grids[list(own)],
    )
    positions, delta = model.model.get_rope_index(**given)
    made["positions"][i, : lengths[i]] = positions[:, 0].T
    made["offsets"][i] = delta
    given["pixel_values"] = values[starts[own[0]] : ends[own[-1]]]
    logits = model(**given).logits
    made["logits"][i, : lengths[i]] = logits[0]
    new, margin = greedy(model, given)
    made["generated"][i], made["margin"][i] = new, margin
  assert IMAGE not in made["generated"]
  assert made["margin"].min() > 1e-3
  return out | made


def greedy(model, given) -> tuple[list[int], list[float]]:
  """Returns new tokens and their margins, by transformers' own `generate`."""
  made = model.generate(
    **given,
    max_new_tokens=NEW,
    do_sample=False,
    eos_token_id=None,
    return_dict_in_generate=True,
    output_logits=True,
  )
  new = made.sequences[0, given["input_ids"].shape[1] :].tolist()
  best = [x[0].topk(2).values for x in made.logits]
  return new, [float(x[0] - x[1]) for x in best]


def rope_rows(model) -> dict[str, np.ndarray]:
  """Returns `get_rope_index` of random rows of up to three images."""
  rng, count, size = np.random.default_rng(7), 8, 64
  tokens = np.full((count, size), -1)
  grids = np.zeros((count, 3, 2), np.int64)
  positions, offsets = np.zeros((count, size, 3)), np.zeros(count)
  for i in range(count):
    ids = rng.integers(3, IMAGE, rng.integers(1, 4)).tolist()
    own = rng.integers(1, 5, (i % 4, 2))
    for h, w in own:
      ids += [IMAGE] * (h * w)
      ids += rng.integers(3, IMAGE, rng.integers(1, 4)).tolist()
    ids = torch.tensor([ids])
    grid = np.pad(MERGE * own, ((0, 0), (1, 0)), constant_values=1)
    found, delta = model.model.get_rope_index(
      input_ids=ids,
      mm_token_type_ids=(ids == IMAGE).int(),
      image_grid_thw=torch.from_numpy(grid),
    )
    n = ids.shape[1]
    tokens[i, :n], positions[i, :n] = ids[0], found[:, 0].T
    grids[i, : len(own)], offsets[i] = own, delta
  return dict(
    rope_tokens=tokens,
    rope_grids=grids,
    rope_positions=positions,
    rope_offsets=offsets,
  )


def make(name: str, folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Writes a family's folder below `folder`; returns the arrays."""
  with tempfile.TemporaryDirectory() as made, torch.no_grad():
    files = pathlib.Path(made)
    model = build(name, files)
    with make_models.float64():
      arrays = golden(model, name)
      if name == "qwen2_vl":
        arrays |= rope_rows(model)
    to = folder / name
    to.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "tensors.json"):
      (to / file).write_text((files / file).read_text())
  arrays = {k: np.asarray(v) for k, v in arrays.items()}
  floats = ("features", "deeper", "logits", "margin")
  for k, v in arrays.items():
    if not k.startswith("image_"):
      arrays[k] = v.astype(np.float32 if k in floats else np.int32)
  np.savez_compressed(to / "golden.npz", **arrays)
  return arrays


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("names", nargs="*", default=list(FAMILIES))
  parser.add_argument("--to", type=pathlib.Path, default=FOLDER)
  args = parser.parse_args()
  for name in args.names or FAMILIES:
    for k, v in make(name, args.to).items():
      print(name, k, v.shape, float(np.abs(v).max()))


if __name__ == "__main__":
  main()
