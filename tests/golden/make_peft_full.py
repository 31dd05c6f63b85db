"""Writes PEFT adapters that bring whole weights along, and what PEFT says.

  .venv-peers/bin/python tests/golden/make_peft_full.py [--to DIR] [NAME ...]

Each folder is an adapter as PEFT saves it, with golden.npz beside it:

  tokens  int32 [2, T]    no padding
  logits  fp32 [2, T, V]  of the adapter as PEFT loads it again, in fp64

What an adapter may bring: trained biases, modules_to_save, embeddings of a
tied model (with and without ensure_weight_tying), a longer vocabulary, rows
of some tokens.
"""

import argparse
import dataclasses
import pathlib
import sys
import tempfile
import zlib

import numpy as np
import peft
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import families  # noqa: E402
import make_models  # noqa: E402
import make_peft  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Case:
  """One adapter: over which tiny model, with which options, how long."""

  base: str
  options: dict
  vocab: int = families.VOCAB


QV = ["q_proj", "v_proj"]
CASES = {
  "peftfull_bias_all": Case(
    "llama_biases", dict(target_modules=QV, bias="all")
  ),
  "peftfull_bias_lora": Case(
    "llama_biases", dict(target_modules=[*QV, "down_proj"], bias="lora_only")
  ),
  "peftfull_saved": Case(
    "qwen2",
    dict(
      target_modules=QV,
      modules_to_save=["lm_head", "layers.1.mlp", "model.norm"],
    ),
  ),
  "peftfull_saved_norms": Case(
    "gemma2", dict(target_modules=QV, modules_to_save=["input_layernorm"])
  ),
  "peftfull_saved_embed": Case(
    "llama", dict(target_modules=QV, modules_to_save=["embed_tokens"])
  ),
  "peftfull_tied_embed": Case(
    "smollm2", dict(target_modules=QV, modules_to_save=["embed_tokens"])
  ),
  "peftfull_tied_head": Case(
    "smollm2", dict(target_modules=QV, modules_to_save=["lm_head"])
  ),
  "peftfull_tied_both": Case(
    "smollm2",
    dict(
      target_modules=QV,
      modules_to_save=["embed_tokens"],
      ensure_weight_tying=True,
    ),
  ),
  "peftfull_tied_lora": Case(
    "smollm2", dict(target_modules=["q_proj", "embed_tokens"])
  ),
  "peftfull_tied_lora_head": Case(
    "smollm2", dict(target_modules=["q_proj", "lm_head"])
  ),
  "peftfull_tied_lora_both": Case(
    "smollm2",
    dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
  ),
  "peftfull_untied_lora": Case(
    "llama", dict(target_modules=["q_proj", "embed_tokens", "lm_head"])
  ),
  "peftfull_resized": Case("llama", dict(target_modules=QV), 71),
  "peftfull_resized_tied": Case("smollm2", dict(target_modules=QV), 71),
  "peftfull_tokens": Case(
    "llama", dict(target_modules=QV, trainable_token_indices=[9, 3, 66])
  ),
  "peftfull_tokens_both": Case(
    "llama",
    dict(
      target_modules=QV,
      trainable_token_indices={"embed_tokens": [3, 66], "lm_head": [7, 66, 4]},
    ),
  ),
  "peftfull_tokens_tied": Case(
    "smollm2", dict(target_modules=QV, trainable_token_indices=[9, 3, 66])
  ),
  "peftfull_tokens_grown": Case(
    "smollm2",
    dict(target_modules=QV, trainable_token_indices=[67, 68, 69, 70]),
    71,
  ),
  "peftfull_tokens_alone": Case("smollm2", dict(token_indices=[9, 3, 66])),
  # Not of weights that are whole: see peft/test_experts.
  "experts_lora_both": Case(
    "mixtral",
    dict(
      target_modules=["q_proj"],
      target_parameters=["experts.gate_up_proj", "experts.down_proj"],
      rank_pattern={r"^model\.layers\.0\.mlp\.experts\.down_proj": 3},
      alpha_pattern={r"layers\.2\.mlp\.experts\.gate_up_proj": 5},
    ),
  ),
  "experts_lora_down": Case(
    "mixtral",
    dict(
      target_modules=[], target_parameters=["layers.1.mlp.experts.down_proj"]
    ),
  ),
  "peftfull_layers": Case(
    "llama",
    dict(
      target_modules=["q_proj", "up_proj", "o_proj"],
      layers_to_transform=[0, 2],
      exclude_modules=["o_proj"],
      rank_pattern={r"^model\.layers\.2\.mlp\.up_proj": 2},
      alpha_pattern={r"^model\.layers\.0\.self_attn\.q_proj": 5},
      use_rslora=True,
    ),
  ),
}


def base_model(case: Case, dtype=torch.float32):
  """Returns transformers' base, with as many tokens as the case wants."""
  family = families.FAMILIES[case.base]
  model = make_models.build(family.config, make_models.weights(family), dtype)
  if case.vocab != families.VOCAB:
    model.resize_token_embeddings(case.vocab, mean_resizing=False)
  return model


def draw(wrapped, name: str) -> None:
  """Sets everything that is trained to numbers of its own name."""
  for key, value in wrapped.named_parameters():
    trained = (
      "lora_" in key
      or "modules_to_save" in key
      or "trainable_tokens_delta" in key
      or (value.requires_grad and key.endswith("bias"))
    )
    grown = value.shape[:1] == (71,) and "lora_" not in key
    if not trained and not grown:
      continue
    generator = np.random.default_rng([zlib.crc32(f"{name}/{key}".encode())])
    std = 0.05 if "lora_A" in key or "lora_embedding_B" in key else 0.02
    fresh = "lora_" in key
    if "trainable_tokens" in key:  # a new token's begin as torch has drawn
      std, fresh = 0.3, True
    drawn = std * generator.standard_normal(tuple(value.shape))
    base = 0 if fresh else value.detach().double().numpy()
    if grown:
      base[families.VOCAB :] = 0  # torch has drawn these
    new = torch.from_numpy((base + drawn).astype(np.float32))
    value.data.copy_(new)  # a tied adapter shares its storage


def tokens(case: Case, length: int = 24) -> np.ndarray:
  """Returns int32 [2, length] tokens, the new ones among them."""
  generator = np.random.default_rng(13)
  return generator.integers(3, case.vocab, (2, length)).astype(np.int32)


def logits(case: Case, folder: pathlib.Path) -> np.ndarray:
  """Returns what PEFT computes, in fp64, with the adapter in `folder`."""
  with make_models.float64():
    base = base_model(case, torch.float64)
  model = peft.PeftModel.from_pretrained(
    base, folder, autocast_adapter_dtype=False
  ).to(torch.float64)
  with make_models.float64(), torch.no_grad():
    return make_peft.loss_and_logits(model, tokens(case))[1].numpy()


def make(name: str, to: pathlib.Path = make_models.MODELS) -> dict:
  """Writes one adapter's folder; returns its golden arrays."""
  case, folder = CASES[name], to / name
  model = base_model(case)
  if "token_indices" in case.options:
    config = peft.TrainableTokensConfig(task_type="CAUSAL_LM", **case.options)
  else:
    config = peft.LoraConfig(
      r=4, lora_alpha=12, task_type="CAUSAL_LM", **case.options
    )
  wrapped = peft.get_peft_model(model, config)
  draw(wrapped, name)
  with tempfile.TemporaryDirectory() as base:
    # PEFT looks up whether the vocabulary has grown.
    family = families.FAMILIES[case.base]
    make_models.save(pathlib.Path(base), family, {})
    wrapped.peft_config["default"].base_model_name_or_path = base
    wrapped.save_pretrained(folder)
  make_peft.settle(folder, f"../{case.base}")
  found = logits(case, folder)
  arrays = dict(tokens=tokens(case), logits=found.astype(np.float32))
  np.savez_compressed(folder / "golden.npz", **arrays)
  return arrays


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("names", nargs="*", default=None)
  parser.add_argument("--to", type=pathlib.Path, default=make_models.MODELS)
  args = parser.parse_args()
  torch.set_num_threads(1)
  for name in args.names or CASES:
    arrays = make(name, args.to)
    print(f"{name}: logits {np.ptp(arrays['logits']):.2f} wide")


if __name__ == "__main__":
  main()
