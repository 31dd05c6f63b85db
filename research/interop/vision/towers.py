"""Image towers of CLIP, SigLIP and SigLIP 2, as `vision_config` describes them.

Fields that a file leaves out have the defaults of transformers' own
configuration classes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from research.interop.hf import config as hf_config
from research.io.fields import Fields
from research.vlm.encoders import presets
from research.vlm.encoders.positions import AntialiasedTable
from research.vlm.encoders.presets import EncoderSizes
from research.vlm.encoders.text import TextEncoder
from research.vlm.encoders.vit import VisionTransformer

ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "quick_gelu": "quick_gelu",
}
"""transformers' name -> ours."""

_THEIRS = {ours: theirs for theirs, ours in ACTIVATIONS.items()}


@dataclasses.dataclass(frozen=True)
class Tower:
  """A kind of image tower in files.

  Attributes:
    model_type: of its `vision_config`.
    read: (`vision_config`, its file and place for messages, dtype) -> tower.
    write: the tower -> its `vision_config`, but for the model type.
    describes: whether a tower is of this kind.
    others: model types that other files have for it.
  """

  model_type: str
  read: Callable[[Mapping[str, Any], str, str], Any]
  write: Callable[[Any], dict[str, Any]]
  describes: Callable[[Any], bool] = lambda tower: True
  others: tuple[str, ...] = ()

  @property
  def model_types(self) -> tuple[str, ...]:
    return (self.model_type, *self.others)


def activation(fields: Fields, name: str = "hidden_act") -> Any:
  """Returns our name of the activation in a field.

  Raises:
    UserError: it is none of `ACTIVATIONS`.
  """
  found = fields.get(name)
  if not isinstance(found, str) or found not in ACTIVATIONS:
    raise fields.wrong(name, f"one of {', '.join(ACTIVATIONS)}")
  return ACTIVATIONS[found]


def activation_name(ours: str) -> str:
  """Returns transformers' name of an activation; inverts `activation`."""
  return _THEIRS[ours]


CLIP_DEFAULTS = dict(
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
SIGLIP_DEFAULTS = CLIP_DEFAULTS | dict(
  patch_size=16,
  hidden_act="gelu_pytorch_tanh",
  layer_norm_eps=1e-6,
  vision_use_head=True,
)
NAFLEX_DEFAULTS = SIGLIP_DEFAULTS | dict(num_patches=256)
IDEFICS_DEFAULTS = SIGLIP_DEFAULTS | dict(
  hidden_size=1152, num_attention_heads=16, patch_size=32, vision_use_head=False
)


def sizes(fields: Fields) -> EncoderSizes:
  """Returns the sizes of a tower of images or texts, but for its images."""
  width = fields.integer("hidden_size")
  return EncoderSizes(
    width=width,
    depth=fields.integer("num_hidden_layers", most=hf_config.MAX_DEPTH),
    heads=fields.divisor("num_attention_heads", width),
    hidden=fields.integer("intermediate_size"),
    eps=fields.number("layer_norm_eps"),
    activation=activation(fields),
  )


def _image_sizes(fields: Fields) -> EncoderSizes:
  if fields.integer("num_channels") != 3:
    raise fields.wrong("num_channels", "3")
  side, patch = fields.integer("image_size"), fields.integer("patch_size")
  return dataclasses.replace(sizes(fields), patch=patch, grid=side // patch)


def clip(
  config: Mapping[str, Any], where: str, dtype: str, *, size: int | None = None
) -> VisionTransformer:
  """Returns CLIP's image tower.

  Args:
    size: of the space it shares with texts; None for a tower of patches.
  """
  fields = Fields(config, where, CLIP_DEFAULTS)
  return presets.clip(_image_sizes(fields), size=size).clone(dtype=dtype)


def siglip(
  config: Mapping[str, Any],
  where: str,
  dtype: str,
  *,
  defaults: Mapping[str, Any] = SIGLIP_DEFAULTS,
) -> VisionTransformer:
  """Returns SigLIP's image tower, its head included where the file has it.

  Args:
    defaults: of fields that the file leaves out.
  """
  fields = Fields(config, where, defaults)
  head = fields.flag("vision_use_head")
  return presets.siglip(_image_sizes(fields), head=head).clone(dtype=dtype)


def naflex(
  config: Mapping[str, Any], where: str, dtype: str
) -> VisionTransformer:
  """Returns SigLIP 2's tower of NaFlex."""
  fields = Fields(config, where, NAFLEX_DEFAULTS)
  if fields.integer("num_channels") != 3:
    raise fields.wrong("num_channels", "3")
  cells = fields.integer("num_patches")
  grid = math.isqrt(cells)
  if grid * grid != cells:
    raise fields.wrong("num_patches", "the cells of a square")
  patch = fields.integer("patch_size")
  own = dataclasses.replace(sizes(fields), patch=patch, grid=grid)
  head = fields.flag("vision_use_head")
  return presets.naflex(own, head=head).clone(dtype=dtype)


def written_sizes(tower: VisionTransformer | TextEncoder) -> dict[str, Any]:
  """Returns the fields of a tower's sizes; inverts `sizes`."""
  block = tower.stack.blocks[0]
  return dict(
    hidden_size=tower.width,
    intermediate_size=block.mlp.hidden,
    num_hidden_layers=tower.stack.depth,
    num_attention_heads=block.attention.heads,
    hidden_act=activation_name(block.mlp.activation),
    layer_norm_eps=block.norm.eps,
  )


def _written(vision: VisionTransformer) -> dict[str, Any]:
  table = vision.positions
  values = written_sizes(vision) | dict(num_channels=3, patch_size=vision.patch)
  if isinstance(table, AntialiasedTable):
    values["num_patches"] = table.rows * table.columns
  else:
    values["image_size"] = table.rows * vision.patch
  if not vision.class_token:
    values["vision_use_head"] = vision.pooling is not None
  return values


CLIP = Tower(
  "clip_vision_model", clip, _written, lambda tower: tower.class_token
)
NAFLEX = Tower(
  "siglip2_vision_model",
  naflex,
  _written,
  lambda tower: isinstance(tower.positions, AntialiasedTable),
)
SIGLIP = Tower(
  "siglip_vision_model", siglip, _written, lambda tower: not tower.class_token
)
IDEFICS3 = Tower(
  "idefics3_vision",
  functools.partial(siglip, defaults=IDEFICS_DEFAULTS),
  _written,
  others=("idefics3", "smolvlm_vision"),
)
SMOLVLM = dataclasses.replace(
  IDEFICS3,
  model_type="smolvlm_vision",
  others=("idefics3", "idefics3_vision"),
)
