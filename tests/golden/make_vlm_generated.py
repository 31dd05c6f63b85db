"""Writes what transformers generates after images of no square, by families.

  .venv-peers/bin/python tests/golden/make_vlm_generated.py [--to DIR] [NAME]

The models are those of make_vlm.py. Each image goes through the family's own
processor, so that Idefics3, SmolVLM and InternVL see tiles and Gemma 3 crops.
For each a folder of `vlm/` gets preprocessor_config.json and generated.npz,
whose arrays are those of make_qwen_vl.py without positions and grids. All is
computed in fp64 and rounded.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import make_images  # noqa: E402
import make_models  # noqa: E402
import make_qwen_vl  # noqa: E402
import make_siglip2  # noqa: E402
import make_vlm  # noqa: E402
import vlm_inputs  # noqa: E402
from make_vlm import IMAGE, VOCAB  # noqa: E402

FOLDER, NEW = make_vlm.FOLDER, make_qwen_vl.NEW
SHAPES = ((30, 44), (41, 23), (12, 37))
"""Of the images, (height, width)."""

SEEDS = {"paligemma": 5}
"""Of images after which no placeholder is generated; else 3."""

_SPLIT = dict(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
DUAL = {
  "clip": make_images._config("CLIP", size={"shortest_edge": 28}, crop_size=28),
  "siglip": make_images._config("Siglip", size={"height": 32, "width": 32}),
}
"""Of models with two towers, which generate nothing."""
PROCESSORS = {
  **dict.fromkeys(
    ("llava", "llava_full"),
    make_images._config("CLIP", size={"shortest_edge": 28}, crop_size=28),
  ),
  "smolvlm": make_images._config("SmolVLM", **_SPLIT),
  "idefics3": make_images._config("Idefics3", **_SPLIT),
  "paligemma": make_images._config("Siglip", size={"height": 32, "width": 32}),
  "gemma3": make_images._config(
    "Gemma3", size={"height": 32, "width": 32}, do_pan_and_scan=True,
    pan_and_scan_min_crop_size=8, pan_and_scan_max_num_crops=4,
    pan_and_scan_min_ratio_to_activate=1.2,
  ),
  "internvl": make_images._config(
    "GotOcr2", size={"height": 16, "width": 16}, crop_to_patches=True,
    max_patches=4, **make_images.IMAGENET,
  ),
}  # fmt: skip

AROUND = {
  "smolvlm": ([63], [63]),
  "idefics3": ([63], [63]),
  "gemma3": ([61], [62]),
  "internvl": ([61], [62]),
}
"""Tokens before and behind the features of a view; of InternVL's, of an image.
Which tokens these are is the processors': see make_prompts.py."""


def views_of(config: dict, pictures) -> list[np.ndarray]:
  """Returns the views of each image, [V, 3, H, W], by a processor."""
  return [
    np.moveaxis(make_images.pixels_of(config, picture), -1, 1)
    for picture in pictures
  ]


def image_ids(name: str, views: int) -> list[int]:
  """Returns the tokens of an image."""
  count = make_vlm.soft_tokens(make_vlm.FAMILIES[name])
  before, after = AROUND.get(name, ([], []))
  if name == "internvl":
    return [*before, *[IMAGE] * count * views, *after]
  return [*before, *[IMAGE] * count, *after] * views


def inputs(name: str, ids: np.ndarray, views: np.ndarray) -> dict:
  """Returns the model's arguments for a row of tokens."""
  given = dict(
    input_ids=torch.from_numpy(ids)[None],
    pixel_values=torch.from_numpy(views).double(),
  )
  given["attention_mask"] = torch.ones_like(given["input_ids"])
  if name in ("smolvlm", "idefics3"):
    given["pixel_values"] = given["pixel_values"][None]
  if name == "gemma3":
    given["token_type_ids"] = (given["input_ids"] == IMAGE).long()
  if name == "paligemma":
    given["token_type_ids"] = torch.zeros_like(given["input_ids"])
  return given


def golden(model, name: str) -> dict[str, np.ndarray]:
  """Returns all arrays of a model; see the top of this file."""
  pictures = vlm_inputs.images(SHAPES, SEEDS.get(name, 3))
  views = views_of(PROCESSORS[name], pictures)
  tokens, lengths = vlm_inputs.rows(
    [image_ids(name, len(x)) for x in views], IMAGE
  )
  out = {f"image_{i}": picture for i, picture in enumerate(pictures)}
  out |= dict(tokens=tokens, lengths=lengths)
  made = dict(
    logits=np.zeros((2, tokens.shape[1], VOCAB)),
    generated=np.zeros((2, NEW), np.int32),
    margin=np.zeros((2, NEW)),
  )
  features = []
  for i, own in enumerate(vlm_inputs.IMAGES_OF):
    row = np.concatenate([views[j] for j in own])
    given = inputs(name, tokens[i, : lengths[i]], row)
    found = model.get_image_features(pixel_values=given["pixel_values"])
    found = getattr(found, "pooler_output", found)
    found = (
      torch.cat(list(found)) if isinstance(found, (list, tuple)) else found
    )
    features.append(found.reshape(-1, found.shape[-1]))
    made["logits"][i, : lengths[i]] = model(**given).logits[0]
    new, margin = make_qwen_vl.greedy(model, given)
    made["generated"][i], made["margin"][i] = new, margin
  out["features"] = torch.cat(features)
  assert IMAGE not in made["generated"]
  assert made["margin"].min() > 1e-3
  return out | made


def make(name: str, folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Writes a family's files below `folder`; returns the arrays."""
  with tempfile.TemporaryDirectory() as made, torch.no_grad():
    model = make_vlm.build(name, pathlib.Path(made))
    with make_models.float64():
      arrays = make_siglip2.rounded(golden(model, name))
  to = folder / name
  to.mkdir(parents=True, exist_ok=True)
  text = json.dumps(PROCESSORS[name], indent=1) + "\n"
  (to / "preprocessor_config.json").write_text(text)
  np.savez_compressed(to / "generated.npz", **arrays)
  return arrays


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("names", nargs="*", default=list(PROCESSORS))
  parser.add_argument("--to", type=pathlib.Path, default=FOLDER)
  args = parser.parse_args()
  for name in args.names or PROCESSORS:
    for k, v in make(name, args.to).items():
      print(name, k, v.shape, float(np.abs(v.astype(float)).max()))


if __name__ == "__main__":
  main()
