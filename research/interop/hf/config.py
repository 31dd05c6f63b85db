"""config.json of Hugging Face models: a family and its sizes, both ways.

Everything that changes what a model computes is either understood or an error
that names the field. Fields a file leaves out have the defaults of
transformers' own configuration classes (`families`). What is written is read
back and has to give the same model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from research.interop.hf import experts as hf_experts
from research.interop.hf import llada, llada2
from research.interop.hf import rope as hf_rope
from research.interop.hf.families import (
  ACTIVATIONS,
  MODEL_TYPES,
  NEUTRAL,
  REFUSED,
)
from research.interop.hf.rope import KINDS
from research.io.fields import Fields
from research.nn import presets
from research.nn.mlp import Mlp
from research.nn.time_embedding import TimeEmbedding
from research.nn.transformer import Transformer
from research.typing import UserError

TIME_CONDITIONING = "time_conditioning"
"""Our own field of models that take the time (`nn.time_embedding`)."""

MAX_DEPTH = 4_096
"""Layers; what a file claims is written out one by one."""


def sizes_from_config(
  config: Mapping[str, Any], where: str = "config.json"
) -> tuple[presets.Family, presets.Sizes]:
  """Returns the family and sizes that a config.json describes.

  Args:
    config: the parsed file; `gemma3` (multimodal) gives its text part.

  Raises:
    UserError: an unknown architecture, an unsupported feature, or a field of
      the wrong type.
  """
  fields = text_fields(config, where)
  kind = fields.values["model_type"]
  known = MODEL_TYPES[kind]
  meant = {*known.expert_fields, *known.softcaps}
  fields.neutral({k: v for k, v in NEUTRAL.items() if k not in meant})
  family = presets.FAMILIES[known.preset]
  biased = fields.flag("attention_bias")
  if biased and kind in ("mistral", "mixtral", "qwen2"):
    raise fields.wrong("attention_bias", f"false: {kind} has none to switch")
  if fields.flag("mlp_bias") and kind != "llama":
    raise fields.wrong("mlp_bias", f"false: {kind} has no such biases")
  before = after = biased
  if kind == llada2.KIND:
    llada2.check(fields)
    before, after = fields.flag("use_qkv_bias"), fields.flag("use_bias")
  family = dataclasses.replace(
    family,
    activation=_activation(fields, kind),
    qkv_bias=family.qkv_bias or before,
    out_bias=after,
    mlp_bias=fields.flag("mlp_bias"),
  )
  return family, _sizes(fields, kind)


def kind_of(config: Mapping[str, Any], where: str) -> str | None:
  """Returns the `model_type` of a config.json, None where it has none."""
  kind = config.get("model_type")
  if kind is not None and not isinstance(kind, str):
    raise Fields(config, where).wrong("model_type", "a name")
  return kind


def text_fields(config: Mapping[str, Any], where: str) -> Fields:
  """Returns the fields of the language model in a config.json."""
  kind = kind_of(config, where)
  if kind == "gemma3":
    inner = Fields(config, where).object("text_config")
    if inner is None:
      raise UserError(f"{where}: model_type is 'gemma3' without text_config")
    values = {"model_type": "gemma3_text"} | dict(inner.values)
    if "tie_word_embeddings" in config:
      values.setdefault("tie_word_embeddings", config["tie_word_embeddings"])
    config, where = values, inner.where
    kind = kind_of(values, where)
  if kind in llada.KINDS:
    config = llada.to_known_config(config, where)
    kind = config["model_type"]
  if kind == "Dream":
    # Qwen2, except for its mask.
    config, kind = dict(config) | {"model_type": "qwen2"}, "qwen2"
  if kind in REFUSED:
    raise UserError(f"{where}: model_type {kind!r} has {REFUSED[kind]}")
  if kind not in MODEL_TYPES:
    raise UserError(
      f"{where}: model_type is {repr(kind)[:80]}, which is not supported.\n"
      f"Supported: {', '.join(MODEL_TYPES)}, gemma3 (its text part), llada, "
      "Dream."
    )
  return Fields(config, where, MODEL_TYPES[kind].defaults)


def _activation(fields: Fields, kind: str) -> Any:
  gemma, name = kind.startswith("gemma"), "hidden_act"
  newer = fields.get("hidden_activation") if gemma else None
  if newer is not None and kind != "gemma":
    name = "hidden_activation"
  found = fields.get(name)
  # Gemma files name an exact GELU in `hidden_act` that no Gemma was trained
  # with; the tanh form is what they mean.
  if gemma and name == "hidden_act" and found in (None, "gelu"):
    found = "gelu_pytorch_tanh"
  if not isinstance(found, str) or found not in ACTIVATIONS:
    raise fields.wrong(name, f"one of {', '.join(ACTIVATIONS)}")
  if kind == "gemma" and newer not in (None, found):
    raise fields.wrong("hidden_activation", f"{found!r}, what its code reads")
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
  counts = MODEL_TYPES[kind].window
  if counts == "never" or (
    counts == "flag" and not fields.flag("use_sliding_window")
  ):
    window = None
  theta, local_theta, scaling = hf_rope.from_config(
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
    sparse=hf_experts.from_config(fields, kind),
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
    time_embedding=_time_embedding(fields.object(TIME_CONDITIONING)),
  )


def _time_embedding(fields: Fields | None) -> TimeEmbedding | None:
  if fields is None:
    return None
  sizes = {
    name: fields.integer(name) for name in ("features", "hidden", "width")
  }
  try:
    return TimeEmbedding(
      input=str(fields.get("input")),
      scale=fields.number("scale"),
      zero_gate=fields.flag("zero_gate"),
      **sizes,
    )
  except UserError as e:
    raise UserError(f"{fields.where}: {e}") from e


def _rotated(fields: Fields, kind: str, head_dim: int) -> float:
  if kind != llada2.KIND:
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
  if types is None:
    kinds = _kinds(fields, kind, depth)
  else:
    ok = isinstance(types, list) and len(types) == depth
    if not ok or any(t not in KINDS for t in types):
      raise fields.wrong(
        "layer_types", f"{depth} times one of {', '.join(KINDS)}"
      )
    kinds = [KINDS[t] for t in types]
    counts = MODEL_TYPES[kind].layer_types or window is None
    if not counts and kinds != _kinds(fields, kind, depth):
      raise fields.wrong("layer_types", f"none: {kind} ignores it")
  if window is None and kind != "gemma3_text":
    kinds = ["global"] * depth
  for p in range(1, depth + 1):
    if all(k == kinds[i % p] for i, k in enumerate(kinds)):
      return tuple(kinds[:p])
  return tuple(kinds)


def _kinds(fields: Fields, kind: str, depth: int) -> list[str]:
  if kind == "mistral" or MODEL_TYPES[kind].expert_fields:
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


def config_from_model(model: Transformer, model_type: str) -> dict[str, Any]:
  """Returns the config.json of `model`; inverts `sizes_from_config`.

  Raises:
    UserError: reading the result back would not give `model`.
  """
  kinds = model.layer_kinds()
  # Any layer without a window has the shared rotation, if there is one.
  full = next((k for k in kinds if k.attention.window is None), kinds[0])
  windows = {k.attention.window for k in kinds} - {None}
  a, window = full.attention, max(windows, default=None)
  # Where some layers have experts, the size is the others'.
  single = next((k for k in kinds if isinstance(k.mlp, Mlp)), full)
  activations = {v: k for k, v in reversed(ACTIVATIONS.items())}
  activation = activations[full.mlp.activation]
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
    **hf_rope.to_config(a.rope),
  )
  config |= hf_experts.to_config(kinds, model_type)
  if model_type in ("llama", "qwen3", "qwen3_moe") or a.out_bias:
    config["attention_bias"] = a.out_bias
  if model_type == "llama":
    config["mlp_bias"] = isinstance(full.mlp, Mlp) and full.mlp.bias
  if model_type.startswith("gemma"):
    config["hidden_activation"] = activation
  counts = MODEL_TYPES[model_type].window
  if counts != "never":
    config["sliding_window"] = window
  if model_type in ("qwen2", "qwen3", "gemma2", "gemma3_text"):
    config["layer_types"] = [hf_rope.layer_type(k.attention) for k in kinds]
  if counts == "flag":
    config["use_sliding_window"] = window is not None
  if model_type in ("gemma2", "gemma3_text"):
    scale = a.scale if a.scale is not None else a.head_dim**-0.5
    config["query_pre_attn_scalar"] = _integral(scale**-2)
    config["attn_logit_softcapping"] = a.softcap
    config["final_logit_softcapping"] = model.softcap
  if model_type == "gemma3_text":
    local = next((k for k in kinds if k.attention.window), full)
    config["rope_local_base_freq"] = local.attention.rope.theta
  if model_type == llada2.KIND:
    config.pop("attention_bias", None)
    config |= dict(
      partial_rotary_factor=a.rope.fraction,
      use_qk_norm=True,
      use_qkv_bias=a.qkv_bias,
      use_bias=a.out_bias,
    )
  if model.time_embedding is not None:
    config[TIME_CONDITIONING] = dataclasses.asdict(model.time_embedding)
  _check_described(model, config)
  return config


def describe(model: Transformer, hint: str | None = None) -> dict[str, Any]:
  """Returns the config.json of the first family that can describe `model`.

  Args:
    hint: the family to try before all others, in order.

  Raises:
    UserError: none of `families.MODEL_TYPES` can.
  """
  first = [hint] if hint in MODEL_TYPES else []
  for kind in dict.fromkeys([*first, *MODEL_TYPES]):
    try:
      return config_from_model(model, kind)
    except UserError:
      continue
  tried = ", ".join(MODEL_TYPES)
  raise UserError(
    f"no config.json describes this model; tried {tried}.\n"
    "Expected the layers of one of these families; keep it as --format=orbax."
  )


def _integral(x: float) -> float | int:
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
  family, sizes = sizes_from_config(config, where)
  again = presets.transformer(family, sizes, model.dtype)
  same = _scaled(again) == _scaled(model)
  for field in (
    "vocab_size",
    "width",
    "norm",
    "tied",
    "softcap",
    "time_embedding",
    "per_layer",
    "input_vocab",
  ):
    same = same and getattr(again, field) == getattr(model, field)
  if not same or again.embed_scale != model.embed_scale:
    raise UserError(
      f"config.json of model_type {config['model_type']!r} cannot describe "
      "this model: reading it back gives another one"
    )
