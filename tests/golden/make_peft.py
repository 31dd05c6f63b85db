"""Writes PEFT LoRA adapters over the tiny llama and what PEFT says of them.

  .venv-peers/bin/python tests/golden/make_peft.py [--to DIR] [NAME ...]

Each folder is an adapter as PEFT saves it, with golden.npz beside it:

  tokens         int32 [2, T]    no padding
  logits         fp32 [2, T, V]  with the adapter, unmerged
  merged_logits  fp32 [2, T, V]  after `merge_and_unload`
  base_logits    fp32 [2, T, V]  without it
  loss           fp32            mean over the 2 (T - 1) predicted tokens
  grad/<key>     fp32            d loss / d A and B under the file's own keys

All computed in fp64 and rounded. B is drawn from N(0, 0.02^2): at PEFT's own
B = 0 the gradient of A is exactly zero and would prove nothing.
"""

import argparse
import json
import pathlib
import sys
import zlib

import numpy as np
import peft
import safetensors.numpy
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import families  # noqa: E402
import make_models  # noqa: E402

BASE = "llama"
SETS = (
  *("target_modules", "modules_to_save", "exclude_modules"),
  "feedforward_modules",
)
"""Fields that are sets in PEFT: their order would differ from run to run."""

ALL_LINEAR = [
  "q_proj",
  "k_proj",
  "v_proj",
  "o_proj",
  "gate_proj",
  "up_proj",
  "down_proj",
]
ADAPTERS = {
  "peft_lora": dict(target_modules=ALL_LINEAR),
  "peft_rslora": dict(target_modules=ALL_LINEAR, use_rslora=True),
  # Anchored, disjoint patterns: PEFT sorts them on saving, so overlapping
  # ones could mean something else after a round trip.
  "peft_patterns": dict(
    target_modules=["q_proj", "v_proj", "down_proj"],
    rank_pattern={
      r"^model\.layers\.0\.self_attn\.q_proj": 2,
      r"^model\.layers\.2\.mlp\.down_proj": 6,
    },
    alpha_pattern={r"^model\.layers\.1\.self_attn\.v_proj": 3},
  ),
}


def wrap(model, name: str, **options):
  """Returns PEFT's model with drawn A and B (independent of torch's RNG)."""
  config = peft.LoraConfig(
    r=4,
    lora_alpha=12,
    lora_dropout=0.0,
    task_type="CAUSAL_LM",
    init_lora_weights="gaussian",
    **options,
  )
  wrapped = peft.get_peft_model(model, config)
  for key, value in wrapped.named_parameters():
    if "lora_" not in key:
      continue
    generator = np.random.default_rng([zlib.crc32(f"{name}/{key}".encode())])
    std = 0.25 if "lora_A" in key else 0.02
    drawn = std * generator.standard_normal(tuple(value.shape))
    # Rounded to what the file will hold, also for the run in fp64.
    value.data = torch.from_numpy(drawn.astype(np.float32)).to(value.dtype)
  return wrapped


def tokens(length: int = 24) -> np.ndarray:
  """Returns int32 [2, length] tokens."""
  generator = np.random.default_rng(11)
  return generator.integers(3, families.VOCAB, (2, length)).astype(np.int32)


def loss_and_logits(model, rows: np.ndarray):
  """Returns (mean next-token loss, logits [B, T, V]) as tensors."""
  ids = torch.from_numpy(rows).long()
  logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
  flat = logits[:, :-1].reshape(-1, logits.shape[-1])
  loss = torch.nn.functional.cross_entropy(flat, ids[:, 1:].reshape(-1))
  return loss, logits


def file_key(key: str) -> str:
  """Returns the name in adapter_model.safetensors of a live parameter."""
  return key.replace(".default.", ".")


def golden(model) -> dict[str, np.ndarray]:
  """Returns the arrays of golden.npz of a wrapped model; merges it."""
  rows = tokens()
  with torch.no_grad(), model.disable_adapter():
    base = loss_and_logits(model, rows)[1]
  loss, logits = loss_and_logits(model, rows)
  loss.backward()
  out = {
    f"grad/{file_key(k)}": v.grad
    for k, v in model.named_parameters()
    if "lora_" in k
  }
  with torch.no_grad():
    merged = loss_and_logits(model.merge_and_unload(), rows)[1]
  out |= dict(logits=logits, merged_logits=merged, base_logits=base, loss=loss)
  out = {k: v.detach().numpy().astype(np.float32) for k, v in out.items()}
  return out | dict(tokens=rows)


def settle(folder: pathlib.Path, base: str) -> None:
  """Makes what PEFT wrote the same wherever it is made.

  Args:
    folder: of an adapter.
    base: where its base lies, relative to the folder.
  """
  (folder / "README.md").unlink(missing_ok=True)
  path = folder / "adapter_config.json"
  config = json.loads(path.read_text())
  config["base_model_name_or_path"] = base
  for field in SETS:
    if isinstance(config.get(field), list):
      config[field].sort()
  path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make(name: str, to: pathlib.Path = make_models.MODELS) -> dict:
  """Writes one adapter's folder; returns its golden arrays."""
  family = families.FAMILIES[BASE]
  tensors = make_models.weights(family)
  folder = to / name
  single = make_models.build(family.config, tensors)
  wrap(single, name, **ADAPTERS[name]).save_pretrained(folder)
  settle(folder, f"../{BASE}")
  with make_models.float64():
    double = make_models.build(family.config, tensors, torch.float64)
    arrays = golden(wrap(double, name, **ADAPTERS[name]).double())
  stored = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
  if {k for k in arrays if "/" in k} != {f"grad/{k}" for k in stored}:
    raise ValueError("gradients and file do not name the same tensors")
  np.savez_compressed(folder / "golden.npz", **arrays)
  return arrays


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("names", nargs="*", default=None)
  parser.add_argument("--to", type=pathlib.Path, default=make_models.MODELS)
  args = parser.parse_args()
  torch.set_num_threads(1)
  for name in args.names or ADAPTERS:
    arrays = make(name, args.to)
    moved = np.abs(arrays["logits"] - arrays["base_logits"]).max()
    fidelity = np.abs(arrays["logits"] - arrays["merged_logits"]).max()
    print(
      f"{name}: loss {arrays['loss']:.6f}, moves the logits by {moved:.2f}, "
      f"merged differs by {fidelity:.1e}"
    )


if __name__ == "__main__":
  main()
