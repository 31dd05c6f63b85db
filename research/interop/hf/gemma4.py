"""Gemma 4's language models in config.json, both ways.

Files say the sizes of global layers in two spellings: `global_head_dim`, the
released ones', and since transformers 5.24 an object a layer
(`per_layer_config`). The mixture of experts (26B-A4B) is refused by name.
"""

from collections.abc import Mapping
from typing import Any

from research.interop.hf import rope as hf_rope
from research.interop.hf.families import ACTIVATIONS
from research.io.fields import Fields
from research.nn.gemma4 import Gemma4Sizes, gemma4
from research.nn.norm import LayerScalar
from research.nn.transformer import Transformer
from research.typing import UserError

KIND = "gemma4_text"

DEFAULTS = dict(
  vocab_size=262_144,
  hidden_size=2_304,
  intermediate_size=9_216,
  num_hidden_layers=30,
  num_attention_heads=8,
  num_key_value_heads=4,
  head_dim=256,
  global_head_dim=512,
  num_global_key_value_heads=None,
  hidden_activation="gelu_pytorch_tanh",
  max_position_embeddings=131_072,
  rms_norm_eps=1e-6,
  pad_token_id=0,
  tie_word_embeddings=True,
  sliding_window=512,
  final_logit_softcapping=None,
  use_bidirectional_attention=None,
  vocab_size_per_layer_input=262_144,
  hidden_size_per_layer_input=256,
  attention_k_eq_v=False,
  num_kv_shared_layers=0,
  use_double_wide_mlp=False,
  attention_bias=False,
)
"""Fields that a file leaves out: those of transformers' own class."""

_ROTATIONS = {
  "sliding_attention": dict(rope_type="default", rope_theta=10_000.0),
  "full_attention": dict(
    rope_type="proportional", partial_rotary_factor=0.25, rope_theta=1e6
  ),
}
_EVERY = 6
"""Each sixth layer is global, where a file names no types of layers."""

_MOST = 4_096


def read(
  config: Mapping[str, Any], where: str, dtype: str = "float32"
) -> Transformer:
  """Returns the language model of its text fields.

  Raises:
    UserError: another model type, experts, or a field of a wrong value.
  """
  fields = Fields(config, where, DEFAULTS)
  if fields.get("model_type") != KIND:
    raise fields.wrong("model_type", KIND)
  if fields.flag("enable_moe_block"):
    raise UserError(
      f"{where}: enable_moe_block is true: Gemma 4's mixture of experts"
      " (26B-A4B) is not supported; expected a dense model"
    )
  fields.neutral(
    {
      "attention_bias": (None, False),
      "quantization_config": (None,),
      "use_bidirectional_attention": (None, "vision"),
    }
  )
  activation = fields.get("hidden_activation")
  if activation not in ACTIVATIONS:
    raise fields.wrong("hidden_activation", f"one of {', '.join(ACTIVATIONS)}")
  hidden = fields.integer("intermediate_size")
  wide = fields.flag("use_double_wide_mlp")
  kinds = _kinds(fields)
  per_layer = 0
  if config.get("hidden_size_per_layer_input", 1) is not None:
    per_layer = fields.integer("hidden_size_per_layer_input", least=0)
  sizes = Gemma4Sizes(
    vocab=fields.integer("vocab_size"),
    width=fields.integer("hidden_size"),
    hidden=hidden,
    heads=fields.integer("num_attention_heads"),
    kinds=kinds,
    kv_heads=fields.integer("num_key_value_heads"),
    head_dim=fields.integer("head_dim"),
    window=fields.integer("sliding_window"),
    kv_shared_layers=fields.integer("num_kv_shared_layers", least=0),
    kv_shared_hidden=hidden * (2 if wide else 1),
    per_layer=per_layer,
    per_layer_vocab=fields.integer("vocab_size_per_layer_input")
    if per_layer
    else 0,
    padding=fields.integer("pad_token_id", least=0),
    eps=fields.number("rms_norm_eps"),
    activation=ACTIVATIONS[activation],
    softcap=fields.maybe_number("final_logit_softcapping"),
    tied=fields.flag("tie_word_embeddings"),
    max_positions=fields.integer("max_position_embeddings"),
    **_global(fields, kinds),
    **_rotations(fields),
  )
  _check_heads(fields, sizes)
  return gemma4(sizes, dtype)


def _kinds(fields: Fields) -> tuple[str, ...]:
  depth = fields.integer("num_hidden_layers", most=_MOST)
  types = fields.get("layer_types")
  if types is None:
    types = [
      "sliding_attention" if (i + 1) % _EVERY else "full_attention"
      for i in range(depth)
    ]
  known = hf_rope.KINDS
  ok = isinstance(types, list | tuple) and len(types) == depth
  if not ok or any(t not in known for t in types):
    raise fields.wrong(
      "layer_types", f"{depth} times one of {', '.join(known)}"
    )
  # transformers makes the last layer global, whatever the file says.
  return (*(known[t] for t in types[:-1]), "global")


def _global(fields: Fields, kinds: tuple[str, ...]) -> dict[str, Any]:
  own = fields
  given = fields.object("per_layer_config")
  if given is not None and given.values:
    expected = {str(i) for i, kind in enumerate(kinds) if kind == "global"}
    first = min(given.values, key=int)
    one = given.object(first)
    same = all(x == one.values for x in given.values.values())
    if set(given.values) != expected or not same:
      raise fields.wrong("per_layer_config", "the same of each global layer")
    own = Fields(
      dict(
        global_head_dim=one.get("head_dim"),
        num_global_key_value_heads=one.get("num_key_value_heads"),
      ),
      one.where,
      dict(global_head_dim=fields.integer("head_dim")),
    )
  keys = fields.flag("attention_k_eq_v")
  heads = own.maybe_integer("num_global_key_value_heads") if keys else None
  images = fields.get("use_bidirectional_attention") == "vision"
  return dict(
    global_head_dim=own.integer("global_head_dim"),
    global_kv_heads=heads or fields.integer("num_key_value_heads"),
    global_values="keys" if keys else "projected",
    global_images="causal" if images else "as_masked",
  )


def _rotations(fields: Fields) -> dict[str, Any]:
  given = fields.object("rope_parameters")
  given = given or Fields(_ROTATIONS, fields.where)
  local = given.object("sliding_attention") or Fields({}, given.where)
  full = given.object("full_attention") or Fields({}, given.where)
  local.neutral({"rope_type": (None, "default")})
  full.neutral({"rope_type": ("proportional",)})
  share = full.get("partial_rotary_factor")
  return dict(
    local_theta=local.number("rope_theta"),
    theta=full.number("rope_theta"),
    rotated=1.0 if share is None else full.number("partial_rotary_factor"),
    factor=full.maybe_number("factor") or 1.0,
  )


def _check_heads(fields: Fields, sizes: Gemma4Sizes) -> None:
  for kv, dim in (
    (sizes.kv_heads, sizes.head_dim),
    (sizes.global_kv_heads, sizes.global_head_dim),
  ):
    if sizes.heads % kv:
      raise fields.wrong(
        "num_key_value_heads", f"divisors of {sizes.heads} heads"
      )
    if dim % 2:
      raise fields.wrong("head_dim", "even numbers: rotations pair dimensions")


def write(model: Transformer) -> dict[str, Any]:
  """Returns the text fields of a language model; inverts `read`.

  Raises:
    UserError: it is none of this kind.
  """
  kinds = model.layer_kinds()
  if not isinstance(kinds[0].output_scale, LayerScalar):
    raise UserError(f"{KIND}: found layers of another kind")
  full = kinds[-1]
  local = next((k for k in kinds if k.attention.window is not None), full)
  a, g = local.attention, full.attention
  kv_shared_layers = sum(k.attention.kv == "borrowed" for k in kinds)
  activations = {v: k for k, v in reversed(ACTIVATIONS.items())}
  keys, inputs = g.values == "keys", model.per_layer
  config: dict[str, Any] = dict(
    model_type=KIND,
    vocab_size=model.vocab_size,
    hidden_size=model.width,
    intermediate_size=kinds[0].mlp.hidden,
    num_hidden_layers=len(kinds),
    num_attention_heads=a.heads,
    num_key_value_heads=a.kv_heads,
    head_dim=a.head_dim,
    global_head_dim=g.head_dim,
    num_global_key_value_heads=g.kv_heads if keys else None,
    hidden_activation=activations[full.mlp.activation],
    max_position_embeddings=model.max_positions,
    rms_norm_eps=model.norm.eps,
    pad_token_id=0 if inputs is None else inputs.padding,
    tie_word_embeddings=model.tied,
    sliding_window=a.window or DEFAULTS["sliding_window"],
    layer_types=[hf_rope.layer_type(k.attention) for k in kinds],
    final_logit_softcapping=model.softcap,
    use_bidirectional_attention="vision" if g.images == "causal" else None,
    hidden_size_per_layer_input=0 if inputs is None else inputs.size,
    vocab_size_per_layer_input=(
      model.vocab_size if inputs is None else inputs.vocab
    ),
    attention_k_eq_v=keys,
    num_kv_shared_layers=kv_shared_layers,
    use_double_wide_mlp=full.mlp.hidden > kinds[0].mlp.hidden,
    rope_parameters={
      "sliding_attention": _ROTATIONS["sliding_attention"]
      | dict(rope_theta=a.rope.theta),
      "full_attention": dict(
        rope_type="proportional",
        rope_theta=g.rope.theta,
        partial_rotary_factor=g.rope.scaling.fraction,
        factor=g.rope.scaling.factor,
      ),
    },
    torch_dtype=model.dtype,
  )
  return config
