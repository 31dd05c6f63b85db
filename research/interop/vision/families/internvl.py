"""InternVL: InternViT, pixel shuffle, a norm and an MLP.

Chen et al. 2023, arXiv:2312.14238. InternViT has learned scales of its
sublayers. That of 6 billion parameters, which normalises queries and keys over
all heads at once, is refused by name.
"""

from typing import Any

from research.interop.hf import config as hf_config
from research.interop.vision import names, towers
from research.interop.vision.families.family import (
  Config,
  Family,
  Language,
  Parts,
)
from research.interop.vision.prefixes import like_llava
from research.io.fields import Fields
from research.nn.attention import Attention
from research.nn.block import Block
from research.nn.mlp import PlainMlp
from research.nn.norm import LayerNorm, LayerScale, RMSNorm
from research.nn.stack import Stack
from research.vlm import connectors
from research.vlm.encoders.positions import PositionTable
from research.vlm.encoders.vit import Features, VisionTransformer
from research.vlm.images import normalise
from research.vlm.model import VisionLanguageModel

VISION_DEFAULTS = dict(
  hidden_size=1024,
  num_hidden_layers=24,
  num_attention_heads=16,
  attention_bias=False,
  use_qk_norm=False,
  intermediate_size=4096,
  hidden_act="gelu",
  norm_type="layer_norm",
  layer_norm_eps=1e-6,
  image_size=[448, 448],
  patch_size=[14, 14],
  num_channels=3,
  use_mask_token=False,
  use_absolute_position_embeddings=True,
  layer_scale_init_value=0.1,
  use_mean_pooling=True,
)

_NORMS = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}

_LAYER, _THEIRS = names.LAYER, "encoder.layer.<i>."

_ALONE = names.Layout(lambda x: x.reshape(-1), lambda x: x.reshape(1, 1, -1))

VISION_ROWS = (
  names.Row(
    "patch_embed",
    "embeddings.patch_embeddings.projection.weight",
    names.CONVOLUTION,
  ),
  names.Row("patch_embed_bias", "embeddings.patch_embeddings.projection.bias"),
  names.Row("class_embed", "embeddings.cls_token", _ALONE),
  names.Row(
    "positions/table", "embeddings.position_embeddings", names.FIRST_OF_ONE
  ),
  *names.norm(f"{_LAYER}attention_norm", f"{_THEIRS}layernorm_before"),
  *names.norm(f"{_LAYER}mlp_norm", f"{_THEIRS}layernorm_after"),
  names.Row(f"{_LAYER}post_attention_norm/scale", f"{_THEIRS}lambda_1"),
  names.Row(f"{_LAYER}post_mlp_norm/scale", f"{_THEIRS}lambda_2"),
  *(
    row
    for x, theirs in zip(
      "qkvo", ("q_proj", "k_proj", "v_proj", "projection_layer"), strict=True
    )
    for row in names.linear(
      f"{_LAYER}attention/{x}", f"{_THEIRS}attention.{theirs}"
    )
  ),
  *names.linear(f"{_LAYER}mlp/up", f"{_THEIRS}mlp.fc1"),
  *names.linear(f"{_LAYER}mlp/down", f"{_THEIRS}mlp.fc2"),
  *names.norm("final_norm", "layernorm"),
)
"""InternViT's tensors, by our paths."""


def _read_vision(config: Config, where: str, dtype: str) -> VisionTransformer:
  """Returns the image tower that a `vision_config` describes."""
  fields = Fields(config, where, VISION_DEFAULTS)
  fields.neutral(
    {"use_qk_norm": (None, False), "use_mask_token": (None, False)}
  )
  if fields.get("hidden_act") != "gelu":
    raise fields.wrong("hidden_act", "gelu")
  if fields.get("norm_type") not in _NORMS:
    raise fields.wrong("norm_type", f"one of {', '.join(_NORMS)}")
  if fields.integer("num_channels") != 3:
    raise fields.wrong("num_channels", "3")
  width = fields.integer("hidden_size")
  heads = fields.divisor("num_attention_heads", width)
  eps = fields.number("layer_norm_eps")
  scale = LayerScale(start=fields.number("layer_scale_init_value"))
  block = Block(
    attention=Attention(
      heads=heads,
      kv_heads=heads,
      head_dim=width // heads,
      rope=None,
      qkv_bias=fields.flag("attention_bias"),
      out_bias=True,
    ),
    mlp=PlainMlp(hidden=fields.integer("intermediate_size")),
    norm=_NORMS[fields.get("norm_type")](eps=eps),
    post_norm=scale,
  )
  patch, other = _pair(fields, "patch_size")
  if patch != other:
    raise fields.wrong("patch_size", "a square")
  height, across = _pair(fields, "image_size")
  positions = PositionTable(height // patch, across // patch)
  return VisionTransformer(
    width=width,
    patch=patch,
    stack=Stack(
      fields.integer("num_hidden_layers", most=hf_config.MAX_DEPTH), (block,)
    ),
    positions=positions
    if fields.flag("use_absolute_position_embeddings")
    else None,
    class_token=True,
    # With mean pooling the mean is normalised, and no patch.
    norm=None if fields.flag("use_mean_pooling") else LayerNorm(eps=eps),
    dtype=dtype,
  )


def _pair(fields: Fields, name: str) -> tuple[int, int]:
  x = fields.get(name)
  pair = [x, x] if type(x) is int else x
  if (
    not isinstance(pair, list | tuple)
    or len(pair) != 2
    or any(type(side) is not int or not 0 < side < 2**16 for side in pair)
  ):
    raise fields.wrong(name, "a number of pixels, or two")
  return pair[0], pair[1]


def _write_vision(vision: VisionTransformer) -> dict[str, Any]:
  block, patch = vision.stack.blocks[0], vision.patch
  grid = vision.positions or PositionTable(1, 1)
  norms = {kind: name for name, kind in _NORMS.items()}
  return dict(
    hidden_size=vision.width,
    intermediate_size=block.mlp.hidden,
    num_hidden_layers=vision.stack.depth,
    num_attention_heads=block.attention.heads,
    attention_bias=block.attention.qkv_bias,
    hidden_act="gelu",
    norm_type=norms[type(block.norm)],
    layer_norm_eps=block.norm.eps,
    image_size=[grid.rows * patch, grid.columns * patch],
    patch_size=[patch, patch],
    use_absolute_position_embeddings=vision.positions is not None,
    layer_scale_init_value=block.post_norm.start,
    use_mean_pooling=vision.norm is None,
  )


def _parts(parts: Parts) -> dict[str, Any]:
  fields = parts.fields
  side = round(1 / fields.number("downsample_ratio"))
  if side < 1 or side * fields.number("downsample_ratio") != 1:
    raise fields.wrong("downsample_ratio", "one over a whole number")
  if fields.get("vision_feature_select_strategy") != "default":
    raise fields.wrong("vision_feature_select_strategy", "default")
  layer = fields.get("vision_feature_layer")
  if type(layer) is not int:
    raise fields.wrong("vision_feature_layer", "a number of a layer")
  inner = connectors.Mlp(
    size=parts.language.width,
    activation=towers.activation(fields, "projector_hidden_act"),
  )
  return dict(
    connector=connectors.Squares(
      side=side, inner=inner, after=LayerNorm(eps=1e-5)
    ),
    features=Features(layers=(layer,), normed=layer == -1),
    normalise=normalise.IMAGENET,
  )


def _fields(model: VisionLanguageModel, config: Config) -> dict[str, Any]:
  connector = model.connector
  return dict(
    downsample_ratio=1 / connector.side,
    image_seq_length=model.tokens_per_view(
      *config["vision_config"]["image_size"]
    ),
    projector_hidden_act=towers.activation_name(connector.inner.activation),
    vision_feature_layer=model.features.layers[0],
  )


INTERNVL = Family(
  model_type="internvl",
  architecture="InternVLForConditionalGeneration",
  defaults=dict(
    image_token_id=151_667,
    downsample_ratio=0.5,
    projector_hidden_act="gelu",
    vision_feature_layer=-1,
    vision_feature_select_strategy="default",
    tie_word_embeddings=True,
  ),
  image_token="image_token_id",
  towers=(towers.Tower("internvl_vision", _read_vision, _write_vision),),
  language=Language("qwen2"),
  parts=_parts,
  fields=_fields,
  naming=like_llava(vision="vision_tower."),
  vision_rows=VISION_ROWS,
  connector_rows=(
    *names.norm("after", "layer_norm"),
    *names.linear("inner/up", "linear_1"),
    *names.linear("inner/down", "linear_2"),
  ),
)

FAMILIES = (INTERNVL,)
