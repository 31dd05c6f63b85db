"""A tiny llama as a GGUF file with a different type for each matrix."""

import dataclasses
import pathlib

import numpy as np

from research.interop import gguf
from research.interop.gguf import tensor_types

MODELS = pathlib.Path(__file__).parent / "golden" / "models"
WIDTH, HIDDEN, QUERIES, KEYS = 256, 64, 32, 16

# GGUF's name in a layer -> shape, and the type in the first and second one.
MATRICES = {
  "attn_q": ((QUERIES, WIDTH), "Q2_K", "IQ4_XS"),
  "attn_k": ((KEYS, WIDTH), "Q3_K", "TQ1_0"),
  "attn_v": ((KEYS, WIDTH), "Q4_K", "TQ2_0"),
  "attn_output": ((WIDTH, QUERIES), "IQ4_NL", "Q5_0"),
  "ffn_gate": ((HIDDEN, WIDTH), "Q5_K", "NVFP4"),
  "ffn_up": ((HIDDEN, WIDTH), "Q6_K", "Q5_1"),
  "ffn_down": ((WIDTH, HIDDEN), "MXFP4", "NVFP4"),
}


def write(path: pathlib.Path) -> None:
  """Writes the model, of random weights, with a tokenizer."""
  metadata = dict(gguf.open_gguf(MODELS / "gguf_f32/model.gguf").metadata)
  metadata |= {
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": HIDDEN,
    "llama.block_count": 2,
    "llama.attention.key_length": KEYS,
    "llama.attention.value_length": KEYS,
  }
  rng = np.random.default_rng(0)

  def tensor(kind, *shape):
    x = 0.3 * rng.standard_normal(shape)
    x = (x if len(shape) > 1 else 1 + x).astype(np.float32)
    return gguf.Tensor(kind, shape, tensor_types.encode(kind, x))

  vocab = len(metadata["tokenizer.ggml.tokens"])
  out = {
    "token_embd.weight": tensor("Q6_K", vocab, WIDTH),
    "output_norm.weight": tensor("F32", WIDTH),
  }
  for layer in (0, 1):
    for name in ("attn_norm", "ffn_norm"):
      out[f"blk.{layer}.{name}.weight"] = tensor("F32", WIDTH)
    for name, (shape, *kinds) in MATRICES.items():
      out[f"blk.{layer}.{name}.weight"] = tensor(kinds[layer], *shape)
  gguf.write_gguf(path, metadata, out)


def permute_rows(tensor: gguf.Tensor, order: np.ndarray) -> gguf.Tensor:
  """Returns `tensor` with its rows, whatever their type, in `order`."""
  data = tensor.data.reshape(tensor.shape[0], -1)[order]
  return dataclasses.replace(tensor, stored=data.reshape(-1))
