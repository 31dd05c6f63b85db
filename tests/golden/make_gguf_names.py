"""Writes gguf_names.json: the `gguf` package's names for HF's tensors.

  .venv-peers/bin/python tests/golden/make_gguf_names.py [--to FILE]

`names[architecture]` maps each HF name of a one-layer model to GGUF's; `keys`
maps the package's constants to the metadata keys they stand for, of which
`every_key` has all. The rest are the package's numbers by name: `types` of
tensors [id, weights a block, bytes a block], `values` of metadata's types,
`files` of `general.file_type`, and `tokens` of `tokenizer.ggml.token_type`.
"""

import argparse
import json
import pathlib
from collections.abc import Iterator

import gguf

FILE = pathlib.Path(__file__).parent / "gguf_names.json"
LAYER = "model.layers.0."
COMMON = [
  "model.embed_tokens.weight",
  "model.norm.weight",
  LAYER + "input_layernorm.weight",
  LAYER + "post_attention_layernorm.weight",
  *(LAYER + f"self_attn.{p}_proj.weight" for p in "qkvo"),
  *(LAYER + f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
]
UNTIED = ["lm_head.weight"]
QKV = [LAYER + f"self_attn.{p}_proj.bias" for p in "qkv"]
BIASES = [
  *QKV,
  LAYER + "self_attn.o_proj.bias",
  *(LAYER + f"mlp.{p}_proj.bias" for p in ("gate", "up", "down")),
]
QK_NORM = [LAYER + f"self_attn.{p}_norm.weight" for p in "qk"]
SANDWICH = [
  LAYER + "pre_feedforward_layernorm.weight",
  LAYER + "post_feedforward_layernorm.weight",
]
NAMES = {
  "llama": COMMON + UNTIED + BIASES,
  "qwen2": COMMON + UNTIED + QKV,
  "qwen3": COMMON + UNTIED + QK_NORM,
  "gemma": COMMON,
  "gemma2": COMMON + SANDWICH,
  "gemma3": COMMON + SANDWICH + QK_NORM,
}
KEYS = {
  "Attention": (
    "HEAD_COUNT",
    "HEAD_COUNT_KV",
    "KEY_LENGTH",
    "VALUE_LENGTH",
    "LAYERNORM_RMS_EPS",
    "SLIDING_WINDOW",
    "SLIDING_WINDOW_PATTERN",
  ),
  "Rope": (
    "DIMENSION_COUNT",
    "FREQ_BASE",
    "FREQ_BASE_SWA",
    "SCALING_TYPE",
    "SCALING_FACTOR",
    "SCALING_ORIG_CTX_LEN",
    "SCALING_FINETUNED",
    "SCALING_ATTN_FACTOR",
    "SCALING_YARN_BETA_FAST",
    "SCALING_YARN_BETA_SLOW",
  ),
  "LLM": (
    "VOCAB_SIZE",
    "CONTEXT_LENGTH",
    "EMBEDDING_LENGTH",
    "BLOCK_COUNT",
    "FEED_FORWARD_LENGTH",
    "ATTN_LOGIT_SOFTCAPPING",
    "FINAL_LOGIT_SOFTCAPPING",
    "EXPERT_COUNT",
  ),
}


def make() -> dict:
  """Returns what the file holds."""
  names = {}
  for architecture, wanted in NAMES.items():
    which = next(
      a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture
    )
    table = gguf.get_tensor_name_map(which, 1)
    names[architecture] = {
      hf: table.get_name(hf, try_suffixes=(".weight", ".bias")) for hf in wanted
    }
  keys = {
    key: getattr(getattr(gguf.Keys, group), key, None)
    for group, wanted in KEYS.items()
    for key in wanted
  }
  sizes = gguf.GGML_QUANT_SIZES.items()
  return dict(
    names=names,
    keys=keys,
    every_key=sorted(set(every_key(gguf.Keys))),
    types={t.name: [int(t), *size] for t, size in sizes},
    values={t.name: int(t) for t in gguf.GGUFValueType},
    files={t.name: int(t) for t in gguf.LlamaFileType},
    tokens={t.name: int(t) for t in gguf.TokenType},
  )


def every_key(group: type) -> Iterator[str]:
  """Yields the keys of a class of them, and of those inside."""
  for name, value in vars(group).items():
    if isinstance(value, type):
      yield from every_key(value)
    elif not name.startswith("_"):
      yield value


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--to", type=pathlib.Path, default=FILE)
  to = parser.parse_args().to
  to.write_text(json.dumps(make(), indent=1) + "\n")


if __name__ == "__main__":
  main()
