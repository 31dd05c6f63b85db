"""Writes what transformers says of two tiny Gemma 4 models.

  .venv-peers/bin/python tests/golden/make_gemma4.py [--to DIR] [NAME ...]

`gemma4_e2b` is shaped as E2B and E4B are: per-layer embeddings, layers that
borrow keys and values, wider feed-forwards there, an encoder whose products are
clipped. `gemma4_31b` is shaped as 31B: global layers without a projection of
values, local layers that read images both ways, standardised features.

For each a folder of `vlm/` with config.json, tensors.json (see make_vlm.py) and
golden.npz, whose arrays are those of make_qwen_vl.py without positions.
"""

import argparse
import pathlib
import sys
import tempfile

import numpy as np
import torch
from transformers.models.gemma4 import image_processing_pil_gemma4

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import make_models  # noqa: E402
import make_qwen_vl  # noqa: E402
import make_siglip2  # noqa: E402
import make_vlm  # noqa: E402
import vlm_inputs  # noqa: E402

FOLDER = pathlib.Path(__file__).parent / "vlm"
CLASS = "Gemma4ForConditionalGeneration"
VOCAB, IMAGE, START, END = 67, 60, 61, 62
PATCH, POOL, NEW = 4, 3, 6
SHAPES = ((24, 36), (36, 12), (12, 48))
"""Of the images, (height, width): 2 x 3, 3 x 1 and 1 x 4 soft tokens."""

_KINDS = {"L": "sliding_attention", "G": "full_attention"}


def _text(kinds, **more):
  return (
    dict(
      model_type="gemma4_text",
      vocab_size=VOCAB,
      vocab_size_per_layer_input=VOCAB,
      hidden_size=32,
      intermediate_size=20,
      num_hidden_layers=len(kinds),
      num_attention_heads=4,
      num_key_value_heads=2,
      head_dim=8,
      global_head_dim=16,
      layer_types=[_KINDS[kind] for kind in kinds],
      sliding_window=5,
      max_position_embeddings=128,
      pad_token_id=0,
      bos_token_id=2,
      eos_token_id=1,
    )
    | more
  )


def _config(text, **vision):
  return dict(
    model_type="gemma4",
    text_config=text,
    vision_config=dict(
      hidden_size=24,
      intermediate_size=28,
      num_hidden_layers=3,
      num_attention_heads=3,
      num_key_value_heads=3,
      head_dim=8,
      patch_size=PATCH,
      pooling_kernel_size=POOL,
      position_embedding_size=16,
    )
    | vision,
    audio_config=None,
    image_token_id=IMAGE,
    boi_token_id=START,
    eoi_token_id=END,
    video_token_id=63,
    audio_token_id=64,
    tie_word_embeddings=True,
  )


FAMILIES = {
  "gemma4_e2b": _config(
    _text(
      "LLGLGLLG",
      hidden_size_per_layer_input=6,
      num_kv_shared_layers=3,
      use_double_wide_mlp=True,
      final_logit_softcapping=3.0,
    ),
    use_clipped_linears=True,
  ),
  "gemma4_31b": _config(
    _text(
      "LLGLLG",
      hidden_size_per_layer_input=0,
      attention_k_eq_v=True,
      num_global_key_value_heads=1,
      use_bidirectional_attention="vision",
    ),
    standardize=True,
  ),
}


def build(name: str, folder: pathlib.Path):
  """Returns transformers' model in fp64; see `make_vlm.build_from`."""
  return make_vlm.build_from(FAMILIES[name], CLASS, folder)


def pixel_values(pictures) -> tuple[torch.Tensor, torch.Tensor]:
  """Returns what the published processor makes of images that fit."""
  processor = image_processing_pil_gemma4.Gemma4ImageProcessorPil(
    do_resize=False,
    patch_size=PATCH,
    pooling_kernel_size=POOL,
    max_soft_tokens=70,
  )
  made = processor(images=pictures, return_tensors="pt")
  return made["pixel_values"].double(), made["image_position_ids"]


def rows(counts) -> tuple[np.ndarray, np.ndarray]:
  """Returns `vlm_inputs.rows` of images with so many soft tokens."""
  image_tokens = [[START, *[IMAGE] * count, END] for count in counts]
  return vlm_inputs.rows(image_tokens, IMAGE)


def golden(model) -> dict[str, np.ndarray]:
  """Returns all arrays of a model; see the top of this file."""
  pictures = vlm_inputs.images(SHAPES)
  values, places = pixel_values(pictures)
  step = PATCH * POOL
  counts = [(h // step) * (w // step) for h, w in SHAPES]
  tokens, lengths = rows(counts)
  found = model.model.get_image_features(values, places, return_dict=True)
  out = {f"image_{i}": picture for i, picture in enumerate(pictures)}
  out |= dict(
    grids=np.array(SHAPES) // PATCH,
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
    given = dict(
      input_ids=ids,
      mm_token_type_ids=(ids == IMAGE).int(),
      pixel_values=values[list(own)],
      image_position_ids=places[list(own)],
    )
    made["logits"][i, : lengths[i]] = model(**given).logits[0]
    new, margin = make_qwen_vl.greedy(model, given)
    made["generated"][i], made["margin"][i] = new, margin
  assert IMAGE not in made["generated"]
  assert made["margin"].min() > 1e-3
  return out | made


def make(name: str, folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Writes a family's folder below `folder`; returns the arrays."""
  with tempfile.TemporaryDirectory() as made, torch.no_grad():
    files = pathlib.Path(made)
    model = build(name, files)
    with make_models.float64():
      arrays = make_siglip2.rounded(golden(model))
    to = folder / name
    to.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "tensors.json"):
      (to / file).write_text((files / file).read_text())
  np.savez_compressed(to / "golden.npz", **arrays)
  return arrays


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("names", nargs="*", default=list(FAMILIES))
  parser.add_argument("--to", type=pathlib.Path, default=FOLDER)
  args = parser.parse_args()
  for name in args.names or FAMILIES:
    for k, v in make(name, args.to).items():
      print(name, k, v.shape, float(np.abs(v.astype(float)).max()))


if __name__ == "__main__":
  main()
