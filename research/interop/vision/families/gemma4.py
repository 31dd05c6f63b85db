"""Gemma 4: native resolution by a budget, and per-layer embeddings.

As transformers computes its dense models: E2B and E4B, whose encoders' products
are clipped, and 31B, whose local layers read images both ways. A file's audio
tower is left out: audio and video are not supported.
"""

import math
from typing import Any

from research.interop.hf import config as hf_config
from research.interop.hf import gemma4 as text
from research.interop.vision import names, towers
from research.interop.vision.families.family import (
  Config,
  Family,
  Language,
  Parts,
)
from research.interop.vision.prefixes import Prefix, Prefixes
from research.io import folders
from research.io.fields import Fields
from research.nn.norm import UnitRMS
from research.vlm import connectors
from research.vlm.encoders.clipped import BOUNDS, Clipping
from research.vlm.encoders.gemma4 import Gemma4Heads, gemma4_vision
from research.vlm.encoders.positions import FactoredTable
from research.vlm.encoders.presets import EncoderSizes
from research.vlm.encoders.vit import Features, VisionTransformer
from research.vlm.images import normalise
from research.vlm.masks import BidirectionalImages, Causal
from research.vlm.model import VisionLanguageModel

VISION_DEFAULTS = dict(
  hidden_size=768,
  intermediate_size=3_072,
  num_hidden_layers=16,
  num_attention_heads=12,
  num_key_value_heads=12,
  head_dim=64,
  hidden_activation="gelu_pytorch_tanh",
  rms_norm_eps=1e-6,
  attention_bias=False,
  pooling_kernel_size=3,
  patch_size=16,
  position_embedding_size=10_240,
  use_clipped_linears=False,
  standardize=False,
)

_LAYER, _THEIRS = names.LAYER, "encoder.layers.<i>."

_TABLE = names.Layout(
  lambda x: x.reshape(-1, x.shape[-1]),
  lambda x: x.reshape(2, -1, x.shape[-1]),
)


def _matrix(ours: str, theirs: str) -> tuple[names.Row, ...]:
  """Returns the rows of a matrix, with bounds and without."""
  weight = f"{_THEIRS}{theirs}.linear.weight"
  return (
    names.Row(f"{_LAYER}{ours}", weight, names.TRANSPOSED),
    names.Row(f"{_LAYER}{ours}/w", weight, names.TRANSPOSED),
    *(
      names.Row(f"{_LAYER}{ours}/{bound}", f"{_THEIRS}{theirs}.{bound}")
      for bound in BOUNDS
    ),
  )


def _norm(ours: str, theirs: str) -> names.Row:
  return names.Row(f"{_LAYER}{ours}/scale", f"{_THEIRS}{theirs}.weight")


VISION_ROWS = (
  names.Row(
    "patch_embed", "patch_embedder.input_proj.weight", names.TRANSPOSED
  ),
  names.Row(
    "positions/table", "patch_embedder.position_embedding_table", _TABLE
  ),
  _norm("attention_norm", "input_layernorm"),
  _norm("post_attention_norm", "post_attention_layernorm"),
  _norm("mlp_norm", "pre_feedforward_layernorm"),
  _norm("post_mlp_norm", "post_feedforward_layernorm"),
  *(_norm(f"attention/{x}_norm", f"self_attn.{x}_norm") for x in "qk"),
  *(
    row
    for x in "qkvo"
    for row in _matrix(f"attention/{x}", f"self_attn.{x}_proj")
  ),
  *(
    row
    for x in ("gate", "up", "down")
    for row in _matrix(f"mlp/{x}", f"mlp.{x}_proj")
  ),
)
"""The encoder's tensors, by our paths."""


def _read_vision(config: Config, where: str, dtype: str) -> VisionTransformer:
  fields = Fields(config, where, VISION_DEFAULTS)
  fields.neutral({"attention_bias": (None, False)})
  heads = fields.integer("num_attention_heads")
  rotation = fields.object("rope_parameters") or Fields({}, where)
  rotation.neutral({"rope_type": (None, "default", "axial")})
  head_dim = fields.integer("head_dim")
  if head_dim % 4:
    raise fields.wrong("head_dim", "a multiple of 4: two coordinates rotate it")
  sizes = EncoderSizes(
    width=fields.integer("hidden_size"),
    depth=fields.integer("num_hidden_layers", most=hf_config.MAX_DEPTH),
    heads=heads,
    hidden=fields.integer("intermediate_size"),
    patch=fields.integer("patch_size"),
    grid=fields.integer("position_embedding_size"),
    eps=fields.number("rms_norm_eps"),
    activation=towers.activation(fields, "hidden_activation"),
  )
  own = Gemma4Heads(
    kv_heads=fields.divisor("num_key_value_heads", heads),
    head_dim=head_dim,
    theta=rotation.maybe_number("rope_theta") or 100.0,
  )
  clipping = Clipping() if fields.flag("use_clipped_linears") else None
  return gemma4_vision(sizes, own, clipping=clipping, dtype=dtype)


def _write_vision(vision: VisionTransformer) -> dict[str, Any]:
  block = vision.stack.blocks[0]
  return dict(
    hidden_size=vision.width,
    intermediate_size=block.mlp.hidden,
    num_hidden_layers=vision.stack.depth,
    num_attention_heads=block.attention.heads,
    num_key_value_heads=block.attention.kv_heads,
    head_dim=block.attention.head_dim,
    hidden_activation=towers.activation_name(block.mlp.activation),
    rms_norm_eps=block.norm.eps,
    patch_size=vision.patch,
    position_embedding_size=vision.positions.size,
    rope_parameters=dict(
      rope_type="axial", rope_theta=block.attention.rope.theta
    ),
    use_clipped_linears=vision.clipping is not None,
  )


def _parts(parts: Parts) -> dict[str, Any]:
  fields = parts.fields
  if fields.get("audio_config"):
    folders.warn(
      f"{fields.where}: the audio tower is left out: audio is not supported"
    )
  where = f"{fields.where}: vision_config"
  own = Fields(fields.get("vision_config") or {}, where, VISION_DEFAULTS)
  width = parts.language.width
  images = parts.language.layer_kinds()[-1].attention.images
  return dict(
    connector=connectors.AveragePool(
      side=own.integer("pooling_kernel_size"),
      norm=UnitRMS(eps=own.number("rms_norm_eps")),
      inner=connectors.Linear(size=width, bias=False),
      factor=math.sqrt(parts.vision.width),
      standardise=connectors.Standardise() if own.flag("standardize") else None,
    ),
    features=Features(normed=False),
    normalise=normalise.UNIT,
    mask=BidirectionalImages(image_token=parts.image_token)
    if images == "causal"
    else Causal(),
    scale=1 / parts.language.embed_scale,
  )


def _fields(model: VisionLanguageModel, config: Config) -> dict[str, Any]:
  own = dict(
    pooling_kernel_size=model.connector.side,
    standardize=model.connector.standardise is not None,
  )
  # Without it transformers would make an audio tower.
  return dict(
    vision_config={**config["vision_config"], **own}, audio_config=None
  )


GEMMA4 = Family(
  model_type="gemma4",
  architecture="Gemma4ForConditionalGeneration",
  defaults=dict(image_token_id=258_880),
  image_token="image_token_id",
  towers=(
    towers.Tower(
      "gemma4_vision",
      _read_vision,
      _write_vision,
      lambda tower: isinstance(tower.positions, FactoredTable),
    ),
  ),
  language=Language(text.KIND, read=text.read, write=text.write),
  parts=_parts,
  fields=_fields,
  naming=Prefixes(
    (
      Prefix(
        "connector",
        r"(model\.)?embed_vision\.",
        "model.embed_vision.",
        "embed_vision.",
      ),
      Prefix(
        "connector",
        r"(model\.)?vision_tower\.(?=std_)",
        "model.vision_tower.",
        "vision_tower.",
      ),
      Prefix("vision", r"(model\.)?vision_tower\.", "model.vision_tower."),
      Prefix(None, r"(model\.)?(audio_tower|embed_audio)\."),
      Prefix("language", r"lm_head\.", "lm_head.", "lm_head."),
      Prefix(
        "language",
        r"(model\.)?language_model\.(model\.)?",
        "model.language_model.",
        "model.",
      ),
    )
  ),
  vision_rows=VISION_ROWS,
  connector_rows=(
    names.Row(
      "inner/project",
      "embed_vision.embedding_projection.weight",
      names.TRANSPOSED,
    ),
    names.Row("standardise/bias", "vision_tower.std_bias"),
    names.Row("standardise/scale", "vision_tower.std_scale"),
  ),
)

FAMILIES = (GEMMA4,)
