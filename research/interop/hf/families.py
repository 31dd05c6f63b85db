"""Hugging Face's model types: one row each. A new one goes here.

What a row cannot say of a family's config.json is in `config`, what its files
call tensors in `names`, experts of both in `experts`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from research.interop.hf import llada2


@dataclasses.dataclass(frozen=True)
class ModelType:
  """What a `model_type` says without saying it.

  Attributes:
    preset: row of `presets.FAMILIES`.
    architecture: the class of transformers, which other readers ask for.
    defaults: of fields that a file leaves out: those of transformers' own
      configuration class, which the Hub's files rely on.
    window: whether `sliding_window` counts: always, never, or where
      `use_sliding_window` says so.
    expert_fields: those that mean something here and are refused in families
      without experts; empty in such a family.
    softcaps: those of soft caps, refused in families without them.
    layer_types: whether that field counts; elsewhere it is refused unless it
      says what the family has.
  """

  preset: str
  architecture: str
  defaults: Mapping[str, Any]
  window: Literal["always", "never", "flag"] = "always"
  expert_fields: tuple[str, ...] = ()
  softcaps: tuple[str, ...] = ()
  layer_types: bool = False


_CAPS = "attn_logit_softcapping", "final_logit_softcapping"
_SHARED = dict(
  hidden_act="silu",
  rms_norm_eps=1e-6,
  rope_theta=10_000.0,
  tie_word_embeddings=False,
  head_dim=None,
)
_GEMMA = _SHARED | dict(
  hidden_act="gelu_pytorch_tanh",
  tie_word_embeddings=True,
  head_dim=256,
  max_position_embeddings=8_192,
)
_GEMMA2 = _GEMMA | dict(
  hidden_activation="gelu_pytorch_tanh",
  query_pre_attn_scalar=256,
  sliding_window=4_096,
  attn_logit_softcapping=50.0,
  final_logit_softcapping=30.0,
)

COUNTS = ("num_local_experts", "num_experts")
"""Names of the number of experts: transformers 5 renamed it."""

MODEL_TYPES: dict[str, ModelType] = {
  # LLaVA-1.5's files state only what differs from these.
  "llama": ModelType(
    "llama",
    "LlamaForCausalLM",
    _SHARED
    | dict(
      max_position_embeddings=2_048,
      vocab_size=32_000,
      hidden_size=4_096,
      intermediate_size=11_008,
      num_hidden_layers=32,
      num_attention_heads=32,
    ),
    window="never",
  ),
  "mistral": ModelType(
    "mistral",
    "MistralForCausalLM",
    _SHARED | dict(max_position_embeddings=131_072, sliding_window=4_096),
  ),
  "mixtral": ModelType(
    "mixtral",
    "MixtralForCausalLM",
    _SHARED
    | dict(
      rms_norm_eps=1e-5,
      rope_theta=1_000_000.0,
      max_position_embeddings=131_072,
      num_key_value_heads=8,
      num_experts_per_tok=2,
      num_local_experts=8,
    ),
    expert_fields=COUNTS,
  ),
  "qwen2": ModelType(
    "qwen2",
    "Qwen2ForCausalLM",
    _SHARED
    | dict(
      max_position_embeddings=32_768,
      sliding_window=4_096,
      max_window_layers=28,
    ),
    window="flag",
    layer_types=True,
  ),
  "qwen3": ModelType(
    "qwen3",
    "Qwen3ForCausalLM",
    _SHARED
    | dict(
      max_position_embeddings=32_768,
      sliding_window=4_096,
      max_window_layers=28,
      head_dim=128,
    ),
    window="flag",
    layer_types=True,
  ),
  "qwen3_moe": ModelType(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _SHARED
    | dict(
      max_position_embeddings=32_768,
      sliding_window=4_096,
      num_key_value_heads=4,
      num_experts_per_tok=8,
      num_local_experts=128,
      moe_intermediate_size=768,
      decoder_sparse_step=1,
    ),
    window="flag",
    expert_fields=(*COUNTS, "moe_intermediate_size"),
  ),
  "gemma": ModelType("gemma", "GemmaForCausalLM", _GEMMA, window="never"),
  "gemma2": ModelType(
    "gemma2", "Gemma2ForCausalLM", _GEMMA2, softcaps=_CAPS, layer_types=True
  ),
  # Multimodal files state only what differs from these.
  "gemma3_text": ModelType(
    "gemma3",
    "Gemma3ForCausalLM",
    _GEMMA2
    | dict(
      attn_logit_softcapping=None,
      final_logit_softcapping=None,
      max_position_embeddings=131_072,
      rope_theta=1_000_000.0,
      rope_local_base_freq=10_000.0,
      sliding_window_pattern=6,
      vocab_size=262_208,
      hidden_size=2_304,
      intermediate_size=9_216,
      num_hidden_layers=26,
      num_attention_heads=8,
      num_key_value_heads=4,
    ),
    # transformers computes its attention without the cap that it may say.
    softcaps=_CAPS[1:],
    layer_types=True,
  ),
  llada2.KIND: ModelType(
    "qwen3",
    "LLaDA2MoeModelLM",
    llada2.DEFAULTS,
    window="never",
    expert_fields=llada2.READ,
  ),
}
"""In the order in which `config.describe` tries them."""

ACTIVATIONS: dict[str, Any] = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
  "relu": "relu",
}
"""Theirs -> ours."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
  "num_experts": (None, 0),
  "num_local_experts": (None, 0),
  "n_routed_experts": (None, 0),
  "moe_intermediate_size": (None, 0),
  "quantization_config": (None,),
  "partial_rotary_factor": (None, 1.0),
  "use_bidirectional_attention": (None, False),
  "is_encoder_decoder": (None, False),
  "add_cross_attention": (None, False),
  "use_qk_norm": (None, False),
  "clip_qkv": (None,),
  **dict.fromkeys(_CAPS, (None,)),
  "embedding_multiplier": (None, 1.0),
  "residual_multiplier": (None, 1.0),
  "logits_scaling": (None, 1.0),
}
"""Features no supported family has here: field -> values that mean "off"."""

_LINEAR = "layers of linear attention (a gated delta rule), which are not here"
REFUSED: dict[str, str] = {
  **dict.fromkeys(
    (
      *("qwen3_next", "qwen3_5", "qwen3_5_text"),
      *("qwen3_5_moe", "qwen3_5_moe_text"),
    ),
    _LINEAR,
  ),
  "qwen3_vl_moe": "experts between layers that see images, which are not here",
}
"""Model type -> what it has that no model here has."""
