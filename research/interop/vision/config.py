"""config.json of vision models: towers and what joins them.

Fields that a file leaves out have the defaults of transformers' own
configuration classes. A model type that is not known is refused by name.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from research.interop.hf import config as hf_config
from research.interop.vision import internvl
from research.io.fields import Fields
from research.nn import presets
from research.nn.attention import Attention
from research.nn.block import Block
from research.nn.mlp import PlainMlp
from research.nn.norm import LayerNorm, RMSNorm
from research.nn.stack import Stack
from research.typing import UserError
from research.vlm import connectors
from research.vlm.contrastive.dual_encoder import DualEncoder
from research.vlm.encoders.pooling import AttentionPooling, ClassPooling
from research.vlm.encoders.positions import PositionTable
from research.vlm.encoders.text import EndOfText, LastPosition, TextEncoder
from research.vlm.encoders.vit import Features, VisionTransformer
from research.vlm.images import normalise
from research.vlm.masks import BidirectionalImages, BidirectionalPrompt
from research.vlm.model import VisionLanguageModel

ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "quick_gelu": "quick_gelu",
}

_CLIP = dict(
  hidden_size=768,
  intermediate_size=3072,
  num_hidden_layers=12,
  num_attention_heads=12,
  num_channels=3,
  image_size=224,
  patch_size=32,
  hidden_act="quick_gelu",
  layer_norm_eps=1e-5,
  projection_dim=512,
)
_SIGLIP = _CLIP | dict(
  patch_size=16,
  hidden_act="gelu_pytorch_tanh",
  layer_norm_eps=1e-6,
  vision_use_head=True,
)
_IDEFICS = _SIGLIP | dict(
  hidden_size=1152, num_attention_heads=16, patch_size=32, vision_use_head=False
)

VISION_DEFAULTS = {
  "clip_vision_model": _CLIP,
  "siglip_vision_model": _SIGLIP,
  "idefics3": _IDEFICS,
  "idefics3_vision": _IDEFICS,
  "smolvlm_vision": _IDEFICS,
}
"""Model type of an image tower -> the fields it may leave out."""

_CLIP_TEXT = dict(
  vocab_size=49_408,
  hidden_size=512,
  intermediate_size=2048,
  num_hidden_layers=12,
  num_attention_heads=8,
  max_position_embeddings=77,
  hidden_act="quick_gelu",
  layer_norm_eps=1e-5,
  eos_token_id=49_407,
)
_SIGLIP_TEXT = _CLIP_TEXT | dict(
  vocab_size=32_000,
  hidden_size=768,
  intermediate_size=3072,
  num_attention_heads=12,
  max_position_embeddings=64,
  hidden_act="gelu_pytorch_tanh",
  layer_norm_eps=1e-6,
)


def _activation(fields: Fields, name: str = "hidden_act") -> Any:
  found = fields.get(name)
  if not isinstance(found, str) or found not in ACTIVATIONS:
    raise fields.wrong(name, f"one of {', '.join(ACTIVATIONS)}")
  return ACTIVATIONS[found]


def _stack(fields: Fields) -> tuple[Stack, LayerNorm]:
  """Returns the layers of a tower, and its norm."""
  width = fields.integer("hidden_size")
  heads = fields.divisor("num_attention_heads", width)
  norm = LayerNorm(eps=fields.number("layer_norm_eps"))
  block = Block(
    attention=Attention(
      heads=heads,
      kv_heads=heads,
      head_dim=width // heads,
      rope=None,
      qkv_bias=True,
      out_bias=True,
    ),
    mlp=PlainMlp(
      hidden=fields.integer("intermediate_size"),
      activation=_activation(fields),
    ),
    norm=norm,
  )
  depth = fields.integer("num_hidden_layers", most=hf_config.MAX_DEPTH)
  return Stack(depth, (block,)), norm


def vision_tower(
  config: Mapping[str, Any],
  where: str,
  dtype: str,
  *,
  pooled: bool = False,
  size: int | None = None,
) -> VisionTransformer:
  """Returns the image tower that a `vision_config` describes.

  Args:
    config: the object; its `model_type` is one of `VISION_DEFAULTS`.
    where: its file and place, for messages.
    dtype: of the computation.
    pooled: whether it makes one vector per image.
    size: of CLIP's shared space.
  """
  kind = config.get("model_type")
  if kind == internvl.MODEL_TYPE:
    return internvl.vision_tower(config, where, dtype)
  if kind not in VISION_DEFAULTS:
    raise UserError(
      f"{where}: model_type is {kind!r}, expected one of"
      f" {', '.join((*VISION_DEFAULTS, internvl.MODEL_TYPE))}"
    )
  fields = Fields(config, where, VISION_DEFAULTS[kind])
  if fields.integer("num_channels") != 3:
    raise fields.wrong("num_channels", "3")
  stack, norm = _stack(fields)
  side, patch = fields.integer("image_size"), fields.integer("patch_size")
  clip, pooling = kind == "clip_vision_model", None
  if pooled and clip:
    pooling = ClassPooling(size or fields.integer("projection_dim"))
  elif pooled and fields.flag("vision_use_head"):
    block = stack.blocks[0]
    pooling = AttentionPooling(
      heads=block.attention.heads, mlp=block.mlp.clone(), norm=norm.clone()
    )
  return VisionTransformer(
    width=fields.integer("hidden_size"),
    patch=patch,
    stack=stack,
    positions=PositionTable(side // patch, side // patch),
    patch_bias=not clip,
    class_token=clip,
    input_norm=norm if clip else None,
    norm=norm,
    pooling=pooling,
    dtype=dtype,
  )


def text_tower(
  config: Mapping[str, Any], where: str, dtype: str, clip_size: int | None
) -> TextEncoder:
  """Returns the text tower of a contrastive model.

  Args:
    config: its `text_config`.
    where: its file and place, for messages.
    dtype: of the computation.
    clip_size: of CLIP's shared space; None for SigLIP.
  """
  clip = clip_size is not None
  fields = Fields(config, where, _CLIP_TEXT if clip else _SIGLIP_TEXT)
  stack, norm = _stack(fields)
  width, end = fields.integer("hidden_size"), fields.get("eos_token_id")
  size = clip_size or fields.maybe_integer("projection_size") or width
  return TextEncoder(
    vocab_size=fields.integer("vocab_size"),
    width=width,
    length=fields.integer("max_position_embeddings"),
    stack=stack,
    # Configurations of before transformers 4.31 say 2, and mean the greatest.
    read=EndOfText(token=None if end == 2 else end) if clip else LastPosition(),
    size=size,
    projection_bias=not clip,
    norm=norm,
    dtype=dtype,
  )


def dual_encoder(
  config: Mapping[str, Any], where: str, dtype: str = "float32"
) -> DualEncoder:
  """Returns the contrastive model of a config.json of type clip or siglip."""
  kind = config["model_type"]
  fields = Fields(config, where, dict(projection_dim=512))
  inner = {
    name: dict(config.get(f"{name}_config") or {})
    for name in ("text", "vision")
  }
  inner["vision"].setdefault("model_type", f"{kind}_vision_model")
  size = fields.integer("projection_dim") if kind == "clip" else None
  image = vision_tower(
    inner["vision"], f"{where}: vision_config", dtype, pooled=True, size=size
  )
  text = text_tower(inner["text"], f"{where}: text_config", dtype, size)
  bias = None if kind == "clip" else 0.0
  return DualEncoder(image=image, text=text, bias=bias)


@dataclasses.dataclass(frozen=True)
class _Parts:
  """A config.json of a vision language model, taken apart."""

  fields: Fields
  vision: VisionTransformer
  language: Any

  @property
  def width(self) -> int:
    return self.language.width


def _llava(parts: _Parts) -> dict[str, Any]:
  fields = parts.fields
  layer = fields.get("vision_feature_layer")
  layers = layer if isinstance(layer, list) else [layer]
  if not layers or any(type(x) is not int for x in layers):
    raise fields.wrong("vision_feature_layer", "a number or numbers of layers")
  strategy = fields.get("vision_feature_select_strategy")
  if strategy not in ("default", "full"):
    raise fields.wrong("vision_feature_select_strategy", "default or full")
  if not fields.flag("multimodal_projector_bias"):
    raise fields.wrong("multimodal_projector_bias", "true")
  return dict(
    connector=connectors.Mlp(
      size=parts.width,
      activation=_activation(fields, "projector_hidden_act"),
    ),
    features=Features(
      layers=tuple(layers), normed=False, class_token=strategy == "full"
    ),
    normalise=normalise.CLIP,
  )


def _idefics3(parts: _Parts) -> dict[str, Any]:
  linear = connectors.Linear(size=parts.width, bias=False)
  side = parts.fields.integer("scale_factor")
  return dict(connector=connectors.Squares(side=side, inner=linear))


def _paligemma(parts: _Parts) -> dict[str, Any]:
  # The language model scales all its embeddings; soft tokens are not scaled.
  return dict(
    connector=connectors.Linear(size=parts.width),
    mask=BidirectionalPrompt(),
    scale=1 / parts.language.embed_scale,
  )


def _gemma3(parts: _Parts) -> dict[str, Any]:
  fields, table = parts.fields, parts.vision.positions
  tokens = fields.integer("mm_tokens_per_image")
  side = math.isqrt(tokens)
  if side * side != tokens or table.rows % side:
    raise fields.wrong(
      "mm_tokens_per_image",
      f"a square whose side divides {table.rows}, the patches of a side",
    )
  eps = parts.vision.norm.eps
  return dict(
    connector=connectors.AveragePool(
      side=table.rows // side,
      norm=RMSNorm(eps=eps, offset=1.0),
      inner=connectors.Linear(size=parts.width, bias=False),
    ),
    mask=BidirectionalImages(image_token=fields.integer("image_token_index")),
    scale=1 / parts.language.embed_scale,
  )


def _internvl(parts: _Parts) -> dict[str, Any]:
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
    size=parts.width, activation=_activation(fields, "projector_hidden_act")
  )
  return dict(
    connector=connectors.Squares(
      side=side, inner=inner, after=LayerNorm(eps=1e-5)
    ),
    features=Features(layers=(layer,), normed=layer == -1),
    normalise=normalise.IMAGENET,
  )


FAMILIES = {
  "gemma3": (
    _gemma3,
    dict(image_token_index=262_144, mm_tokens_per_image=256),
  ),
  "llava": (
    _llava,
    dict(
      image_token_index=32_000,
      vision_feature_layer=-2,
      vision_feature_select_strategy="default",
      projector_hidden_act="gelu",
      multimodal_projector_bias=True,
    ),
  ),
  "idefics3": (_idefics3, dict(image_token_id=128_257, scale_factor=2)),
  "smolvlm": (_idefics3, dict(image_token_id=128_257, scale_factor=2)),
  "paligemma": (_paligemma, dict(image_token_index=256_000)),
  "internvl": (
    _internvl,
    dict(
      image_token_id=151_667,
      downsample_ratio=0.5,
      projector_hidden_act="gelu",
      vision_feature_layer=-1,
      vision_feature_select_strategy="default",
      tie_word_embeddings=True,
    ),
  ),
}
"""Model type -> what is special about it, and the fields it may leave out."""

_LANGUAGE = {
  "llava": "llama",
  "paligemma": "gemma",
  "gemma3": "gemma3_text",
  "internvl": "qwen2",
}


def vision_language_model(
  config: Mapping[str, Any], where: str, dtype: str = "float32"
) -> VisionLanguageModel:
  """Returns the model of a config.json of one of `FAMILIES`."""
  kind = config.get("model_type")
  if kind not in FAMILIES:
    raise UserError(
      f"{where}: model_type is {kind!r}, expected one of {', '.join(FAMILIES)}"
    )
  special, defaults = FAMILIES[kind]
  fields = Fields(config, where, defaults)
  text = dict(config.get("text_config") or {})
  text.setdefault("model_type", _LANGUAGE.get(kind, "llama"))
  if kind == "paligemma":
    # What it says of the prefix, which a mask says here.
    text.pop("use_bidirectional_attention", None)
  if "tie_word_embeddings" in config:
    text["tie_word_embeddings"] = config["tie_word_embeddings"]
  family, sizes = hf_config.sizes_from_config(text, f"{where}: text_config")
  language = presets.transformer(family, sizes, dtype)
  vision = dict(config.get("vision_config") or {})
  # SigLIP's head may be in the file, though no language model uses it.
  head = vision.get("model_type") == "siglip_vision_model"
  vision = vision_tower(vision, f"{where}: vision_config", dtype, pooled=head)
  named = "image_token_id" if "image_token_id" in config else None
  token = fields.integer(named or token_field(kind), least=0)
  more = special(_Parts(fields, vision, language))
  return VisionLanguageModel(
    vision=vision, language=language, image_token=token, **more
  )


def token_field(kind: str) -> str:
  """Returns the field that has the id of the placeholder."""
  return next(k for k in FAMILIES[kind][1] if k.startswith("image_token"))
