"""Molmo 2: overlapping tiles, attention over groups of patches (2601.10611).

Images alone: nothing here reads videos. Refused by name: models whose queries
are normalised over all heads, or whose norms stand behind (Molmo2-O-7B), and a
scaled rotation.
"""

from typing import Any

from research.interop.hf import config as hf_config
from research.interop.vision import names, towers
from research.interop.vision.families.family import (
  Config,
  Family,
  Language,
  Parts,
  language_model,
)
from research.interop.vision.molmo2_names import Molmo2Names
from research.io.fields import Fields
from research.nn.transformer import Transformer
from research.vlm import connectors
from research.vlm.encoders import presets
from research.vlm.encoders.presets import EncoderSizes
from research.vlm.encoders.vit import Features, VisionTransformer
from research.vlm.images.presets import MOLMO2_PROMPT
from research.vlm.masks import BidirectionalVision
from research.vlm.model import VisionLanguageModel
from research.vlm.splice import Splice

KIND = "molmo2_text"
DEFAULTS = dict(
  image_patch_id=151_938,
  image_start_token_id=151_936,
  image_end_token_id=151_937,
  image_col_id=151_939,
  low_res_image_start_token_id=151_940,
  image_low_res_id=151_942,
  frame_start_token_id=151_943,
  frame_end_token_id=151_944,
)
_AROUND = tuple(DEFAULTS)
"""The fields with ids of the placeholder, and of tokens around an image."""

_TEXT = dict(
  hidden_size=4_096, num_attention_heads=32, num_key_value_heads=8,
  head_dim=128, vocab_size=151_936, additional_vocab_size=128,
  qk_norm_type="qwen3", num_hidden_layers=36, intermediate_size=12_288,
  hidden_act="silu", max_position_embeddings=36_864, rms_norm_eps=1e-6,
  rope_theta=10_000.0, tie_word_embeddings=False,
)  # fmt: skip
_VISION = dict(
  hidden_size=1_152, intermediate_size=4_304, num_hidden_layers=25,
  num_attention_heads=16, num_key_value_heads=16, head_dim=72,
  hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, image_size=[378, 378],
  patch_size=14, num_channels=3,
)  # fmt: skip
_ADAPTER = dict(
  vision_feature_layer=[24, 18], hidden_size=1_152, num_attention_heads=16,
  num_key_value_heads=16, head_dim=72, hidden_act="silu",
  intermediate_size=18_944, text_hidden_size=3_584,
)  # fmt: skip

_RELEASED = {
  "image_default_input_size": "image_size",
  "image_patch_size": "patch_size",
  "image_num_pos": "num_position_embeddings",
  "vit_layers": "vision_feature_layer",
  "layer_norm_eps": "rms_norm_eps",
  "qkv_bias": "attention_bias",
}
"""Fields of the released files -> those that transformers has renamed."""


def _renamed(config: Config, *known: str) -> dict[str, Any]:
  return {
    _RELEASED[k] if _RELEASED.get(k) in known else k: v
    for k, v in config.items()
  }


def _vision_config(config: Config) -> dict[str, Any]:
  released = config.get("vit_config")
  own = dict(config.get("vision_config") or released or {})
  own = _renamed(own, "image_size", "patch_size", "num_position_embeddings")
  own["model_type"] = "molmo2_vision"
  if released and not config.get("vision_config"):
    # Released files say 27 layers and have those that are read.
    own["num_hidden_layers"] = 1 + max(_layers(config, "config.json"))
  return own


def _layers(config: Config, where: str) -> list[int]:
  """Returns the layers that are read, counted from 0 where a file is released.

  Those of other files may count from the last layer.
  """
  fields = _adapter(config, where)
  layers = fields.get("vision_feature_layer")
  if not isinstance(layers, list | tuple) or any(
    type(i) is not int for i in layers
  ):
    raise fields.wrong("vision_feature_layer", "numbers of layers")
  released = config.get("vit_config")
  if not released or config.get("vision_config"):
    return list(layers)
  depth = Fields(released, f"{where}: vit_config", _VISION)
  return [i % depth.integer("num_hidden_layers") for i in layers]


def _adapter(config: Config, where: str) -> Fields:
  inner = dict(config.get("adapter_config") or {})
  inner = _renamed(inner, "vision_feature_layer")
  return Fields(inner, f"{where}: adapter_config", _ADAPTER)


def _read_vision(config: Config, where: str, dtype: str) -> VisionTransformer:
  fields = Fields(config, where, _VISION)
  fields.neutral({"attention_bias": (None, True)})
  if fields.integer("num_channels") != 3:
    raise fields.wrong("num_channels", "3")
  width, heads = fields.integer("hidden_size"), _heads(fields)
  if heads[0] * heads[1] != width:
    raise fields.wrong("head_dim", f"{width} over the number of heads")
  size, patch = fields.get("image_size"), fields.integer("patch_size")
  if not isinstance(size, list | tuple) or len(set(size)) != 1:
    raise fields.wrong("image_size", "a square, as two numbers")
  sizes = EncoderSizes(
    width=width,
    depth=fields.integer("num_hidden_layers", most=hf_config.MAX_DEPTH),
    heads=heads[0],
    hidden=fields.integer("intermediate_size"),
    patch=patch,
    grid=size[0] // patch,
    eps=fields.number("layer_norm_eps"),
    activation=towers.activation(fields),
  )
  return presets.siglip(sizes).clone(norm=None, dtype=dtype)


def _heads(fields: Fields) -> tuple[int, int]:
  heads = fields.integer("num_attention_heads")
  if fields.integer("num_key_value_heads") != heads:
    raise fields.wrong("num_key_value_heads", f"{heads}, as of queries")
  return heads, fields.integer("head_dim")


def _write_vision(vision: VisionTransformer) -> dict[str, Any]:
  side = vision.positions.rows * vision.patch
  attention = vision.stack.blocks[0].attention
  return towers.written_sizes(vision) | dict(
    num_key_value_heads=attention.heads,
    head_dim=attention.head_dim,
    image_size=[side, side],
    patch_size=vision.patch,
    num_channels=3,
  )


def _read_text(config: Config, where: str, dtype: str) -> Transformer:
  fields = Fields(_renamed(config, "rms_norm_eps"), where, _TEXT)
  if fields.get("qk_norm_type") != "qwen3":
    raise fields.wrong("qk_norm_type", "qwen3: norms of single heads")
  fields.neutral(
    {
      "norm_after": (None, False),
      "qkv_bias": (None, False),
      "use_qk_norm": (None, True),
    }
  )
  depth = fields.integer("num_hidden_layers", most=hf_config.MAX_DEPTH)
  fields.neutral({"rope_scaling_layers": (None, list(range(depth)))})
  # What is left is Qwen3's.
  own = ("qk_norm_type", "use_qk_norm", "norm_after", "rope_scaling_layers")
  plain = {k: v for k, v in fields.values.items() if k not in own}
  plain = {**_TEXT, **plain, "model_type": "qwen3"}
  extra = fields.integer("additional_vocab_size", least=0)
  model = language_model(plain, where, dtype)
  if not extra:
    return model
  return model.clone(input_vocab=model.vocab_size + extra)


def _write_text(model: Transformer) -> dict[str, Any]:
  extra = (model.input_vocab or model.vocab_size) - model.vocab_size
  plain = model.clone(input_vocab=None)
  values = hf_config.config_from_model(plain, "qwen3")
  theta = values.pop("rope_theta")
  # What only Qwen3's files say, transformers would take for more.
  own = {k: v for k, v in values.items() if k in _TEXT}
  return own | dict(
    model_type=KIND,
    additional_vocab_size=extra,
    qk_norm_type="qwen3",
    rope_parameters=dict(rope_type="default", rope_theta=theta),
  )


def _parts(parts: Parts) -> dict[str, Any]:
  fields = parts.fields
  own = _adapter(fields.values, fields.where)
  own.neutral(
    {
      "attention_bias": (None, True),
      "mlp_bias": (None, False),
      "pooling_attention_mask": (None, True),
    }
  )
  width = parts.language.width
  if own.integer("text_hidden_size") != width:
    raise own.wrong("text_hidden_size", f"{width}, the language model's width")
  if own.integer("hidden_size") != parts.vision.width:
    raise own.wrong("hidden_size", f"{parts.vision.width}, the encoder's width")
  if own.get("hidden_act") != "silu":
    raise own.wrong("hidden_act", "silu")
  heads = own.integer("num_attention_heads")
  kv_heads = own.divisor("num_key_value_heads", heads)
  depth = parts.vision.stack.depth
  layers = _layers(fields.values, fields.where)
  if any(not -depth <= i < depth for i in layers):
    raise own.wrong("vision_feature_layer", f"layers of {depth}")
  return dict(
    connector=connectors.GroupAttention(
      size=width,
      hidden=own.integer("intermediate_size"),
      width=own.integer("hidden_size"),
      heads=heads,
      head_dim=own.integer("head_dim"),
      kv_heads=None if kv_heads == heads else kv_heads,
    ),
    # Theirs count blocks from 0; the input of the first is our layer 0.
    features=Features(
      layers=tuple(i + 1 if i >= 0 else i for i in layers), normed=False
    ),
    mask=BidirectionalVision(
      tokens=(
        parts.image_token,
        *(fields.integer(name, least=0) for name in _AROUND[1:]),
      )
    ),
    placement=Splice(onto="embedding"),
  )


def _fields(model: VisionLanguageModel, config: Config) -> dict[str, Any]:
  del config
  connector = model.connector
  adapter = dict(
    vision_feature_layer=[i - 1 if i > 0 else i for i in model.features.layers],
    hidden_size=connector.width,
    num_attention_heads=connector.heads,
    num_key_value_heads=connector.kv_heads or connector.heads,
    head_dim=connector.head_dim,
    intermediate_size=connector.hidden,
    text_hidden_size=connector.size,
  )
  ids = dict(zip(_AROUND, model.mask.tokens, strict=True))
  return dict(adapter_config=adapter, **ids)


_BLOCK = names.LAYER, "transformer.resblocks.<i>."

VISION_ROWS = (
  *names.linear("patch_embed", "patch_embedding"),
  names.Row("positions/table", "positional_embedding"),
  *names.norm(f"{_BLOCK[0]}attention_norm", f"{_BLOCK[1]}attention_norm"),
  *names.norm(f"{_BLOCK[0]}mlp_norm", f"{_BLOCK[1]}ffn_norm"),
  *(
    row
    for x in "qkvo"
    for row in names.linear(
      f"{_BLOCK[0]}attention/{x}", f"{_BLOCK[1]}attention.w{x}"
    )
  ),
  *names.linear(f"{_BLOCK[0]}mlp/up", f"{_BLOCK[1]}feed_forward.w1"),
  *names.linear(f"{_BLOCK[0]}mlp/down", f"{_BLOCK[1]}feed_forward.w2"),
)
CONNECTOR_ROWS = (
  *(
    row
    for x in "qkvo"
    for row in names.linear(f"attention/{x}", f"image_pooling_2d.w{x}")
  ),
  *(
    names.Row(ours, f"image_projector.{theirs}.weight", names.TRANSPOSED)
    for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
  ),
)

MOLMO2 = Family(
  model_type="molmo2",
  architecture="Molmo2ForConditionalGeneration",
  defaults=DEFAULTS,
  image_token="image_patch_id",
  vision_config=_vision_config,
  towers=(
    towers.Tower(
      "molmo2_vision",
      _read_vision,
      _write_vision,
      lambda tower: tower.norm is None,
    ),
  ),
  language=Language(KIND, read=_read_text, write=_write_text),
  parts=_parts,
  prompt=MOLMO2_PROMPT,
  fields=_fields,
  naming=Molmo2Names(),
  language_module=None,
  vision_rows=VISION_ROWS,
  connector_rows=CONNECTOR_ROWS,
)

FAMILIES = (MOLMO2,)
