"""Writes what transformers says of tiny vision models of every family.

  .venv-peers/bin/python tests/golden/make_vlm.py [--to DIR] [NAME ...]

For each family a folder with config.json, tensors.json (name -> shape of each
tensor in the file that `save_pretrained` writes; the values are drawn by name,
see vlm_weights.py) and golden.npz. All is computed in fp64 and rounded:

  pixels     fp32 [V, 3, H, W]  normalised views
  tokens     int32 [B, T]       a contrastive model's texts, or a prompt
  hidden_<i> fp32 [V, N, D]     hidden states of the vision tower
  features   fp32 [V, S, D]     what the connector makes of them
  logits     fp32 [B, T, V]
  image_embeds, text_embeds, logits_per_image: of contrastive models
"""

import argparse
import json
import pathlib
import sys
import tempfile

import numpy as np
import safetensors.numpy
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import make_models  # noqa: E402
import vlm_weights  # noqa: E402

FOLDER = pathlib.Path(__file__).parent / "vlm"
VOCAB = 67
IMAGE = 60


def _text(model_type="llama", **more):
  return (
    dict(
      model_type=model_type,
      vocab_size=VOCAB,
      hidden_size=40,
      intermediate_size=44,
      num_hidden_layers=2,
      num_attention_heads=5,
      num_key_value_heads=1,
      head_dim=8,
      max_position_embeddings=128,
      tie_word_embeddings=False,
      pad_token_id=0,
      bos_token_id=1,
      eos_token_id=2,
    )
    | more
  )


def _clip_vision(**more):
  return (
    dict(
      model_type="clip_vision_model",
      hidden_size=24,
      intermediate_size=36,
      num_hidden_layers=3,
      num_attention_heads=3,
      image_size=28,
      patch_size=7,
      projection_dim=16,
    )
    | more
  )


def _siglip_vision(**more):
  return (
    dict(
      model_type="siglip_vision_model",
      hidden_size=24,
      intermediate_size=36,
      num_hidden_layers=3,
      num_attention_heads=3,
      image_size=32,
      patch_size=8,
    )
    | more
  )


FAMILIES = {
  "clip": dict(
    model_type="clip",
    projection_dim=16,
    text_config=dict(
      vocab_size=VOCAB,
      hidden_size=20,
      intermediate_size=28,
      num_hidden_layers=2,
      num_attention_heads=2,
      max_position_embeddings=9,
      projection_dim=16,
      eos_token_id=2,
      bos_token_id=1,
      pad_token_id=0,
    ),
    vision_config=_clip_vision(),
  ),
  "siglip": dict(
    model_type="siglip",
    text_config=dict(
      vocab_size=VOCAB,
      hidden_size=24,
      intermediate_size=28,
      num_hidden_layers=2,
      num_attention_heads=2,
      max_position_embeddings=9,
      projection_size=24,
    ),
    vision_config=_siglip_vision(),
  ),
  "llava": dict(
    model_type="llava",
    text_config=_text(),
    vision_config=_clip_vision(),
    image_token_index=IMAGE,
    vision_feature_layer=-2,
    vision_feature_select_strategy="default",
    projector_hidden_act="gelu",
    image_seq_length=16,
  ),
  "smolvlm": dict(
    model_type="smolvlm",
    text_config=_text(),
    vision_config=_siglip_vision(model_type="smolvlm_vision"),
    image_token_id=IMAGE,
    scale_factor=2,
    pad_token_id=0,
    tie_word_embeddings=False,
  ),
  "idefics3": dict(
    model_type="idefics3",
    text_config=_text(),
    vision_config=_siglip_vision(model_type="idefics3_vision"),
    image_token_id=IMAGE,
    scale_factor=2,
    pad_token_id=0,
    tie_word_embeddings=False,
  ),
  "paligemma": dict(
    model_type="paligemma",
    text_config=_text(
      "gemma", num_attention_heads=4, hidden_size=32, num_image_tokens=16
    ),
    vision_config=_siglip_vision(projection_dim=32),
    image_token_index=IMAGE,
    projection_dim=32,
    hidden_size=32,
  ),
  "internvl": dict(
    model_type="internvl",
    text_config=_text("qwen2"),
    vision_config=dict(
      model_type="internvl_vision",
      hidden_size=24,
      intermediate_size=36,
      num_hidden_layers=2,
      num_attention_heads=3,
      attention_bias=True,
      image_size=16,
      patch_size=4,
    ),
    image_token_id=IMAGE,
    image_seq_length=4,
    downsample_ratio=0.5,
    tie_word_embeddings=False,
  ),
}

FAMILIES["llava_full"] = FAMILIES["llava"] | dict(
  vision_feature_select_strategy="full", image_seq_length=17
)

# Its window is shorter than an image: no prompt is cut by it.
FAMILIES["paligemma2"] = FAMILIES["paligemma"] | dict(
  text_config=_text(
    "gemma2",
    num_attention_heads=4,
    hidden_size=32,
    num_hidden_layers=3,
    sliding_window=5,
    query_pre_attn_scalar=64,
    num_image_tokens=16,
  )
)

FAMILIES["gemma3"] = dict(
  model_type="gemma3",
  text_config=_text(
    "gemma3_text",
    num_attention_heads=4,
    hidden_size=32,
    num_hidden_layers=3,
    sliding_window=5,
    query_pre_attn_scalar=8,
    sliding_window_pattern=2,
    tie_word_embeddings=True,
  ),
  vision_config=_siglip_vision(vision_use_head=False),
  mm_tokens_per_image=4,
  image_token_index=IMAGE,
  boi_token_index=61,
  eoi_token_index=62,
)

CLASSES = {
  "clip": "CLIPModel",
  "siglip": "SiglipModel",
  "llava": "LlavaForConditionalGeneration",
  "llava_full": "LlavaForConditionalGeneration",
  "smolvlm": "SmolVLMForConditionalGeneration",
  "idefics3": "Idefics3ForConditionalGeneration",
  "paligemma": "PaliGemmaForConditionalGeneration",
  "paligemma2": "PaliGemmaForConditionalGeneration",
  "gemma3": "Gemma3ForConditionalGeneration",
  "internvl": "InternVLForConditionalGeneration",
}


def build(name: str, folder: pathlib.Path):
  """Returns transformers' model in fp64, from a file with drawn weights.

  Args:
    name: of a family.
    folder: gets config.json and model.safetensors.
  """
  return build_from(FAMILIES[name], CLASSES[name], folder)


def build_from(config: dict, name: str, folder: pathlib.Path):
  """Returns transformers' model in fp64, from a file with drawn weights.

  Args:
    config: of its config.json.
    name: of its class.
    folder: gets config.json and model.safetensors.
  """
  config = dict(config)
  kind = getattr(transformers, name)
  parsed = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
  parsed._attn_implementation = "eager"
  folder.mkdir(parents=True, exist_ok=True)
  kind(parsed).save_pretrained(folder)
  path = folder / "model.safetensors"
  shapes = {k: v.shape for k, v in safetensors.numpy.load_file(path).items()}
  tensors = {k: vlm_weights.draw(k, s) for k, s in shapes.items()}
  safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
  (folder / "tensors.json").write_text(
    json.dumps({k: list(s) for k, s in sorted(shapes.items())}, indent=0) + "\n"
  )
  model = kind.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  )
  return model.double().eval()


def pixels(config: dict, views: int) -> np.ndarray:
  """Returns normalised views, [V, 3, side, side]."""
  side = config["vision_config"]["image_size"]
  shape = views, 3, side, side
  return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def contrastive(model, config, views=None) -> dict[str, np.ndarray]:
  """Returns the goldens of a model with two towers.

  Args:
    model: of transformers.
    config: its row of `FAMILIES`.
    views: normalised ones, [V, 3, side, side]; None for those of `pixels`.
  """
  rng = np.random.default_rng(5)
  length = config["text_config"]["max_position_embeddings"]
  tokens = rng.integers(3, VOCAB, (3, length))
  for i, end in enumerate((length - 1, 4, 6)):
    tokens[i, end:] = 2
  views = pixels(config, 2) if views is None else views
  out = model(
    input_ids=torch.from_numpy(tokens),
    pixel_values=torch.from_numpy(views).double(),
    output_hidden_states=True,
  )
  vision = model.vision_model(
    torch.from_numpy(views).double(), output_hidden_states=True
  )
  return dict(
    pixels=views,
    tokens=tokens,
    image_embeds=out.image_embeds,
    text_embeds=out.text_embeds,
    logits_per_image=out.logits_per_image,
    **_hidden(vision.hidden_states),
  )


def _hidden(states) -> dict[str, torch.Tensor]:
  return {f"hidden_{i}": x for i, x in enumerate(states)}


def generative(model, config, name) -> dict[str, np.ndarray]:
  """Returns the goldens of a vision language model: two rows, three views.

  Row 0 has two images, row 1 one, and both have words between and after.
  """
  views, rng = pixels(config, 3), np.random.default_rng(5)
  inputs = torch.from_numpy(views).double()
  count = soft_tokens(config)
  length = 2 * count + 9
  tokens = rng.integers(3, IMAGE, (2, length))
  if name.startswith("paligemma"):
    tokens[0, : 2 * count] = IMAGE
    tokens[1, :count] = IMAGE
  else:
    tokens[0, 1 : 1 + count] = IMAGE
    tokens[0, count + 4 : 2 * count + 4] = IMAGE
    tokens[1, 5 : 5 + count] = IMAGE
  given = dict(input_ids=torch.from_numpy(tokens))
  if name in ("smolvlm", "idefics3"):
    padded = np.stack([views[:2], np.stack([views[2], 0 * views[2]])])
    given["pixel_values"] = torch.from_numpy(padded).double()
    features = model.get_image_features(given["pixel_values"])
  else:
    given["pixel_values"] = inputs
    features = model.get_image_features(pixel_values=inputs)
  if name.startswith("paligemma"):
    # 0 the prefix, which is seen both ways; 1 the answer.
    answer = np.zeros_like(tokens)
  if name == "paligemma2":
    # All is prefix: transformers cuts the answers of its local layers by the
    # window, and big_vision, which trained the published weights, nothing.
    given["token_type_ids"] = torch.from_numpy(answer)
  if name == "paligemma":
    answer[0, 2 * count + 4 :] = 1
    answer[1, count + 6 :] = 1
    given["token_type_ids"] = torch.from_numpy(answer)
    given["labels"] = given["input_ids"]
  if name == "gemma3":
    given["token_type_ids"] = (given["input_ids"] == IMAGE).long()
  given["attention_mask"] = torch.ones_like(given["input_ids"])
  logits = model(**given).logits
  features = getattr(features, "pooler_output", features)
  if isinstance(features, (list, tuple)):
    features = torch.cat(list(features))
  features = features.reshape(len(views), count, -1)
  out = dict(pixels=views, tokens=tokens, logits=logits, features=features)
  if name == "paligemma":
    out["answer"] = answer
  return out


def soft_tokens(config) -> int:
  """Returns how many tokens stand for a view."""
  vision = config["vision_config"]
  side = vision["image_size"] // vision["patch_size"]
  if "mm_tokens_per_image" in config:
    return config["mm_tokens_per_image"]
  shorter = round(1 / config.get("downsample_ratio", 1))
  extra = config.get("vision_feature_select_strategy") == "full"
  return (side // config.get("scale_factor", shorter)) ** 2 + extra


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("names", nargs="*", default=list(FAMILIES))
  parser.add_argument("--to", type=pathlib.Path, default=FOLDER)
  args = parser.parse_args()
  for name in args.names or FAMILIES:
    with tempfile.TemporaryDirectory() as made, torch.no_grad():
      folder = pathlib.Path(made)
      model = build(name, folder)
      with make_models.float64():
        if name in ("clip", "siglip"):
          arrays = contrastive(model, FAMILIES[name])
        else:
          arrays = generative(model, FAMILIES[name], name)
      to = args.to / name
      to.mkdir(parents=True, exist_ok=True)
      for file in ("config.json", "tensors.json"):
        (to / file).write_text((folder / file).read_text())
    arrays = {k: np.asarray(v) for k, v in arrays.items()}
    for k, v in arrays.items():
      kind = np.float32 if v.dtype.kind == "f" else np.int32
      arrays[k] = v.astype(kind)
      print(name, k, arrays[k].shape, float(np.abs(v).max()))
    np.savez_compressed(to / "golden.npz", **arrays)


if __name__ == "__main__":
  main()
