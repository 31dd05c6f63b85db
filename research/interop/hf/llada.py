"""LLaDA's checkpoints (8B, 1.5; MoE): Llama's layers under OLMo's names.

Its config.json and its tensors are read as those of the Llama that they
describe, and written back under their own names. What such a model is for, the
mask, is `diffusion.spec`'s; Dream's files, and DiffuCoder's, have
Qwen2's names already.

LLaDA-MoE calls itself "llada" too, but has no d_model. It is OLMoE's layer with
norms of each head's queries and keys, which is Qwen3-MoE's, names and all.
"""

import re
from collections.abc import Mapping
from typing import Any

from research.io.fields import Fields
from research.typing import UserError

KIND = "llada"
KINDS = (KIND, "lladamoe")
"""What such files call themselves; some readers rename the mixture."""

_DEFAULTS = dict(
  activation_type="silu",
  alibi=False,
  block_type="llama",
  include_bias=False,
  layer_norm_type="rms",
  rms_norm_eps=1e-5,
  rope=True,
  rope_theta=10_000.0,
  weight_tying=False,
)
_NEEDED: dict[str, tuple[Any, ...]] = {
  "activation_type": ("silu",),
  "alibi": (False,),
  "block_type": ("llama",),
  "include_bias": (False,),
  "layer_norm_type": ("rms",),
  "rope": (True,),
}
"""Fields that have other values only in models that were never published."""

_OFF: dict[str, tuple[Any, ...]] = {
  "attention_layer_norm": (None, False),
  "bias_for_layer_norm": (None, False),
  "clip_qkv": (None,),
  "include_qkv_bias": (None, False),
  "input_emb_norm": (None, False),
  "multi_query_attention": (None, False),
  "num_experts": (None, 0),
  "scale_logits": (None, False),
}

_OUTSIDE = {
  "model.transformer.wte.weight": "model.embed_tokens.weight",
  "model.transformer.ln_f.weight": "model.norm.weight",
  "model.transformer.ff_out.weight": "lm_head.weight",
}
_LAYER = {
  "attn_norm": "input_layernorm",
  "ff_norm": "post_attention_layernorm",
  "q_proj": "self_attn.q_proj",
  "k_proj": "self_attn.k_proj",
  "v_proj": "self_attn.v_proj",
  "attn_out": "self_attn.o_proj",
  "ff_proj": "mlp.gate_proj",
  "up_proj": "mlp.up_proj",
  "ff_out": "mlp.down_proj",
}
_OF_LAYER = re.compile(
  r"model\.transformer\.blocks\.(0|[1-9]\d{0,5})\.(\w+)\.weight"
)
_OF_LLAMA = re.compile(r"model\.layers\.(0|[1-9]\d{0,5})\.([\w.]+)\.weight")


_MIXTURE = dict(
  hidden_act="silu",
  max_position_embeddings=4_096,
  rms_norm_eps=1e-5,
  tie_word_embeddings=False,
)
_NOT_IN_MIXTURES: dict[str, tuple[Any, ...]] = {
  "clip_qkv": (None,),
  "moe_router_enable_expert_bias": (None, False),
  "partial_rotary_factor": (None, 1),
  "shared_expert_intermediate_size": (None,),
}
"""Its code also has a list of fields that it never looks at: how the router
scores and scales, its groups, and `norm_topk_prob`."""


def is_mixture(config: Mapping[str, Any]) -> bool:
  """Whether a LLaDA's config.json is LLaDA-MoE's."""
  return config.get("model_type") in KINDS and "d_model" not in config


def to_known_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Returns the config.json of the Llama or Qwen3-MoE that a LLaDA's describes.

  Raises:
    UserError: it is another architecture, or of the wrong types.
  """
  return (to_qwen3_moe_config if is_mixture(config) else to_llama_config)(
    config, where
  )


def to_qwen3_moe_config(
  config: Mapping[str, Any], where: str
) -> dict[str, Any]:
  """Returns the config.json of the Qwen3-MoE that a LLaDA-MoE's describes."""
  fields = Fields(config, where, _MIXTURE)
  fields.neutral(_NOT_IN_MIXTURES)
  if fields.get("qk_layernorm") is not True:
    raise fields.wrong("qk_layernorm", "true: no other is supported")
  depth, heads = (
    fields.integer(f"num_{name}")
    for name in ("hidden_layers", "attention_heads")
  )
  width = fields.integer("hidden_size")
  if width % heads:
    raise fields.wrong("num_attention_heads", f"a divisor of {width}")
  sparse = fields.get("moe_layer_freq")
  ok = isinstance(sparse, list) and len(sparse) == depth
  if not ok or any(type(x) is not int or x not in (0, 1) for x in sparse):
    raise fields.wrong("moe_layer_freq", f"{depth} times 0 or 1")
  same = (
    "vocab_size",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
    "attention_bias",
    "num_experts",
    "num_experts_per_tok",
  )
  return dict(
    model_type="qwen3_moe",
    hidden_size=width,
    intermediate_size=fields.integer("dense_intermediate_size"),
    moe_intermediate_size=fields.integer("expert_intermediate_size"),
    num_hidden_layers=depth,
    num_attention_heads=heads,
    num_key_value_heads=fields.maybe_integer("num_key_value_heads") or heads,
    head_dim=width // heads,
    norm_topk_prob=False,
    decoder_sparse_step=1,
    mlp_only_layers=[i for i, x in enumerate(sparse) if not x],
    **{name: fields.get(name) for name in same},
  )


def to_llama_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Returns the config.json of the Llama that a LLaDA's describes.

  Raises:
    UserError: it is another architecture, or of the wrong types.
  """
  fields = Fields(config, where, _DEFAULTS)
  fields.neutral(_OFF)
  for name, values in _NEEDED.items():
    if fields.get(name) not in values:
      raise fields.wrong(name, f"{values[0]!r}: no other is supported")
  heads = fields.integer("n_heads")
  width = fields.integer("d_model")
  hidden = fields.maybe_integer("mlp_hidden_size")
  if hidden is None:
    hidden = fields.integer("mlp_ratio") * width
  # The embedding may be larger than the vocabulary, to divide well.
  size = fields.maybe_integer("embedding_size")
  return dict(
    model_type="llama",
    vocab_size=size or fields.integer("vocab_size"),
    hidden_size=width,
    intermediate_size=hidden,
    num_hidden_layers=fields.integer("n_layers"),
    num_attention_heads=heads,
    num_key_value_heads=fields.maybe_integer("n_kv_heads") or heads,
    max_position_embeddings=fields.integer("max_sequence_length"),
    rms_norm_eps=fields.number("rms_norm_eps"),
    rope_theta=fields.number("rope_theta"),
    tie_word_embeddings=fields.flag("weight_tying"),
  )


def to_llama_names[T](tensors: Mapping[str, T]) -> dict[str, T]:
  """Returns LLaDA's tensors under the names of Llama's; others keep theirs."""

  def name(theirs: str) -> str:
    if theirs in _OUTSIDE:
      return _OUTSIDE[theirs]
    found = _OF_LAYER.fullmatch(theirs)
    if found is None or found[2] not in _LAYER:
      return theirs
    return f"model.layers.{found[1]}.{_LAYER[found[2]]}.weight"

  return {name(theirs): x for theirs, x in tensors.items()}


def to_llada_names[T](tensors: Mapping[str, T]) -> dict[str, T]:
  """Returns Llama's tensors under LLaDA's names; undoes `to_llama_names`.

  Raises:
    UserError: one of them has no such name.
  """
  outside = {ours: theirs for theirs, ours in _OUTSIDE.items()}
  layer = {ours: theirs for theirs, ours in _LAYER.items()}

  def name(ours: str) -> str:
    if ours in outside:
      return outside[ours]
    found = _OF_LLAMA.fullmatch(ours)
    if found is None or found[2] not in layer:
      raise UserError(f"{ours}: LLaDA's files have no name for such a tensor")
    return f"model.transformer.blocks.{found[1]}.{layer[found[2]]}.weight"

  return {name(ours): x for ours, x in tensors.items()}
