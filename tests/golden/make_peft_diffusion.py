"""Writes PEFT's adapters over the diffusion checkpoints, by their own names.

  .venv-peers/bin/python tests/golden/make_peft_diffusion.py [--to DIR]

PEFT finds modules by their names alone. So a checkpoint's matrices are put into
modules that are called what its tensors are: what PEFT then adapts, saves and
merges is what it would in the model's own code. Each folder is an adapter as
PEFT saves it, with merged.npz beside it: the adapted weights after
`merge_and_unload`, fp32, under the checkpoint's names.
"""

import argparse
import pathlib
import sys
import zlib

import numpy as np
import peft
import safetensors.numpy
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import make_peft  # noqa: E402

HERE = pathlib.Path(__file__).parent
TO, BASES = HERE / "diffusion_peft", HERE / "diffusion"
CASES = {
  "llada_attention": ("llada", ["q_proj", "v_proj", "attn_out"]),
  # The head is called ff_out, too.
  "llada_all": (
    "llada",
    [
      *("q_proj", "k_proj", "v_proj", "attn_out"),
      *("ff_proj", "up_proj", "ff_out"),
    ],
  ),
  "dream": ("dream", ["q_proj", "o_proj", "down_proj"]),
  "llada_moe": ("llada_moe", ["k_proj", "o_proj"]),
  "llada2": ("llada2", ["dense"]),
}


def skeleton(tensors: dict[str, np.ndarray]) -> torch.nn.Module:
  """Returns modules under the names of a checkpoint's matrices."""
  root = torch.nn.Module()
  root.config = {"model_type": "custom"}
  for name, x in tensors.items():
    if x.ndim != 2 or not name.endswith(".weight"):
      continue
    *above, last = name.removesuffix(".weight").split(".")
    at = root
    for part in above:
      if not hasattr(at, part):
        at.add_module(part, torch.nn.Module())
      at = getattr(at, part)
    if last in ("wte", "embed_tokens", "word_embeddings"):
      module = torch.nn.Embedding(*x.shape)
    else:
      module = torch.nn.Linear(*x.shape[::-1], bias=False)
    module.weight.data = torch.from_numpy(x.astype(np.float32))
    at.add_module(last, module)
  return root


def make(name: str, to: pathlib.Path = TO) -> dict[str, np.ndarray]:
  """Writes one adapter's folder; returns merged weights."""
  base, targets = CASES[name]
  tensors = safetensors.numpy.load_file(BASES / base / "model.safetensors")
  config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=targets)
  wrapped = peft.get_peft_model(skeleton(tensors), config)
  for key, value in wrapped.named_parameters():
    if "lora_" in key:
      generator = np.random.default_rng([zlib.crc32(f"{name}/{key}".encode())])
      drawn = 0.2 * generator.standard_normal(tuple(value.shape))
      value.data = torch.from_numpy(drawn.astype(np.float32))
  folder = to / name
  wrapped.save_pretrained(folder)
  make_peft.settle(folder, f"../../diffusion/{base}")
  adapted = {
    key.removeprefix("base_model.model.").partition(".lora_")[0]
    for key, _ in wrapped.named_parameters()
    if "lora_" in key
  }
  state = wrapped.merge_and_unload().state_dict()
  merged = {f"{m}.weight": state[f"{m}.weight"].numpy() for m in adapted}
  merged = dict(sorted(merged.items()))
  np.savez_compressed(folder / "merged.npz", **merged)
  return merged


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--to", type=pathlib.Path, default=TO)
  args = parser.parse_args()
  for name in CASES:
    print(f"{name}: {len(make(name, args.to))} modules")


if __name__ == "__main__":
  main()
