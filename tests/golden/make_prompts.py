"""Writes prompts.npz: the ids that published processors make of prompts.

  .venv-peers/bin/python tests/golden/make_prompts.py [--to FILE] [NAME ...]

Each processor of transformers is called with texts and photographs, none of
them a square, of scikit-learn and scikit-image; its tokenizer is one of
prompt_cases.py, its image processor has the published sizes. Of each family and
case:

  <family> <case>  int32 [T]     `input_ids`
  <family> labels <case>  int32 [T]  of a training row; -100 is not learned
  size <name>      int32 [2]     height and width of each photograph
"""

import argparse
import importlib
import pathlib
import sys

import numpy as np
import PIL.Image
import skimage.data
import sklearn.datasets
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import make_images  # noqa: E402
import prompt_cases  # noqa: E402
from prompt_cases import (  # noqa: E402
  CASES,
  CONVERSATIONS,
  FAMILIES,
  LEARNED,
  MARK,
)

FILE = pathlib.Path(__file__).parent / "prompts.npz"


def photographs() -> dict[str, np.ndarray]:
  """Returns photographs and parts of them, tall, wide and tiny."""
  china = sklearn.datasets.load_sample_image("china.jpg")
  coffee = skimage.data.coffee()
  return {
    "china": china,
    "astronaut": skimage.data.astronaut()[:, :300],
    "coffee": coffee[:337, :400],
    "wide": china[200:272],
    "tall": china[:, 300:352],
    "tiny": skimage.data.chelsea()[100:137, 100:123],
    "grey": skimage.data.camera()[:200, :300],
  }


def processor(name: str):
  """Returns transformers' processor, and further arguments of its calls."""
  family = FAMILIES[name]
  tokens = _named_tokens(name)
  words = transformers.PreTrainedTokenizerFast(
    tokenizer_object=prompt_cases.backend(family),
    bos_token=family.bos,
    eos_token=family.eos,
    pad_token=family.eos,
    extra_special_tokens=tokens,
  )
  config = {k: v for k, v in family.config.items() if k != "processor_class"}
  kind = family.config["processor_class"]
  made = make_images.processor(config)
  call = {}
  if name.startswith("gemma3"):
    # The processor's own defaults would come before the file's.
    call = {k: v for k, v in config.items() if "pan_and_scan" in k}
  more = _arguments(name, made)
  found = getattr(transformers, kind)(
    image_processor=made, tokenizer=words, chat_template=family.template, **more
  )
  return found, call


def _named_tokens(name: str) -> dict[str, str]:
  """Returns the tokens that a processor asks its tokenizer for."""
  if name.startswith("gemma3"):
    return dict(
      image_token="<image_soft_token>",  # noqa: S106
      boi_token="<start_of_image>",  # noqa: S106
      eoi_token="<end_of_image>",  # noqa: S106
    )
  return {
    "gemma4": dict(
      image_token="<|image|>", boi_token="<|image>", eoi_token="<image|>",  # noqa: S106
      audio_token="<|audio|>", boa_token="<|audio>", eoa_token="<audio|>",  # noqa: S106
    ),
    "internvl": dict(
      start_image_token="<img>", end_image_token="</img>",  # noqa: S106
      context_image_token="<IMG_CONTEXT>", video_token="<video>",  # noqa: S106
    ),
  }.get(name, {})  # fmt: skip


def _arguments(name: str, image_processor) -> dict:
  """Returns the arguments of a processor beside the two that all have."""
  name = name.split("_saved")[0].split("_letters")[0]
  side = dict(patch_size=14, num_additional_image_tokens=1,
              vision_feature_select_strategy="default")  # fmt: skip
  if name == "paligemma":
    image_processor.image_seq_length = 256
  if name == "smolvlm":
    # The package writes out a number of videos' frames, nothing of images'.
    module = "transformers.models.smolvlm.processing_smolvlm"
    importlib.import_module(module).num2words = str
  return {
    "llava": lambda: side,
    "llava_next": lambda: side,
    "smolvlm": lambda: dict(
      image_seq_len=64, video_processor=transformers.SmolVLMVideoProcessor()
    ),
    "gemma4": lambda: dict(
      feature_extractor=transformers.Gemma4AudioFeatureExtractor(),
      video_processor=transformers.Gemma4VideoProcessor(),
    ),
    "internvl": lambda: dict(
      video_processor=transformers.InternVLVideoProcessor()
    ),
    "qwen2_vl": lambda: dict(
      video_processor=transformers.Qwen2VLVideoProcessor()
    ),
    "qwen2_5_vl": lambda: dict(
      video_processor=transformers.Qwen2VLVideoProcessor()
    ),
    "qwen3_vl": lambda: dict(
      video_processor=transformers.Qwen3VLVideoProcessor()
    ),
    "molmo2": lambda: dict(
      video_processor=transformers.Molmo2VideoProcessor()
    ),
  }.get(name, dict)()  # fmt: skip


def _parts(message: dict, pictures) -> dict:
  """Returns a message of parts, with the images that it is next to have."""
  parts = []
  for number, text in enumerate(message["content"].split(MARK)):
    if number:
      parts.append({"type": "image", "image": next(pictures)})
    parts += [{"type": "text", "text": text}] if text else []
  return message | {"content": parts}


def make(names=FAMILIES) -> dict[str, np.ndarray]:
  """Returns all arrays of some families; see the top of this file."""
  found = photographs()
  pictures = {k: PIL.Image.fromarray(x) for k, x in found.items()}
  out = {f"size {k}": np.array(x.shape[:2], np.int32) for k, x in found.items()}
  for name in names:
    family = FAMILIES[name]
    made, call = processor(name)
    for case, (text, keys) in CASES.items():
      if not keys and name.startswith("paligemma"):
        continue  # refused
      images = [pictures[k] for k in keys]
      more = dict(images=images, **call) if images else {}
      given = made(
        text=text.replace(MARK, family.mark), return_tensors="pt", **more
      )
      out[f"{name} {case}"] = given["input_ids"][0].numpy()
    for case, (said, keys) in CONVERSATIONS.items():
      if not keys and name.startswith("paligemma"):
        continue  # refused
      images = iter([pictures[k] for k in keys])
      given = made.apply_chat_template(
        [_parts(x, images) for x in prompt_cases.messages(said)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=call if keys else {},
      )
      out[f"{name} {case}"] = given["input_ids"][0].numpy()
    for case, (asked, answer) in LEARNED.items():
      if not name.startswith("paligemma"):
        continue  # its processor alone makes labels
      said, keys = CONVERSATIONS[asked]
      images = [pictures[k] for k in keys]
      left = iter(images)
      text = made.apply_chat_template(
        [_parts(x, left) for x in prompt_cases.messages(said)],
        add_generation_prompt=True,
      )
      given = made(text=text, images=images, suffix=answer, return_tensors="pt")
      out[f"{name} {case}"] = given["input_ids"][0].numpy()
      out[f"{name} labels {case}"] = given["labels"][0].numpy()
  return {k: v.astype(np.int32) for k, v in out.items()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("names", nargs="*", default=list(FAMILIES))
  parser.add_argument("--to", type=pathlib.Path, default=FILE)
  args = parser.parse_args()
  arrays = make(args.names)
  np.savez_compressed(args.to, **arrays)
  for name, ids in arrays.items():
    print(name, ids.shape, ids[:12].tolist())


if __name__ == "__main__":
  main()
