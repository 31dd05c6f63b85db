"""Qwen3-VL: DeepStack and interleaved M-RoPE (arXiv:2511.21631)."""

import dataclasses
import functools
from typing import Any

from research.interop.vision import mrope, names, qwen
from research.interop.vision.families.family import Config, Family, Parts
from research.io.fields import Fields
from research.nn.norm import LayerNorm
from research.vlm import connectors
from research.vlm.encoders import qwen as encoders
from research.vlm.encoders.vit import Features, VisionTransformer
from research.vlm.images import normalise
from research.vlm.model import VisionLanguageModel

TOWER = "qwen3_vl_vision"
WIDTH = "out_hidden_size"
DEEPER = "deepstack_visual_indexes"

MOST_DEEPER = 16
"""Layers of the encoder that a file may name for DeepStack."""

DEFAULTS = qwen.VISION_DEFAULTS | dict(
  depth=27, hidden_size=1152, out_hidden_size=3584, patch_size=16,
  hidden_act="gelu_pytorch_tanh", intermediate_size=4304,
  num_position_embeddings=2304, deepstack_visual_indexes=[8, 16, 24],
)  # fmt: skip


def _read_vision(config: Config, where: str, dtype: str) -> VisionTransformer:
  fields = Fields(config, where, DEFAULTS)
  hidden = fields.integer("intermediate_size")
  cells = fields.integer("num_position_embeddings")
  grid = round(cells**0.5)
  if grid * grid != cells:
    raise fields.wrong("num_position_embeddings", "the cells of a square")
  sizes = qwen.sizes(fields, "hidden_size", hidden)
  return encoders.qwen3_vl(dataclasses.replace(sizes, grid=grid), dtype=dtype)


def _write_vision(vision: VisionTransformer) -> dict[str, Any]:
  table = vision.positions
  return qwen.written(vision) | dict(
    hidden_size=vision.width,
    intermediate_size=vision.stack.blocks[0].mlp.hidden,
    num_position_embeddings=table.rows * table.columns,
  )


def _parts(parts: Parts) -> dict[str, Any]:
  where = f"{parts.fields.where}: vision_config"
  fields = Fields(parts.fields.get("vision_config") or {}, where, DEFAULTS)
  layers = qwen.layer_numbers(fields, DEEPER, parts.vision.stack.depth)
  most = min(MOST_DEEPER, parts.language.stack.depth - 1)
  if not 1 <= len(layers) <= most:
    raise fields.wrong(
      DEEPER, f"1 to {most}, fewer than the language model has layers"
    )

  def merger(norm: str) -> connectors.Squares:
    own = {norm: LayerNorm(eps=encoders.EPS)}
    return qwen.merger(parts, fields, WIDTH, **own)

  return dict(
    connector=connectors.DeepStack(
      first=merger("before"), deeper=tuple(merger("after") for _ in layers)
    ),
    # Theirs count blocks from 0; the input of the first is our layer 0.
    features=Features(layers=(-1, *(i + 1 for i in layers)), normed=False),
    normalise=normalise.HALF,
  )


def _fields(model: VisionLanguageModel, config: Config) -> dict[str, Any]:
  deeper = {DEEPER: [i - 1 for i in model.features.layers[1:]]}
  return qwen.with_merger(model, config, WIDTH, **deeper)


def _merger_rows(ours: str, norm: str, theirs: str) -> tuple[names.Row, ...]:
  return (
    *names.norm(f"{ours}/{norm}", f"{theirs}.norm"),
    *names.linear(f"{ours}/inner/up", f"{theirs}.linear_fc1"),
    *names.linear(f"{ours}/inner/down", f"{theirs}.linear_fc2"),
  )


QWEN3_VL = Family(
  model_type="qwen3_vl",
  architecture="Qwen3VLForConditionalGeneration",
  defaults=dict(image_token_id=151_655),
  image_token="image_token_id",
  vision_config=functools.partial(qwen.vision_config, kind=TOWER),
  towers=(qwen.tower(TOWER, _read_vision, _write_vision),),
  language=mrope.QWEN3_VL.language(),
  parts=_parts,
  fields=_fields,
  naming=qwen.naming("model.visual.", "model.language_model."),
  vision_rows=qwen.vision_rows({"up": "linear_fc1", "down": "linear_fc2"}),
  connector_rows=(
    *_merger_rows("first", "before", "merger"),
    *(
      row
      for i in range(MOST_DEEPER)
      for row in _merger_rows(
        f"deeper_{i}", "after", f"deepstack_merger_list.{i}"
      )
    ),
  ),
)

FAMILIES = (QWEN3_VL,)
