"""What a GGUF file calls our parameters, and their shapes."""

import dataclasses

from research.nn import presets


@dataclasses.dataclass(frozen=True)
class Row:
  """One weight under both names.

  Attributes:
    path: ours, inside the tree or inside a layer.
    name: GGUF's, inside the file or after `blk.N.`.
    dims: letters of GGUF's shape (numpy order); `Q` is `N*H`, `K` is `K*H`, `E`
      the number of experts.
    when: the family's flag without which it does not exist, or None.
    heads: the size whose heads llama's converter interleaved, or None.
  """

  path: str
  name: str
  dims: str
  when: str | None = None
  heads: str | None = None


ROPE_FACTORS = "rope_freqs.weight"
"""Says something about the model, and is no weight of it."""

TOP = (
  Row("embed", "token_embd.weight", "VD"),
  Row("final_norm/scale", "output_norm.weight", "D"),
  Row("head", "output.weight", "VD"),
)
ROWS = (
  Row("attention_norm/scale", "attn_norm.weight", "D"),
  Row("attention/q", "attn_q.weight", "QD", heads="heads"),
  Row("attention/k", "attn_k.weight", "KD", heads="kv_heads"),
  Row("attention/v", "attn_v.weight", "KD"),
  Row("attention/o", "attn_output.weight", "DQ"),
  Row("attention/q_bias", "attn_q.bias", "Q", "qkv_bias", "heads"),
  Row("attention/k_bias", "attn_k.bias", "K", "qkv_bias", "kv_heads"),
  Row("attention/v_bias", "attn_v.bias", "K", "qkv_bias"),
  Row("attention/o_bias", "attn_output.bias", "D", "out_bias"),
  Row("attention/q_norm/scale", "attn_q_norm.weight", "H", "qk_norm"),
  Row("attention/k_norm/scale", "attn_k_norm.weight", "H", "qk_norm"),
  Row(
    "post_attention_norm/scale", "post_attention_norm.weight", "D", "post_norm"
  ),
  Row("mlp_norm/scale", "ffn_norm.weight", "D"),
  Row("mlp/gate", "ffn_gate.weight", "FD"),
  Row("mlp/up", "ffn_up.weight", "FD"),
  Row("mlp/down", "ffn_down.weight", "DF"),
  Row("mlp/gate_bias", "ffn_gate.bias", "F", "mlp_bias"),
  Row("mlp/up_bias", "ffn_up.bias", "F", "mlp_bias"),
  Row("mlp/down_bias", "ffn_down.bias", "D", "mlp_bias"),
  Row("post_mlp_norm/scale", "post_ffw_norm.weight", "D", "post_norm"),
)
ROUTER = "mlp/router"
EXPERT_ROWS = (
  Row(ROUTER, "ffn_gate_inp.weight", "ED"),
  Row("mlp/experts/gate", "ffn_gate_exps.weight", "EFD"),
  Row("mlp/experts/up", "ffn_up_exps.weight", "EFD"),
  Row("mlp/experts/down", "ffn_down_exps.weight", "EDF"),
)
"""In place of those of `mlp/`: matrices of a layer's experts are one tensor."""


def rows_of(family: presets.Family, sizes: presets.Sizes) -> list[Row]:
  """Returns the rows of a layer."""
  rows = [r for r in ROWS if r.when is None or getattr(family, r.when)]
  if sizes.sparse is None:
    return rows
  return [r for r in rows if not r.path.startswith("mlp/")] + [*EXPERT_ROWS]
