"""Qwen2-VL and Qwen2.5-VL: native resolution, a merger and M-RoPE.

Wang et al. 2024 (arXiv:2409.12191); Bai et al. 2025 (arXiv:2502.13923).
"""

import functools
from typing import Any

from research.interop.vision import mrope, names, qwen
from research.interop.vision.families.family import Config, Family, Parts
from research.io.fields import Fields
from research.nn.norm import LayerNorm, RMSNorm
from research.vlm.encoders import qwen as encoders
from research.vlm.encoders.vit import VisionTransformer
from research.vlm.encoders.windows import window_side
from research.vlm.images import normalise
from research.vlm.model import VisionLanguageModel

TOWER, TOWER_2_5 = "qwen2_vl_vision", "qwen2_5_vl_vision"
WIDTH, WIDTH_2_5 = "hidden_size", "out_hidden_size"
"""The fields of a `vision_config` that have the language model's width."""

DEFAULTS = qwen.VISION_DEFAULTS | dict(
  depth=32, embed_dim=1280, hidden_size=3584, hidden_act="quick_gelu",
  mlp_ratio=4,
)  # fmt: skip
DEFAULTS_2_5 = qwen.VISION_DEFAULTS | dict(
  depth=32, hidden_size=3584, out_hidden_size=3584, hidden_act="silu",
  intermediate_size=3420, window_size=112,
  fullatt_block_indexes=[7, 15, 23, 31],
)  # fmt: skip


def _read_vision(config: Config, where: str, dtype: str) -> VisionTransformer:
  fields = Fields(config, where, DEFAULTS)
  hidden = fields.integer("embed_dim") * fields.integer("mlp_ratio")
  return encoders.qwen2_vl(qwen.sizes(fields, "embed_dim", hidden), dtype=dtype)


def _write_vision(vision: VisionTransformer) -> dict[str, Any]:
  ratio = vision.stack.blocks[0].mlp.hidden // vision.width
  return qwen.written(vision) | dict(embed_dim=vision.width, mlp_ratio=ratio)


def _parts(parts: Parts) -> dict[str, Any]:
  where = f"{parts.fields.where}: vision_config"
  fields = Fields(parts.fields.get("vision_config") or {}, where, DEFAULTS)
  norm = LayerNorm(eps=encoders.EPS)
  return dict(
    connector=qwen.merger(parts, fields, WIDTH, before=norm),
    features=qwen.OUTPUT,
    normalise=normalise.CLIP,
  )


def _fields(model: VisionLanguageModel, config: Config) -> dict[str, Any]:
  return qwen.with_merger(model, config, WIDTH)


def _read_vision_2_5(
  config: Config, where: str, dtype: str
) -> VisionTransformer:
  fields = Fields(config, where, DEFAULTS_2_5)
  hidden = fields.integer("intermediate_size")
  sizes = qwen.sizes(fields, "hidden_size", hidden)
  merge = fields.integer("spatial_merge_size")
  # Windows are of whole squares of patches.
  window = fields.integer("window_size") // merge // sizes.patch * merge
  if not window:
    raise fields.wrong("window_size", f"at least {merge * sizes.patch} pixels")
  full = qwen.layer_numbers(fields, "fullatt_block_indexes", sizes.depth)
  return encoders.qwen2_5_vl(sizes, window=window, full=full, dtype=dtype)


def _write_vision_2_5(vision: VisionTransformer) -> dict[str, Any]:
  sides = list(map(window_side, vision.layer_kinds()))
  pixels = max(sides) * vision.patch
  return qwen.written(vision) | dict(
    hidden_size=vision.width,
    intermediate_size=vision.stack.blocks[0].mlp.hidden,
    window_size=pixels or DEFAULTS_2_5["window_size"],
    fullatt_block_indexes=[i for i, side in enumerate(sides) if not side],
  )


def _parts_2_5(parts: Parts) -> dict[str, Any]:
  where = f"{parts.fields.where}: vision_config"
  fields = Fields(parts.fields.get("vision_config") or {}, where, DEFAULTS_2_5)
  norm = RMSNorm(eps=encoders.EPS)
  return dict(
    connector=qwen.merger(parts, fields, WIDTH_2_5, before=norm),
    features=qwen.OUTPUT,
    normalise=normalise.CLIP,
  )


def _fields_2_5(model: VisionLanguageModel, config: Config) -> dict[str, Any]:
  return qwen.with_merger(model, config, WIDTH_2_5)


_MERGER_ROWS = (
  *names.norm("before", "merger.ln_q"),
  *names.linear("inner/up", "merger.mlp.0"),
  *names.linear("inner/down", "merger.mlp.2"),
)

QWEN2_VL = Family(
  model_type="qwen2_vl",
  architecture="Qwen2VLForConditionalGeneration",
  defaults=dict(image_token_id=151_655),
  image_token="image_token_id",
  vision_config=functools.partial(qwen.vision_config, kind=TOWER),
  towers=(qwen.tower(TOWER, _read_vision, _write_vision),),
  language=mrope.QWEN2_VL.language(),
  parts=_parts,
  fields=_fields,
  naming=qwen.naming("visual.", "model."),
  vision_rows=qwen.vision_rows({"up": "fc1", "down": "fc2"}),
  connector_rows=_MERGER_ROWS,
)

QWEN2_5_VL = Family(
  model_type="qwen2_5_vl",
  architecture="Qwen2_5_VLForConditionalGeneration",
  defaults=dict(image_token_id=151_655),
  image_token="image_token_id",
  vision_config=functools.partial(qwen.vision_config, kind=TOWER_2_5),
  towers=(qwen.tower(TOWER_2_5, _read_vision_2_5, _write_vision_2_5),),
  language=mrope.QWEN2_5_VL.language(),
  parts=_parts_2_5,
  fields=_fields_2_5,
  naming=qwen.naming("visual.", "model."),
  vision_rows=qwen.vision_rows(
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
  ),
  connector_rows=_MERGER_ROWS,
)

FAMILIES = (QWEN2_VL, QWEN2_5_VL)
