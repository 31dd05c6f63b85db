"""What the files of Qwen2-VL, Qwen2.5-VL and Qwen3-VL have in common.

What they say of videos is not read: no model here sees any.
"""

from collections.abc import Callable, Mapping
from typing import Any

from research.interop.hf import config as hf_config
from research.interop.vision import names, towers
from research.interop.vision.families.family import Config, Parts, field_of
from research.interop.vision.prefixes import Prefix, Prefixes
from research.interop.vision.towers import Tower
from research.io.fields import Fields
from research.nn.norm import Norm
from research.vlm import connectors
from research.vlm.encoders import qwen
from research.vlm.encoders.presets import EncoderSizes
from research.vlm.encoders.vit import Features, VisionTransformer
from research.vlm.model import VisionLanguageModel

VISION_DEFAULTS = dict(
  in_channels=3,
  in_chans=3,
  patch_size=14,
  spatial_merge_size=2,
  temporal_patch_size=qwen.FRAMES,
  num_heads=16,
)
"""Fields that a `vision_config` may leave out."""

OUTPUT = Features(layers=(-1,), normed=False)

ACTIVATIONS = towers.ACTIVATIONS | {"silu": "silu"}
"""transformers' name -> ours."""


def tower(
  kind: str,
  read: Callable[..., VisionTransformer],
  write: Callable[..., dict[str, Any]],
) -> Tower:
  """Returns a kind of tower; files before transformers 5 call it otherwise."""
  return Tower(kind, read, write, others=(kind.removesuffix("_vision"),))


def vision_config(config: Config, kind: str) -> dict[str, Any]:
  """Returns what a config.json says of its tower, which may have no type."""
  return {"model_type": kind} | field_of(config, "vision_config")


def sizes(fields: Fields, width: str, hidden: int) -> EncoderSizes:
  """Returns the sizes of a tower, but for its learned positions.

  Args:
    fields: of its `vision_config`.
    width: the field that has its width.

    UserError: a field has a value that no tower here has.
  """
  for channels in ("in_channels", "in_chans"):
    if fields.integer(channels) != 3:
      raise fields.wrong(channels, "3")
  if _side(fields, "temporal_patch_size") != qwen.FRAMES:
    raise fields.wrong("temporal_patch_size", f"{qwen.FRAMES}")
  rotation = fields.object("rope_parameters")
  if rotation is not None:
    rotation.neutral(dict(rope_type=(None, "axial"), rope_theta=(None, 10_000)))
  activation = fields.get("hidden_act")
  if not isinstance(activation, str) or activation not in ACTIVATIONS:
    raise fields.wrong("hidden_act", f"one of {', '.join(ACTIVATIONS)}")
  size = fields.integer(width)
  heads = fields.divisor("num_heads", size)
  if size // heads % 4:
    raise fields.wrong("num_heads", "heads of a multiple of 4 dimensions")
  return EncoderSizes(
    width=size,
    depth=fields.integer("depth", most=hf_config.MAX_DEPTH),
    heads=heads,
    hidden=hidden,
    patch=_side(fields, "patch_size"),
    activation=ACTIVATIONS[activation],
  )


def _side(fields: Fields, name: str) -> int:
  x = fields.get(name)
  if isinstance(x, list | tuple) and len(set(x)) == 1:
    fields = Fields({name: x[0]}, fields.where)
  return fields.integer(name, most=2**12)


def layer_numbers(fields: Fields, name: str, depth: int) -> list[int]:
  """Returns numbers of layers, from 0 and in order."""
  x = fields.get(name)
  ok = isinstance(x, list | tuple) and all(type(i) is int for i in x)
  if not ok or any(not 0 <= i < depth for i in x) or list(x) != sorted(set(x)):
    raise fields.wrong(name, f"numbers of layers below {depth}, in order")
  return list(x)


def written(vision: VisionTransformer) -> dict[str, Any]:
  """Returns the fields of a tower that all three have."""
  block = vision.stack.blocks[0]
  theirs = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
  return dict(
    depth=vision.stack.depth,
    num_heads=block.attention.heads,
    in_channels=3,
    patch_size=vision.patch,
    temporal_patch_size=vision.frames,
    hidden_act=theirs[block.mlp.activation],
  )


def merger(
  parts: Parts, fields: Fields, output: str, **norms: Norm
) -> connectors.Squares:
  """Returns what makes a soft token of a square of patches."""
  size, side = parts.language.width, fields.integer("spatial_merge_size")
  if fields.integer(output) != size:
    raise fields.wrong(output, f"{size}, the language model's width")
  inner = connectors.Mlp(size=size, hidden=parts.vision.width * side**2)
  return connectors.Squares(side=side, inner=inner, **norms)


def with_merger(
  model: VisionLanguageModel, config: Config, output: str, **more: Any
) -> dict[str, Any]:
  """Returns the `vision_config` of a model, that of its mergers included."""
  own = {"spatial_merge_size": model.square, output: model.language.width}
  return dict(vision_config={**config["vision_config"], **own, **more})


def naming(vision: str, language: str) -> Prefixes:
  """Returns which tensor is of which tower.

  Args:
    vision: what the names of the encoder and its mergers begin with in the
      Hub's files.
    language: what the names of the language model's layers begin with there.
  """
  mergers = r"(model\.)?visual\.(?=merger\.|deepstack_merger_list\.)"
  return Prefixes(
    (
      Prefix("connector", mergers, vision),
      Prefix("vision", r"(model\.)?visual\.", vision),
      Prefix("language", r"lm_head\.", "lm_head.", "lm_head."),
      Prefix("language", r"model\.(language_model\.)?", language, "model."),
    )
  )


_LAYER, _THEIRS = names.LAYER, "blocks.<i>."


def vision_rows(feed_forward: Mapping[str, str]) -> tuple[names.Row, ...]:
  """Returns the tensors of a tower.

  Args:
    feed_forward: our names of its matrices -> theirs.
  """
  qkv = f"{_THEIRS}attn.qkv"
  return (
    names.Row("patch_embed", "patch_embed.proj.weight", names.TWO_FRAMES),
    names.Row("patch_embed_bias", "patch_embed.proj.bias"),
    names.Row("positions/table", "pos_embed.weight"),
    *names.norm(f"{_LAYER}attention_norm", f"{_THEIRS}norm1"),
    *names.norm(f"{_LAYER}mlp_norm", f"{_THEIRS}norm2"),
    *(
      names.Row(f"{_LAYER}attention/{x}", f"{qkv}.weight", names.TRANSPOSED, i)
      for i, x in enumerate("qkv")
    ),
    *(
      names.Row(f"{_LAYER}attention/{x}_bias", f"{qkv}.bias", part=i)
      for i, x in enumerate("qkv")
    ),
    *names.linear(f"{_LAYER}attention/o", f"{_THEIRS}attn.proj"),
    *(
      row
      for ours, theirs in feed_forward.items()
      for row in names.linear(f"{_LAYER}mlp/{ours}", f"{_THEIRS}mlp.{theirs}")
    ),
  )
