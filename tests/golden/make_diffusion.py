"""Writes tiny LLaDA and Dream checkpoints and what transformers says of them.

  .venv-peers/bin/python tests/golden/make_diffusion.py [--to DIR]

LLaDA's layers are Llama's and Dream's are Qwen2's, with a mask that lets all
tokens see each other; so these compute the logits, and the tensors get the
names that LLaDA's own files have. For each: config.json, model.safetensors and
golden.npz:

  tokens     int32 [2, T]     the second row is padded on the left
  positions  int32 [2, T]     -1 at padding
  logits     fp32 [2, T, V]   computed in fp64, each place's own; 0 at padding

Only NumPy draws numbers, so the weights do not depend on torch's version.
"""

import argparse
import json
import pathlib

import numpy as np
import safetensors.numpy
import torch
from make_models import build, float64

TO = pathlib.Path(__file__).parent / "diffusion"
T = 12
PADDED = 4

SHARED = dict(
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  max_position_embeddings=64,
  tie_word_embeddings=False,
)
LLAMA = SHARED | dict(
  model_type="llama",
  vocab_size=48,
  num_key_value_heads=4,
  rope_theta=500_000.0,
  rms_norm_eps=1e-5,
)
LLADA = dict(
  architectures=["LLaDAModelLM"],
  model_type="llada",
  activation_type="silu",
  alibi=False,
  attention_layer_norm=False,
  block_type="llama",
  d_model=32,
  embedding_size=48,
  eos_token_id=41,
  include_bias=False,
  include_qkv_bias=False,
  input_emb_norm=False,
  layer_norm_type="rms",
  mask_token_id=46,
  max_sequence_length=64,
  mlp_hidden_size=48,
  mlp_ratio=4,
  n_heads=4,
  n_kv_heads=4,
  n_layers=2,
  pad_token_id=41,
  rms_norm_eps=1e-5,
  rope=True,
  rope_theta=500_000.0,
  scale_logits=False,
  vocab_size=48,
  weight_tying=False,
)
QWEN2 = SHARED | dict(
  model_type="qwen2",
  vocab_size=40,
  num_key_value_heads=2,
  rope_theta=1_000_000.0,
  rms_norm_eps=1e-6,
)
DREAM = QWEN2 | dict(
  architectures=["DreamModel"],
  model_type="Dream",
  hidden_act="silu",
  use_sliding_window=False,
  mask_token_id=39,
  eos_token_id=38,
  pad_token_id=38,
)

NAMES = {
  "model.embed_tokens": "model.transformer.wte",
  "model.norm": "model.transformer.ln_f",
  "lm_head": "model.transformer.ff_out",
  "input_layernorm": "attn_norm",
  "post_attention_layernorm": "ff_norm",
  "self_attn.o_proj": "attn_out",
  "mlp.gate_proj": "ff_proj",
  "mlp.down_proj": "ff_out",
  "mlp.": "",
  "self_attn.": "",
  "model.layers.": "model.transformer.blocks.",
}


def official(name):
  """Returns LLaDA's name of a tensor of Llama's."""
  for llama, llada in NAMES.items():
    name = name.replace(llama, llada)
  return name


def draw(config, seed):
  """Returns random weights under transformers' names."""
  import transformers

  rest = {k: v for k, v in config.items() if k != "model_type"}
  parsed = transformers.AutoConfig.for_model(config["model_type"], **rest)
  with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(parsed)
  rng = np.random.default_rng(seed)
  out = {}
  for name, x in sorted(model.state_dict().items()):
    value = 0.3 * rng.standard_normal(tuple(x.shape))
    out[name] = (value + name.endswith("norm.weight")).astype(np.float32)
  return out


def asked(config, tensors, shift):
  """Returns golden.npz of a model."""
  rng = np.random.default_rng(7)
  tokens = rng.integers(0, config["vocab_size"], (2, T)).astype(np.int32)
  positions = np.stack([np.arange(T), np.arange(T) - PADDED]).astype(np.int32)
  positions = np.maximum(positions, -1)
  real = positions >= 0
  with float64():
    model = build(config, tensors, torch.float64)
    # Additive, of keys alone: real tokens see all real ones.
    lowest = torch.finfo(torch.float64).min
    hidden = torch.from_numpy(np.where(real, 0.0, lowest))
    mask = hidden[:, None, None, :].expand(2, 1, T, T).contiguous()
    with torch.no_grad():
      logits = model(
        torch.from_numpy(tokens).long(),
        attention_mask=mask,
        position_ids=torch.from_numpy(np.maximum(positions, 0)).long(),
        use_cache=False,
      ).logits.numpy()
  if shift:
    logits = np.concatenate([logits[:, :1], logits[:, :-1]], axis=1)
  logits = np.where(real[..., None], logits, 0).astype(np.float32)
  return dict(tokens=tokens, positions=positions, logits=logits)


CASES = {"llada": (LLAMA, LLADA), "dream": (QWEN2, DREAM)}
"""Name -> transformers' configuration of what computes, and the file's."""


def make(name, to=TO):
  """Writes one folder; returns its golden.npz."""
  peer, config = CASES[name]
  tensors = draw(peer, list(CASES).index(name))
  golden = asked(peer, tensors, shift=name == "dream")
  if name == "llada":
    tensors = {official(k): v for k, v in tensors.items()}
  folder = to / name
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(config, indent=2) + "\n"
  (folder / "config.json").write_text(text)
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  np.savez_compressed(folder / "golden.npz", **golden)
  return golden


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--to", type=pathlib.Path, default=TO)
  to = parser.parse_args().to
  for name in CASES:
    make(name, to)


if __name__ == "__main__":
  main()
