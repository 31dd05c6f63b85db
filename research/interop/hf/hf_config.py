"""config.json of Hugging Face models, read; `hf_config_write` inverts it.

Everything that changes what a model computes is either understood or an error
that names the field. Fields a file leaves out have the defaults of
transformers' own configuration classes, which the Hub's files rely on.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from research.interop.hf import hf_experts_config, hf_llada, hf_llada2, hf_rope
from research.interop.hf.hf_rope import KINDS
from research.io.fields import Fields
from research.nn import presets
from research.nn.time_embedding import TimeEmbedding
from research.typing import UserError

FAMILIES = {
  "llama": "llama",
  "mistral": "mistral",
  "mixtral": "mixtral",
  "qwen2": "qwen2",
  "qwen3": "qwen3",
  "qwen3_moe": "qwen3_moe",
  "gemma": "gemma",
  "gemma2": "gemma2",
  "gemma3_text": "gemma3",
  hf_llada2.KIND: "qwen3",
}
"""model_type -> row of `presets.FAMILIES`; `gemma3` is its text part."""

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

DEFAULTS: dict[str, dict[str, Any]] = {
  "llama": _SHARED | dict(max_position_embeddings=2_048),
  "mistral": _SHARED
  | dict(max_position_embeddings=131_072, sliding_window=4_096),
  "mixtral": _SHARED
  | dict(
    rms_norm_eps=1e-5,
    rope_theta=1_000_000.0,
    max_position_embeddings=131_072,
    num_key_value_heads=8,
    num_experts_per_tok=2,
    num_local_experts=8,
  ),
  "qwen2": _SHARED | dict(max_position_embeddings=32_768, max_window_layers=28),
  "qwen3": _SHARED
  | dict(max_position_embeddings=32_768, max_window_layers=28, head_dim=128),
  "qwen3_moe": _SHARED
  | dict(
    max_position_embeddings=32_768,
    sliding_window=4_096,
    num_key_value_heads=4,
    num_experts_per_tok=8,
    num_local_experts=128,
    moe_intermediate_size=768,
    decoder_sparse_step=1,
  ),
  "gemma": _GEMMA,
  "gemma2": _GEMMA2,
  # Multimodal files state only what differs from these.
  "gemma3_text": _GEMMA2
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
  hf_llada2.KIND: hf_llada2.DEFAULTS,
}

CLOCK = "time_conditioning"
"""Our own field of models that are told the time (`research.nn.time_embedding`)."""

MAX_DEPTH = 4_096
"""Layers; what a file claims is written out one by one."""

ACTIVATIONS: dict[str, Any] = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
  "relu": "relu",
}

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
  "embedding_multiplier": (None, 1.0),
  "residual_multiplier": (None, 1.0),
  "logits_scaling": (None, 1.0),
}
"""Features no supported family has here: field -> values that mean "off"."""


def sizes_from_config(
  config: Mapping[str, Any], where: str = "config.json"
) -> tuple[presets.Family, presets.Sizes]:
  """Returns the family and sizes that a config.json describes.

  Args:
    config: the parsed file; `gemma3` (multimodal) gives its text part.
    where: the file, for messages.

  Raises:
    UserError: an unknown architecture, an unsupported feature, or a field of
      the wrong type.
  """
  fields = text_fields(config, where)
  kind = fields.values["model_type"]
  fields.neutral({k: v for k, v in NEUTRAL.items() if not _read(k, kind)})
  family = presets.FAMILIES[FAMILIES[kind]]
  biased = fields.flag("attention_bias")
  if biased and kind in ("mistral", "mixtral", "qwen2"):
    raise fields.wrong("attention_bias", f"false: {kind} has none to switch")
  if fields.flag("mlp_bias") and kind != "llama":
    raise fields.wrong("mlp_bias", f"false: {kind} has no such biases")
  before = after = biased
  if kind == hf_llada2.KIND:
    hf_llada2.check(fields)
    before, after = fields.flag("use_qkv_bias"), fields.flag("use_bias")
  family = dataclasses.replace(
    family,
    activation=_activation(fields, kind),
    qkv_bias=family.qkv_bias or before,
    out_bias=after,
    mlp_bias=fields.flag("mlp_bias"),
  )
  return family, _sizes(fields, kind)


def _read(name: str, kind: str) -> bool:
  return name in hf_experts_config.KINDS.get(kind, ())


def text_fields(config: Mapping[str, Any], where: str) -> Fields:
  """Returns the fields of the language model in a config.json."""
  kind = config.get("model_type")
  if kind == "gemma3":
    inner = Fields(config, where).object("text_config")
    if inner is None:
      raise UserError(f"{where}: model_type is 'gemma3' without text_config")
    values = {"model_type": "gemma3_text"} | dict(inner.values)
    if "tie_word_embeddings" in config:
      values.setdefault("tie_word_embeddings", config["tie_word_embeddings"])
    config, where, kind = values, inner.where, values["model_type"]
  if kind in hf_llada.KINDS:
    config = hf_llada.as_known(config, where)
    kind = config["model_type"]
  if kind == "Dream":
    # Qwen2, but for what it is asked: its mask.
    config, kind = dict(config) | {"model_type": "qwen2"}, "qwen2"
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise UserError(
      f"{where}: model_type is {repr(kind)[:80]}, which is not supported.\n"
      f"Supported: {', '.join(FAMILIES)}, gemma3 (its text part), llada, Dream."
    )
  return Fields(config, where, DEFAULTS[kind])


def _activation(fields: Fields, kind: str) -> Any:
  # Gemma files name an exact GELU in `hidden_act` that no Gemma was trained
  # with; `hidden_activation` or the tanh form is what they mean.
  name = "hidden_act"
  if kind.startswith("gemma"):
    name = "hidden_activation"
    if fields.get(name) is None:
      return "gelu_tanh"
  found = fields.get(name)
  if not isinstance(found, str) or found not in ACTIVATIONS:
    raise fields.wrong(name, f"one of {', '.join(ACTIVATIONS)}")
  return ACTIVATIONS[found]


def _sizes(fields: Fields, kind: str) -> presets.Sizes:
  width = fields.integer("hidden_size")
  heads = fields.integer("num_attention_heads")
  kv_heads = fields.maybe_integer("num_key_value_heads") or heads
  head_dim = fields.maybe_integer("head_dim") or width // heads
  if heads % kv_heads:
    raise fields.wrong("num_key_value_heads", f"a divisor of {heads} heads")
  if head_dim % 2 or head_dim < 2:
    raise UserError(
      f"{fields.where}: head_dim is {head_dim}, expected an even number: "
      "rotations pair dimensions"
    )
  window = fields.maybe_integer("sliding_window")
  if kind in ("llama", "gemma", hf_llada2.KIND) or (
    kind in ("qwen2", "qwen3", "qwen3_moe")
    and not fields.flag("use_sliding_window")
  ):
    window = None
  theta, local_theta, scaling = hf_rope.rotation(
    fields, separate_local=kind == "gemma3_text"
  )
  query_scale = None
  if kind in ("gemma2", "gemma3_text"):
    query_scale = fields.number("query_pre_attn_scalar") ** -0.5
  return presets.Sizes(
    vocab=fields.integer("vocab_size"),
    width=width,
    depth=fields.integer("num_hidden_layers", most=MAX_DEPTH),
    heads=heads,
    kv_heads=kv_heads,
    hidden=fields.integer("intermediate_size"),
    head_dim=head_dim,
    sparse=hf_experts_config.read(fields, kind),
    rotated=_rotated(fields, kind, head_dim),
    theta=theta,
    scaling=scaling,
    local_theta=local_theta,
    window=window,
    eps=fields.number("rms_norm_eps"),
    tied=fields.flag("tie_word_embeddings"),
    attention_scale=query_scale,
    attention_softcap=fields.maybe_number("attn_logit_softcapping"),
    logit_softcap=fields.maybe_number("final_logit_softcapping"),
    pattern=_pattern(fields, kind, window),
    max_positions=fields.integer("max_position_embeddings"),
    clock=_clock(fields.object(CLOCK)),
  )


def _clock(fields: Fields | None) -> TimeEmbedding | None:
  """Returns how a model of ours is told the time, or None."""
  if fields is None:
    return None
  sizes = {
    name: fields.integer(name) for name in ("features", "hidden", "width")
  }
  try:
    return TimeEmbedding(
      told=str(fields.get("told")),
      scale=fields.number("scale"),
      closed=fields.flag("closed"),
      **sizes,
    )
  except UserError as e:
    raise UserError(f"{fields.where}: {e}") from e


def _rotated(fields: Fields, kind: str, head_dim: int) -> float:
  """Returns the share of a head's dimensions that rotate."""
  if kind != hf_llada2.KIND:
    return 1.0
  share = fields.number("partial_rotary_factor")
  count = int(head_dim * share)
  if share > 1 or count % 2 or not count:
    raise fields.wrong(
      "partial_rotary_factor", f"an even part of head_dim, {head_dim}"
    )
  return share


def _pattern(fields: Fields, kind: str, window: int | None) -> tuple[str, ...]:
  """Returns the shortest pattern of layer kinds that repeats to the depth."""
  depth = fields.integer("num_hidden_layers", most=MAX_DEPTH)
  types = fields.get("layer_types")
  if types is None or kind in hf_experts_config.KINDS:
    kinds = _kinds(fields, kind, depth)
  else:
    ok = isinstance(types, list) and len(types) == depth
    if not ok or any(t not in KINDS for t in types):
      raise fields.wrong(
        "layer_types", f"{depth} times one of {', '.join(KINDS)}"
      )
    kinds = [KINDS[t] for t in types]
  if window is None and kind != "gemma3_text":
    kinds = ["global"] * depth
  for p in range(1, depth + 1):
    if all(k == kinds[i % p] for i, k in enumerate(kinds)):
      return tuple(kinds[:p])
  return tuple(kinds)


def _kinds(fields: Fields, kind: str, depth: int) -> list[str]:
  if kind in ("mistral", *hf_experts_config.KINDS):
    return ["local"] * depth
  if kind in ("qwen2", "qwen3"):
    first = fields.integer("max_window_layers", least=0)
    return ["local" if i >= first else "global" for i in range(depth)]
  if kind in ("gemma2", "gemma3_text"):
    # transformers itself writes the key with an underscore.
    name = "sliding_window_pattern"
    if name not in fields.values and f"_{name}" in fields.values:
      name = f"_{name}"
    every = 2 if kind == "gemma2" else fields.integer(name)
    return ["local" if (i + 1) % every else "global" for i in range(depth)]
  return ["global"] * depth
