"""The tiny models: one config.json a family, as the Hub's files spell it.

Sizes are odd on purpose: heads that do not divide anything by two, a
vocabulary that is prime, windows shorter than the text, a last layer outside
the pattern's period. `long` texts pass the pretraining length of the RoPE
scalings, so that the scaling matters.
"""

import dataclasses

VOCAB = 67


@dataclasses.dataclass(frozen=True)
class Family:
  """One tiny model: its config.json, and how its files and text look.

  Attributes:
    config: the text of config.json, as a dict.
    shards: number of safetensors files; more than one adds an index.
    length: tokens a row of the golden text.
    norm_offset: what a norm's stored weights scatter around (Gemma adds 1).
    saved_by_peer: config.json is what transformers itself writes (the new
      spelling, `rope_parameters`), not the Hub's spelling above.
    seed: of the weights; chosen so that no greedy choice is a near tie.
    stacked: experts lie in the file as transformers 5 computes with them, not
      one by one as in the Hub's files.
    embed_std: of the embedding; smaller where a tied head would otherwise
      repeat its input whatever the layers say.
  """

  config: dict
  shards: int = 1
  length: int = 24
  norm_offset: float = 1.0
  saved_by_peer: bool = False
  stacked: bool = False
  seed: int = 0
  embed_std: float = 0.3


def _config(architecture, model_type, *, width, heads, kv_heads, **rest):
  base = dict(
    architectures=[architecture],
    model_type=model_type,
    vocab_size=VOCAB,
    hidden_size=width,
    intermediate_size=44,
    num_hidden_layers=3,
    num_attention_heads=heads,
    num_key_value_heads=kv_heads,
    hidden_act="silu",
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    torch_dtype="float32",
    bos_token_id=1,
    eos_token_id=2,
  )
  return base | rest


def _llama(width=40, heads=5, kv_heads=1, **rest):
  return _config(
    "LlamaForCausalLM",
    "llama",
    width=width,
    heads=heads,
    kv_heads=kv_heads,
    **rest,
  )


def _gemma(architecture, model_type, **rest):
  defaults = dict(
    width=30,
    heads=6,
    kv_heads=2,
    head_dim=8,
    hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh",
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    bos_token_id=2,
    eos_token_id=1,
    pad_token_id=0,
  )
  return _config(architecture, model_type, **(defaults | rest))


_LLAMA3_SCALING = dict(
  rope_type="llama3",
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=32,
)
_GEMMA3 = _gemma(
  "Gemma3ForCausalLM",
  "gemma3_text",
  num_hidden_layers=8,
  intermediate_size=36,
  query_pre_attn_scalar=11,
  sliding_window=7,
  sliding_window_pattern=6,
  rope_theta=1e6,
  rope_local_base_freq=1e4,
  rope_scaling=dict(factor=8.0, rope_type="linear"),
  attn_logit_softcapping=None,
  final_logit_softcapping=None,
)
# Wavelengths 6.3, 17.7, 50, ...: one above the high band, one between the
# bands, the others below, for an original length of 32.
_LLAMA3 = _llama(
  width=36,
  heads=6,
  kv_heads=2,
  head_dim=12,
  rope_theta=500.0,
  rope_scaling=_LLAMA3_SCALING,
)

_MIXTRAL = _config(
  "MixtralForCausalLM",
  "mixtral",
  width=36,
  heads=6,
  kv_heads=2,
  intermediate_size=20,
  rope_theta=1e6,
  sliding_window=None,
  num_local_experts=5,
  num_experts_per_tok=2,
)
_QWEN3_MOE = _config(
  "Qwen3MoeForCausalLM",
  "qwen3_moe",
  width=30,
  heads=5,
  kv_heads=1,
  head_dim=8,
  rms_norm_eps=1e-6,
  rope_theta=1e6,
  num_hidden_layers=4,
  attention_bias=False,
  use_sliding_window=False,
  sliding_window=None,
  num_experts=7,
  num_experts_per_tok=3,
  moe_intermediate_size=12,
  norm_topk_prob=True,
  decoder_sparse_step=1,
  mlp_only_layers=[0],
)

FAMILIES = {
  "llama": Family(_llama(), seed=1),
  "llama3": Family(_LLAMA3, length=40, seed=1),
  "llama3_saved": Family(_LLAMA3, length=40, saved_by_peer=True, seed=1),
  "llama_biases": Family(
    _llama(width=36, heads=6, kv_heads=2, attention_bias=True, mlp_bias=True),
    seed=1,
  ),
  "llama_linear": Family(
    _llama(rope_scaling=dict(type="linear", factor=2.5)), length=40, seed=2
  ),
  "llama_dynamic": Family(
    _llama(
      max_position_embeddings=20,
      rope_scaling=dict(type="dynamic", factor=3.0),
    ),
    length=40,
  ),
  "llama_yarn": Family(
    _llama(
      rope_scaling=dict(
        rope_type="yarn",
        factor=8.0,
        original_max_position_embeddings=16,
        beta_fast=2.0,
        beta_slow=0.5,
      )
    ),
    length=40,
    seed=2,
  ),
  "smollm2": Family(
    _llama(
      width=36,
      heads=6,
      kv_heads=2,
      tie_word_embeddings=True,
      rope_theta=100000.0,
    ),
    seed=5,
  ),
  "mistral": Family(
    _config(
      "MistralForCausalLM",
      "mistral",
      width=36,
      heads=6,
      kv_heads=2,
      sliding_window=7,
    ),
    seed=3,
  ),
  "mixtral": Family(_MIXTRAL, seed=1),
  "mixtral_stacked": Family(_MIXTRAL, saved_by_peer=True, stacked=True, seed=1),
  "qwen2": Family(
    _config(
      "Qwen2ForCausalLM",
      "qwen2",
      width=40,
      heads=5,
      kv_heads=1,
      rms_norm_eps=1e-6,
      rope_theta=1e6,
      use_sliding_window=False,
      sliding_window=7,
      max_window_layers=1,
    ),
    shards=3,
    seed=3,
  ),
  "qwen2_window": Family(
    _config(
      "Qwen2ForCausalLM",
      "qwen2",
      width=24,
      heads=6,
      kv_heads=2,
      rms_norm_eps=1e-6,
      rope_theta=1e6,
      use_sliding_window=True,
      sliding_window=7,
      max_window_layers=1,
      tie_word_embeddings=True,
    ),
    seed=3,
  ),
  "qwen3": Family(
    _config(
      "Qwen3ForCausalLM",
      "qwen3",
      width=30,
      heads=5,
      kv_heads=1,
      head_dim=8,
      rms_norm_eps=1e-6,
      rope_theta=1e6,
      attention_bias=False,
      use_sliding_window=False,
      sliding_window=None,
      max_window_layers=3,
      tie_word_embeddings=True,
    )
  ),
  "qwen3_moe": Family(_QWEN3_MOE, shards=2, seed=1),
  "qwen3_moe_saved": Family(
    _QWEN3_MOE
    | dict(
      norm_topk_prob=False,
      mlp_only_layers=[],
      decoder_sparse_step=2,
      attention_bias=True,
      use_sliding_window=True,
      sliding_window=7,
    ),
    saved_by_peer=True,
    stacked=True,
    seed=1,
  ),
  "gemma": Family(_gemma("GemmaForCausalLM", "gemma"), norm_offset=0.0, seed=4),
  "gemma2": Family(
    _gemma(
      "Gemma2ForCausalLM",
      "gemma2",
      query_pre_attn_scalar=11,
      sliding_window=7,
      attn_logit_softcapping=5.0,
      final_logit_softcapping=1.0,
    ),
    shards=2,
    norm_offset=0.0,
    embed_std=0.08,
  ),
  "gemma3": Family(_GEMMA3, norm_offset=0.0, embed_std=0.08, seed=3),
  "gemma3_saved": Family(
    _GEMMA3, norm_offset=0.0, embed_std=0.08, saved_by_peer=True, seed=3
  ),
}
