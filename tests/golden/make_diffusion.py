"""Writes tiny diffusion checkpoints and what transformers says of them.

  .venv-peers/bin/python tests/golden/make_diffusion.py [--to DIR]

LLaDA's layers are Llama's, Dream's are Qwen2's, LLaDA-MoE's Qwen3-MoE's and
LLaDA 2's GLM-4-MoE's, with a mask that lets all tokens see each other, or the
blocks before; so these compute the logits, and the tensors get the names that
LLaDA's own files have. For each: config.json, model.safetensors and golden.npz:

  tokens     int32 [2, T]     the second row is padded on the left, where the
                              model has no blocks
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

EXPERTS = SHARED | dict(
  num_hidden_layers=3,
  moe_intermediate_size=12,
  num_experts_per_tok=3,
  head_dim=8,
)
QWEN3_MOE = EXPERTS | dict(
  model_type="qwen3_moe",
  vocab_size=48,
  num_key_value_heads=4,
  num_experts=6,
  norm_topk_prob=False,
  mlp_only_layers=[1],
  decoder_sparse_step=1,
  rope_theta=50_000.0,
  rms_norm_eps=1e-5,
)
LLADA_MOE = dict(
  architectures=["LLaDAMoEModel"],
  model_type="llada",
  attention_bias=False,
  clip_qkv=None,
  dense_intermediate_size=48,
  eos_token_id=41,
  expert_intermediate_size=12,
  hidden_act="silu",
  hidden_size=32,
  mask_token_id=46,
  max_position_embeddings=64,
  moe_layer_freq=[1, 0, 1],
  moe_router_enable_expert_bias=False,
  moe_router_score_function="softmax",
  norm_topk_prob=None,
  num_attention_heads=4,
  num_experts=6,
  num_experts_per_tok=3,
  num_hidden_layers=3,
  num_key_value_heads=4,
  pad_token_id=41,
  partial_rotary_factor=1,
  qk_layernorm=True,
  rms_norm_eps=1e-5,
  rope_scaling=None,
  rope_theta=50_000.0,
  routed_scaling_factor=1,
  router_num_group=None,
  router_topk_group=None,
  shared_expert_intermediate_size=None,
  tie_word_embeddings=False,
  use_cache=False,
  vocab_size=48,
)
GLM4_MOE = EXPERTS | dict(
  model_type="glm4_moe",
  vocab_size=48,
  num_key_value_heads=2,
  n_routed_experts=12,
  n_shared_experts=1,
  n_group=4,
  topk_group=2,
  norm_topk_prob=True,
  routed_scaling_factor=2.5,
  first_k_dense_replace=1,
  num_nextn_predict_layers=0,
  use_qk_norm=True,
  partial_rotary_factor=0.5,
  rope_theta=600_000.0,
  rms_norm_eps=1e-6,
)
LLADA2 = dict(
  architectures=["LLaDA2MoeModelLM"],
  model_type="llada2_moe",
  block_length=4,
  first_k_dense_replace=1,
  head_dim=8,
  hidden_act="silu",
  hidden_size=32,
  intermediate_size=48,
  mask_token_id=46,
  max_position_embeddings=64,
  max_window_layers=28,
  moe_intermediate_size=12,
  moe_router_enable_expert_bias=True,
  n_group=4,
  norm_head=False,
  norm_topk_prob=True,
  num_attention_heads=4,
  num_experts=12,
  num_experts_per_tok=3,
  num_hidden_layers=3,
  num_key_value_heads=2,
  num_shared_experts=1,
  pad_token_id=41,
  partial_rotary_factor=0.5,
  rms_norm_eps=1e-6,
  rope_scaling=None,
  rope_theta=600_000.0,
  rotary_dim=4,
  routed_scaling_factor=2.5,
  router_dtype="fp32",
  score_function="sigmoid",
  sliding_window=4096,
  tie_word_embeddings=False,
  topk_group=2,
  use_bias=False,
  use_qk_norm=True,
  use_qkv_bias=False,
  use_sliding_window=False,
  vocab_size=48,
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


def one_by_one(tensors):
  """Returns tensors with each expert's matrices under a name of its own."""
  out = {}
  for name, x in tensors.items():
    head, stacked, kind = name.partition("mlp.experts.")
    if not stacked:
      out[name] = x
      continue
    for e, matrix in enumerate(x):
      parts = {"down_proj": matrix}
      if kind == "gate_up_proj":
        gate, up = np.split(matrix, 2)
        parts = {"gate_proj": gate, "up_proj": up}
      for part, value in parts.items():
        out[f"{head}{stacked}{e}.{part}.weight"] = np.ascontiguousarray(value)
  return out


LLADA2_NAMES = {
  "model.embed_tokens": "model.word_embeddings",
  "self_attn.q_norm": "attention.query_layernorm",
  "self_attn.k_norm": "attention.key_layernorm",
  "self_attn.o_proj": "attention.dense",
  "gate.e_score_correction_bias": "gate.expert_bias",
}


def llada2(tensors):
  """Returns GLM-4-MoE's tensors as LLaDA 2's files have them."""
  out = {}
  for name, x in one_by_one(tensors).items():
    for theirs, official_name in LLADA2_NAMES.items():
      name = name.replace(theirs, official_name)
    if "q_proj" in name:
      parts = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
      name = name.replace("self_attn.q_proj", "attention.query_key_value")
      x = np.concatenate([tensors[part] for part in parts])
    if "self_attn" not in name:
      out[name] = x
  return out


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


def asked(config, tensors, shift, block=None):
  """Returns golden.npz of a model.

  Args:
    config, tensors: of transformers.
    shift: whether a token is predicted by the state before it.
    block: tokens of a block, which sees those before and itself; None: all.
  """
  rng = np.random.default_rng(7)
  tokens = rng.integers(0, config["vocab_size"], (2, T)).astype(np.int32)
  padded = 0 if block else PADDED
  positions = np.stack([np.arange(T), np.arange(T) - padded]).astype(np.int32)
  positions = np.maximum(positions, -1)
  real = positions >= 0
  with float64():
    model = build(config, tensors, torch.float64)
    # Additive, of keys alone: real tokens see all real ones.
    lowest = torch.finfo(torch.float64).min
    hidden = torch.from_numpy(np.where(real, 0.0, lowest))
    mask = hidden[:, None, None, :].expand(2, 1, T, T).clone()
    if block:
      number = torch.arange(T) // block
      mask[:, :, number[:, None] < number[None, :]] = lowest
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


CASES = {
  "llada": (LLAMA, LLADA),
  "dream": (QWEN2, DREAM),
  "llada_moe": (QWEN3_MOE, LLADA_MOE),
  "llada2": (GLM4_MOE, LLADA2),
}
"""Name -> transformers' configuration of what computes, and the file's."""


def make(name, to=TO):
  """Writes one folder; returns its golden.npz."""
  peer, config = CASES[name]
  tensors = draw(peer, list(CASES).index(name))
  golden = asked(peer, tensors, name == "dream", config.get("block_length"))
  if name == "llada":
    tensors = {official(k): v for k, v in tensors.items()}
  elif name == "llada_moe":
    tensors = one_by_one(tensors)
  elif name == "llada2":
    tensors = llada2(tensors)
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
