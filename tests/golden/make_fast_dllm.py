"""Writes what Fast-dLLM's own code makes of the tiny LLaDA checkpoint.

  .venv-peers/bin/python tests/golden/make_fast_dllm.py CHECKOUT [--to FILE]

CHECKOUT is a working tree of github.com/NVlabs/Fast-dLLM. Its three loops
(`llada/generate.py`: no cache, prefix cache, dual cache) fill the same prompts
greedily, by a threshold, on its own network (`llada/model`), with the weights
of `diffusion/llada`. Only the mask's logit is changed: it has no probability,
as LLaDA's loop leaves open. `diffusion/llada/fast_dllm.npz` holds

  threshold, block   the settings
  {i}/prompt         int32 [P]
  {i}/{cache}/tokens int32 [P + G]
  {i}/{cache}/rows   int32 [N, P + G], the row before each call of the network
  {i}/{cache}/start  int32 [N], where the block begins that a call fills
  {i}/{cache}/logits fp32 [N, K, V], those of the block

Calls after a block is full are left out: the authors' cached loops make one
where the block's first call fills all of it.
"""

import argparse
import json
import os
import pathlib
import sys
import types

import numpy as np
import safetensors.torch
import torch

FOLDER = pathlib.Path(__file__).parent / "diffusion" / "llada"
PROMPTS, LENGTH, BLOCK, THRESHOLD = (13, 9), 24, 8, 0.3
LOOPS = {
  "none": "generate",
  "prefix": "generate_with_prefix_cache",
  "dual": "generate_with_dual_cache",
}
LOWEST = -1e30
MARGIN = 1e-4


class Network:
  """The authors' network as their loops call it; keeps what it was asked.

  Attributes:
    calls: (tokens that were read, their logits).
  """

  device = torch.device("cpu")

  def __init__(self, network, mask_id):
    self.network, self.mask_id, self.calls = network, mask_id, []

  def __call__(self, tokens, past_key_values=None, **options):
    out = self.network(tokens, past_key_values=past_key_values, **options)
    out.logits[..., self.mask_id] = LOWEST
    self.calls.append((tokens.clone(), out.logits.clone()))
    return types.SimpleNamespace(
      logits=out.logits, past_key_values=out.attn_key_values
    )


def network(config):
  """Returns the authors' network with the checkpoint's weights."""
  from model.configuration_llada import ModelConfig
  from model.modeling_llada import LLaDAModel

  fields = {k: v for k, v in config.items() if hasattr(ModelConfig, k)}
  model = LLaDAModel(
    ModelConfig(**fields, init_device="cpu"), init_params=False
  )
  tensors = safetensors.torch.load_file(FOLDER / "model.safetensors")
  model.load_state_dict(
    {name.removeprefix("model."): x for name, x in tensors.items()}
  )
  return model.eval()


def filled(model, loop, prompt, mask_id):
  """Returns one prompt's arrays, see above."""
  asked = Network(model, mask_id)
  with torch.no_grad():
    tokens, _ = loop(
      asked,
      torch.from_numpy(prompt)[None].long(),
      steps=LENGTH,
      gen_length=LENGTH,
      block_length=BLOCK,
      mask_id=mask_id,
      threshold=THRESHOLD,
    )
  out = {"tokens": tokens[0].numpy(), "rows": [], "start": [], "logits": []}
  for read, logits in asked.calls:
    read, logits, low = read[0].numpy(), logits[0].numpy(), 0
    if len(read) == tokens.shape[1]:
      row = read.copy()
      done = int((row[len(prompt) :] == mask_id).argmax())
      start = len(prompt) + done // BLOCK * BLOCK
    else:  # all from the block on, or the block
      low = start
      row[low : low + len(read)] = read
    if not (row[start : start + BLOCK] == mask_id).any():
      continue
    out["rows"].append(row.copy())
    out["start"].append(start)
    out["logits"].append(logits[start - low :][:BLOCK])
  return {k: np.stack(v) for k, v in out.items()}


def sure(made, mask_id):
  """Raises unless rounding can change none of the decisions."""
  for row, start, logits in zip(
    made["rows"], made["start"], made["logits"], strict=True
  ):
    open_ = row[start : start + BLOCK] == mask_id
    logits = logits[open_].astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    best = np.sort(p, axis=-1)[:, -2:]
    confident = np.sort(best[:, 1])[::-1]
    gaps = [best[:, 1] - best[:, 0], np.abs(confident - THRESHOLD)]
    if confident[0] < THRESHOLD and len(confident) > 1:
      gaps.append(confident[:1] - confident[1:2])
    if min(gap.min() for gap in gaps) < MARGIN:
      raise SystemExit("a decision is as near as rounding: draw other prompts")


def make(checkout):
  """Returns all arrays.

  Args:
    checkout: of the authors' repository.
  """
  # Their attention is compiled for CUDA; eager is the same.
  os.environ["TORCHDYNAMO_DISABLE"] = "1"
  sys.path.insert(0, str(pathlib.Path(checkout) / "llada"))
  import generate

  config = json.loads((FOLDER / "config.json").read_text())
  mask_id, model = config["mask_token_id"], network(config)
  out = {"threshold": np.float32(THRESHOLD), "block": np.int32(BLOCK)}
  rng = np.random.default_rng(0)
  for i, size in enumerate(PROMPTS):
    prompt = rng.integers(0, config["eos_token_id"], size)
    out[f"{i}/prompt"] = prompt
    for name, loop in LOOPS.items():
      made = filled(model, getattr(generate, loop), prompt, mask_id)
      sure(made, mask_id)
      out |= {f"{i}/{name}/{k}": v for k, v in made.items()}
  return {
    k: v.astype(np.int32) if v.dtype == np.int64 else v for k, v in out.items()
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("checkout", type=pathlib.Path)
  parser.add_argument("--to", type=pathlib.Path, default=FOLDER)
  given = parser.parse_args()
  np.savez_compressed(given.to / "fast_dllm.npz", **make(given.checkout))


if __name__ == "__main__":
  main()
