"""LLaDA 2's checkpoints (2.0, 2.1): their names, and what they keep together.

A block-causal mixture of experts in the form of Ling 2 (inclusionAI/LLaDA2.0,
modeling_llada2_moe.py). Its files call attention `attention`, and hold queries,
keys and values of a layer as one matrix:

  attention.query_key_value.weight  [(N + 2K) H, D]  queries above keys above
                                                     values, head by head
  attention.query_layernorm.weight  [H]
  attention.dense.weight            [D, N H]
  mlp.gate.expert_bias              [E]              of the choice alone

Taken apart and renamed, they are Qwen3-MoE's, with a bias of the router and
shared experts besides (`names.SPARSE`).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from research.io.fields import Fields
from research.io.safetensors import Lazy, Pending

KIND = "llada2_moe"

DEFAULTS: dict[str, Any] = dict(
  hidden_act="silu",
  rms_norm_eps=1e-5,
  rope_theta=10_000.0,
  tie_word_embeddings=False,
  head_dim=None,
  max_position_embeddings=16_384,
  num_experts=16,
  num_experts_per_tok=2,
  num_shared_experts=0,
  n_group=8,
  topk_group=4,
  routed_scaling_factor=2.5,
  first_k_dense_replace=0,
  partial_rotary_factor=0.5,
  use_qk_norm=True,
)
"""Of its configuration class, whose biases no published file has."""

READ = (
  "num_experts",
  "num_local_experts",
  "moe_intermediate_size",
  "partial_rotary_factor",
  "use_qk_norm",
)
"""Fields that mean something here and are refused in other families."""

_OTHERWISE: dict[str, tuple[Any, ...]] = {
  "attention_bias": (None, False),
  "score_function": (None, "sigmoid"),
  "use_qk_norm": (None, True),
  "use_sliding_window": (None, False),
}

_PARTS = ("q", "k", "v")
_FUSED = "attention.query_key_value"
_OUTSIDE = {"model.word_embeddings.weight": "model.embed_tokens.weight"}
MODULES = {
  "attention.query_layernorm": "self_attn.q_norm",
  "attention.key_layernorm": "self_attn.k_norm",
  "attention.dense": "self_attn.o_proj",
}
"""Theirs -> Qwen3-MoE's, of one layer; queries, keys and values besides."""
_OF_LAYER = re.compile(r"(model\.layers\.(?:0|[1-9]\d{0,5})\.)(.+)\.(\w+)")


def check(fields: Fields) -> None:
  """Raises UserError for what no published model has."""
  for name, values in _OTHERWISE.items():
    if fields.values.get(name) not in values:
      raise fields.wrong(name, f"{values[-1]!r}: no other is supported")


def to_qwen3_moe_names(
  tensors: Mapping[str, Any], heads: int, kv_heads: int
) -> dict[str, Any]:
  """Returns the tensors under the usual names, unread; others keep theirs.

  Args:
    heads, kv_heads: `N` and `K`; a matrix that they do not divide is left as it
      is, and so will be called superfluous.
  """
  out: dict[str, Any] = {}
  for name, tensor in tensors.items():
    found = _OF_LAYER.fullmatch(name)
    inner = found[2] if found else ""
    if name in _OUTSIDE:
      out[_OUTSIDE[name]] = tensor
    elif inner in MODULES:
      out[f"{found[1]}{MODULES[inner]}.{found[3]}"] = tensor
    elif inner == _FUSED and _divides(tensor, heads + 2 * kv_heads):
      pieces = _cut(tensor, (heads, kv_heads, kv_heads))
      for part, piece in zip(_PARTS, pieces, strict=True):
        out[f"{found[1]}self_attn.{part}_proj.{found[3]}"] = piece
    else:
      out[name] = tensor
  return out


def _divides(tensor: Any, heads: int) -> bool:
  plain = isinstance(tensor, Lazy) and bool(tensor.shape)
  return plain and tensor.shape[0] % heads == 0


def _cut(tensor: Lazy, heads: tuple[int, ...]) -> list[Lazy]:
  """Returns a tensor's rows in pieces of so many heads each."""
  rows = tensor.shape[0] // sum(heads)
  size = tensor.raw.size // sum(heads)
  out, start = [], 0
  for count in heads:
    raw = tensor.raw.part(start * size, (start + count) * size)
    shape = (count * rows, *tensor.shape[1:])
    out.append(dataclasses.replace(tensor, shape=shape, raw=raw))
    start += count
  return out


def to_llada2_names(tensors: Mapping[str, Pending]) -> dict[str, Pending]:
  """Returns tensors under LLaDA 2's names; undoes `to_qwen3_moe_names`."""
  outside = {ours: theirs for theirs, ours in _OUTSIDE.items()}
  layer = {ours: theirs for theirs, ours in MODULES.items()}
  out: dict[str, Pending] = {}
  for name, tensor in tensors.items():
    found = _OF_LAYER.fullmatch(name)
    inner = found[2] if found else ""
    if inner == "self_attn.q_proj":
      parts = [
        tensors[f"{found[1]}self_attn.{part}_proj.{found[3]}"]
        for part in _PARTS
      ]
      out[f"{found[1]}{_FUSED}.{found[3]}"] = _joined(parts)
    elif inner in ("self_attn.k_proj", "self_attn.v_proj"):
      continue
    elif inner in layer:
      out[f"{found[1]}{layer[inner]}.{found[3]}"] = tensor
    else:
      out[outside.get(name, name)] = tensor
  return out


def _joined(parts: list[Pending]) -> Pending:
  rows = sum(part.shape[0] for part in parts)
  # They were one tensor; adapters or rounding may have made them differ.
  dtype = np.result_type(*(part.dtype for part in parts))
  return Pending(
    (rows, *parts[0].shape[1:]),
    dtype,
    lambda: np.concatenate([p.array().astype(dtype) for p in parts]),
  )
