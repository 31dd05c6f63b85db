"""config.json of Hugging Face models, written.

The first family that can describe a model does; what is written is read back
and has to give the same model.
"""

import dataclasses
from typing import Any

from research.interop.hf import hf_config, hf_experts_config, hf_llada2, hf_rope
from research.nn import presets
from research.nn.mlp import Mlp
from research.nn.transformer import Transformer
from research.typing import UserError


def config_from_model(model: Transformer, model_type: str) -> dict[str, Any]:
  """Returns the config.json that describes `model`; inverts the reader.

  Args:
    model: whose layers one of `hf_config.FAMILIES` can describe.
    model_type: that family.

  Raises:
    UserError: reading the result back would not give `model`.
  """
  kinds = model.layer_kinds()
  # Any layer without a window has the shared rotation, if there is one.
  wide = next((k for k in kinds if k.attention.window is None), kinds[0])
  windows = {k.attention.window for k in kinds} - {None}
  a, window = wide.attention, max(windows, default=None)
  # Where some layers have experts, the size is the others'.
  single = next((k for k in kinds if isinstance(k.mlp, Mlp)), wide)
  activations = {v: k for k, v in reversed(hf_config.ACTIVATIONS.items())}
  activation = activations[wide.mlp.activation]
  config: dict[str, Any] = dict(
    model_type=model_type,
    vocab_size=model.vocab_size,
    hidden_size=model.width,
    intermediate_size=single.mlp.hidden,
    num_hidden_layers=len(kinds),
    num_attention_heads=a.heads,
    num_key_value_heads=a.kv_heads,
    head_dim=a.head_dim,
    hidden_act=activation,
    max_position_embeddings=model.max_positions or 2_048,
    rms_norm_eps=model.norm.eps,
    tie_word_embeddings=model.tied,
    torch_dtype=model.dtype,
    **hf_rope.spelled(a.rope),
  )
  config |= hf_experts_config.spelled(kinds, model_type)
  if model_type in ("llama", "qwen3", "qwen3_moe") or a.out_bias:
    config["attention_bias"] = a.out_bias
  if model_type == "llama":
    config["mlp_bias"] = getattr(wide.mlp, "bias", False)
  if model_type.startswith("gemma"):
    config["hidden_activation"] = activation
  if model_type not in ("llama", "gemma"):
    config["sliding_window"] = window
  if model_type in ("qwen2", "qwen3", "gemma2", "gemma3_text"):
    config["layer_types"] = [hf_rope.layer_type(k.attention) for k in kinds]
  if model_type in ("qwen2", "qwen3", "qwen3_moe"):
    config["use_sliding_window"] = window is not None
  if model_type in ("gemma2", "gemma3_text"):
    scale = a.scale if a.scale is not None else a.head_dim**-0.5
    config["query_pre_attn_scalar"] = _whole(scale**-2)
    config["attn_logit_softcapping"] = a.softcap
    config["final_logit_softcapping"] = model.softcap
  if model_type == "gemma3_text":
    local = next((k for k in kinds if k.attention.window), wide)
    config["rope_local_base_freq"] = local.attention.rope.theta
  if model_type == hf_llada2.KIND:
    config.pop("sliding_window")
    config.pop("attention_bias", None)
    config |= dict(
      partial_rotary_factor=a.rope.fraction,
      use_qk_norm=True,
      use_qkv_bias=a.qkv_bias,
      use_bias=a.out_bias,
    )
  if model.time_embedding is not None:
    config[hf_config.CLOCK] = dataclasses.asdict(model.time_embedding)
  _check_described(model, config)
  return config


ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "mixtral": "MixtralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "qwen3_moe": "Qwen3MoeForCausalLM",
  "gemma": "GemmaForCausalLM",
  "gemma2": "Gemma2ForCausalLM",
  "gemma3_text": "Gemma3ForCausalLM",
  hf_llada2.KIND: "LLaDA2MoeModelLM",
}
"""model_type -> the class of transformers, which other readers ask for."""


def describe(model: Transformer, hint: str | None = None) -> dict[str, Any]:
  """Returns the config.json of the first family that can describe `model`.

  Args:
    model: any.
    hint: the family to try before all others, in order.

  Raises:
    UserError: none of `hf_config.FAMILIES` can.
  """
  first = [hint] if hint in hf_config.FAMILIES else []
  for kind in dict.fromkeys([*first, *hf_config.FAMILIES]):
    try:
      return config_from_model(model, kind)
    except UserError:
      continue
  tried = ", ".join(hf_config.FAMILIES)
  raise UserError(
    f"no config.json describes this model; tried {tried}.\n"
    "Expected the layers of one of these families; keep it as --format=orbax."
  )


def _whole(x: float) -> float | int:
  """Returns `x`, or the whole number that rounding moved it from."""
  return round(x) if abs(x - round(x)) < 1e-9 * x else x


def _scaled(model: Transformer) -> list[Any]:
  """Returns the layers with the scale of their logits written out."""
  out = []
  for kind in model.layer_kinds():
    a = kind.attention
    scale = a.head_dim**-0.5 if a.scale is None else a.scale
    out.append(kind.clone(attention=a.clone(scale=scale)))
  return out


def _check_described(model: Transformer, config: dict[str, Any]) -> None:
  where = "the model's configuration"
  family, sizes = hf_config.sizes_from_config(config, where)
  again = presets.transformer(family, sizes, model.dtype)
  same = _scaled(again) == _scaled(model)
  for field in (
    "vocab_size",
    "width",
    "norm",
    "tied",
    "softcap",
    "time_embedding",
  ):
    same = same and getattr(again, field) == getattr(model, field)
  if not same or again.embed_scale != model.embed_scale:
    raise UserError(
      f"config.json of model_type {config['model_type']!r} cannot describe "
      "this model: reading it back gives another one"
    )
