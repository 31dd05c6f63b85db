"""Writes tiny reward models and what transformers says of them.

  .venv-peers/bin/python tests/golden/make_rewards.py [--to DIR] [NAME ...]

Two are transformers' own classes; `prm` has the head of Qwen2.5-Math-PRM and
`value` that of TRL's AutoModelForCausalLMWithValueHead (Skywork's), built here
of torch's modules by their descriptions. For each: config.json,
model.safetensors and golden.npz:

  tokens  int32 [2, T]      the second row is padded on the right
  real    bool [2, T]
  logits  fp32 [2, T, K]    computed in fp64; [2, K] of a sequence classifier,
                            at each row's last token

Only NumPy draws numbers, so the weights do not depend on torch's version.
"""

import argparse
import json
import pathlib
import zlib

import numpy as np
import safetensors.numpy
import torch
import transformers
from make_models import float64, peer_config
from torch import nn

TO = pathlib.Path(__file__).parent / "rewards"
T, PADDED, PAD = 12, 4, 0
SHARED = dict(
  vocab_size=67,
  hidden_size=24,
  intermediate_size=36,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  hidden_act="silu",
  max_position_embeddings=64,
  rms_norm_eps=1e-5,
  rope_theta=10000.0,
  tie_word_embeddings=False,
  torch_dtype="float32",
  pad_token_id=PAD,
)
QWEN2 = SHARED | dict(model_type="qwen2", use_sliding_window=False)


def labels(count):
  """Returns the fields by which a configuration counts its labels."""
  names = [f"LABEL_{i}" for i in range(count)]
  return dict(
    id2label={str(i): name for i, name in enumerate(names)},
    label2id={name: i for i, name in enumerate(names)},
  )


MODELS = {
  "tokens": QWEN2
  | dict(architectures=["Qwen2ForTokenClassification"])
  | labels(2),
  "sequence": SHARED
  | dict(model_type="llama", architectures=["LlamaForSequenceClassification"])
  | labels(1),
  "prm": QWEN2 | dict(architectures=["Qwen2ForProcessRewardModel"]) | labels(2),
  "value": QWEN2
  | dict(architectures=["Qwen2ForCausalLMWithValueHead"])
  | labels(1),
}


class Head(nn.Module):
  """A language model's body, and a head of another name."""

  def __init__(self, body, name, head):
    super().__init__()
    self.model = body
    self.name = name
    setattr(self, name, head)

  def forward(self, input_ids):
    hidden = self.model(input_ids=input_ids).last_hidden_state
    head = getattr(self, self.name)
    return head.summary(hidden) if self.name == "v_head" else head(hidden)


def build(name, dtype=torch.float64):
  """Returns the module of a name, without its weights."""
  parsed = peer_config(MODELS[name])
  parsed._attn_implementation = "eager"
  if name == "tokens":
    made = transformers.AutoModelForTokenClassification.from_config(parsed)
  elif name == "sequence":
    made = transformers.AutoModelForSequenceClassification.from_config(parsed)
  else:
    body = transformers.AutoModel.from_config(parsed)
    width = parsed.hidden_size
    if name == "prm":
      head = nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
      )
      made = Head(body, "score", head)
    else:
      head = nn.Module()
      head.summary = nn.Linear(width, 1)
      made = Head(body, "v_head", head)
  return made.to(dtype).eval()


def weights(model):
  """Returns random weights under the names of the module's."""
  out = {}
  for name, value in model.state_dict().items():
    rng = np.random.default_rng([0, zlib.crc32(name.encode())])
    drawn = 0.3 * rng.standard_normal(tuple(value.shape))
    if name.endswith("norm.weight"):
      drawn = 1 + drawn / 2
    out[name] = drawn.astype(np.float32)
  return out


def text():
  """Returns the tokens and which are no padding."""
  tokens = np.random.default_rng(3).integers(3, 67, (2, T)).astype(np.int32)
  real = np.ones((2, T), bool)
  real[1, -PADDED:] = False
  return np.where(real, tokens, PAD).astype(np.int32), real


@torch.no_grad()
def logits(model, tokens):
  """Returns the model's logits, in fp64."""
  found = model(input_ids=torch.from_numpy(tokens).long())
  return getattr(found, "logits", found).double().numpy()


def make(name, to):
  """Writes one folder; returns its golden arrays."""
  folder = to / name
  folder.mkdir(parents=True, exist_ok=True)
  with float64():
    model = build(name)
    drawn = weights(model)
    state = {k: torch.from_numpy(v).double() for k, v in drawn.items()}
    model.load_state_dict(state)
    tokens, real = text()
    found = logits(model, tokens)
  if found.ndim == 3:
    found = found * real[..., None]
  golden = dict(tokens=tokens, real=real, logits=found.astype(np.float32))
  config = json.dumps(MODELS[name], indent=2) + "\n"
  (folder / "config.json").write_text(config)
  safetensors.numpy.save_file(
    drawn, folder / "model.safetensors", {"format": "pt"}
  )
  np.savez_compressed(folder / "golden.npz", **golden)
  return golden


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--to", type=pathlib.Path, default=TO)
  parser.add_argument("names", nargs="*", default=list(MODELS))
  args = parser.parse_args()
  for name in args.names:
    make(name, args.to)


if __name__ == "__main__":
  main()
