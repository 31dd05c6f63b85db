"""Published `preprocessor_config.json` files, read strictly.

A file names a class of transformers, whose defaults stand for what the file
leaves out. A key that nothing here reads is refused by its name, unless it is
about something else (`_ELSEWHERE`): what is ignored would show as a model that
sees a little worse.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from research.errors import UserError
from research.io.fields import Fields
from research.vlm.images import presets
from research.vlm.images.normalise import (
  CLIP,
  HALF,
  UNIT,
  Normalisation,
)
from research.vlm.images.plan import Tiling
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.prompts import (
  Layout,
  PromptFormat,
  RowsAndColumns,
  WholeAndCrops,
  Wrapped,
)
from research.vlm.images.resize import Resample
from research.vlm.images.tiling.anyres import LLAVA_NEXT, AnyRes
from research.vlm.images.tiling.budget import GEMMA4_BUDGETS, Budget
from research.vlm.images.tiling.centre_crop import CentreCrop
from research.vlm.images.tiling.idefics3 import Idefics3
from research.vlm.images.tiling.internvl import InternVL
from research.vlm.images.tiling.naflex import NaFlex
from research.vlm.images.tiling.native import Native
from research.vlm.images.tiling.overlap import Overlap
from research.vlm.images.tiling.pad_to_square import PadToSquare
from research.vlm.images.tiling.pan_and_scan import PanAndScan
from research.vlm.images.tiling.square import Square

_RESAMPLE = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""By Pillow's numbers."""

_PROMPTS = {
  "PaliGemmaProcessor": presets.PALIGEMMA,
  "Molmo2Processor": presets.MOLMO2_PROMPT,
}
"""By `processor_class`; other prompts have nothing beside images and text."""

_COMMON = {
  *("image_processor_type", "processor_class", "resample"),
  *("do_resize", "do_rescale", "rescale_factor"),
  *("do_normalize", "image_mean", "image_std"),
}

_ELSEWHERE = {
  # Every image becomes RGB; layouts of arrays and devices are ours.
  *("do_convert_rgb", "data_format", "input_data_format", "return_tensors"),
  *("device", "disable_grouping", "default_to_square", "model_input_names"),
  # The classes that load it, and counts that follow from the rest.
  *("auto_map", "feature_extractor_type", "image_seq_length", "image_seq_len"),
  *("return_row_col_info", "_valid_processor_keys", "transformers_version"),
}


@dataclasses.dataclass(frozen=True)
class _Source:
  """A file's fields, and what the model's own configuration adds."""

  fields: Fields
  patch: int | None
  pool: int | None

  def side(self, name: str = "size") -> int:
    """Returns a square's side, or the shorter side."""
    x = self.fields.get(name)
    if isinstance(x, dict):
      sides = {v for v in x.values() if v is not None}
      if x.keys() <= {"height", "width", "shortest_edge"} and len(sides) == 1:
        x = sides.pop()
    if type(x) is not int or not 1 <= x <= 2**14:
      raise self.fields.wrong(name, "a square's side, in pixels")
    return x

  def edge(self, name: str) -> int:
    x = self.fields.get(name)
    x = x.get("longest_edge") if isinstance(x, dict) else x
    if type(x) is not int or not 1 <= x <= 2**14:
      raise self.fields.wrong(name, 'an object with "longest_edge", in pixels')
    return x

  def pair(self, name: str) -> tuple[int, int]:
    x = self.fields.get(name)
    pair = isinstance(x, list | tuple) and len(x) == 2
    if not pair or any(type(side) is not int for side in x):
      raise self.fields.wrong(name, "two whole numbers")
    return tuple(x)

  def resample(self) -> Resample:
    x = self.fields.get("resample")
    if x not in _RESAMPLE:
      named = ", ".join(f"{k} ({v})" for k, v in _RESAMPLE.items())
      raise self.fields.wrong("resample", f"one of {named}")
    return _RESAMPLE[x]

  def encoder(self) -> dict[str, int]:
    """Returns patch and pool, which this kind of file leaves out."""
    if self.patch is None or self.pool is None:
      raise UserError(
        f"{self.fields.where}: files of this kind do not say the encoder's "
        "patch and how many of them become one token: pass patch= and pool=, "
        "from config.json (vision_config.patch_size and scale_factor)"
      )
    return {"patch": self.patch, "pool": self.pool}

  def normalisation(self) -> Normalisation:
    if not self.fields.flag("do_normalize"):
      return UNIT
    mean, std = (self._triple(name) for name in ("image_mean", "image_std"))
    if min(std) <= 0:
      raise self.fields.wrong("image_std", "three numbers above 0")
    return Normalisation(mean, std)

  def _triple(self, name: str) -> tuple[float, float, float]:
    x = self.fields.get(name)
    numbers = isinstance(x, list | tuple) and len(x) == 3
    if not numbers or any(
      type(v) not in (int, float) or not abs(v) < 1e30 for v in x
    ):
      raise self.fields.wrong(name, "three numbers")
    return tuple(map(float, x))


_Read = Callable[[_Source], tuple[Tiling, Layout, str]]


@dataclasses.dataclass(frozen=True)
class _Kind:
  """A class of image processors.

  Attributes:
    read: makes tiling, layout and placeholder of a file.
    keys: that it reads besides `_COMMON`.
    defaults: of the class.
  """

  read: _Read
  keys: tuple[str, ...]
  defaults: Mapping[str, Any]


def _clip(source: _Source):
  if source.fields.flag("do_center_crop"):
    size, crop = source.side(), source.side("crop_size")
    kind = CentreCrop(size, crop, resample=source.resample(),
                      **source.encoder())  # fmt: skip
  else:
    kind = _square(source)
  return kind, Wrapped(), "<image>"


def _square(source: _Source) -> Square:
  size = source.fields.get("size")
  if isinstance(size, dict) and "height" not in size:
    raise source.fields.wrong("size", "height and width, where nothing is cut")
  return Square(source.side(), resample=source.resample(), **source.encoder())


def _siglip(source: _Source):
  return _square(source), Wrapped(), "<image>"


def _llava(source: _Source):
  if not source.fields.flag("do_pad"):
    return _clip(source)
  mean = source.normalisation().mean
  colour = tuple(int(x * 255) for x in mean)
  kind = PadToSquare(source.side(), resample=source.resample(), colour=colour,
                     **source.encoder())  # fmt: skip
  if source.fields.flag("do_center_crop") and (
    source.side("crop_size") != kind.tile
  ):
    raise source.fields.wrong("crop_size", f"{kind.tile}, as size")
  return kind, Wrapped(), "<image>"


def _llava_next(source: _Source):
  fields = source.fields
  fields.neutral({"aspect_ratio_setting": (None, "anyres")})
  tile = source.side()
  if source.side("crop_size") != tile:
    raise fields.wrong("crop_size", f"{tile}, as size")
  canvases = fields.get("image_grid_pinpoints")
  if not isinstance(canvases, list | tuple) or not all(
    isinstance(x, list | tuple)
    and len(x) == 2
    and all(type(side) is int for side in x)
    for x in canvases
  ):
    raise fields.wrong("image_grid_pinpoints", "pairs of height and width")
  kind = AnyRes(tile, tuple(map(tuple, canvases)), resample=source.resample(),
                **source.encoder())  # fmt: skip
  return kind, Wrapped(), "<image>"


def _idefics3(source: _Source):
  splits = source.fields.flag("do_image_splitting")
  kind = Idefics3(
    longest=source.edge("size"),
    tile=source.edge("max_image_size"),
    resample=source.resample(),
    splitting="tiles" if splits else "none",
    **source.encoder(),
  )
  return kind, RowsAndColumns(), "<image>"


def _internvl(source: _Source):
  fields = source.fields
  # InternVL's processor asks for tiles whatever the file says.
  internvl = fields.get("processor_class") == "InternVLProcessor"
  if not internvl and not fields.flag("crop_to_patches"):
    return _square(source), Wrapped(), "<image>"
  kind = InternVL(
    source.side(),
    min_tiles=fields.integer("min_patches"),
    max_tiles=fields.integer("max_patches", most=400),
    resample=source.resample(),
    **source.encoder(),
  )
  return kind, presets.INTERNVL, "<IMG_CONTEXT>"


def _qwen(source: _Source):
  fields = source.fields
  size = fields.get("size") or {}
  if not isinstance(size, dict):
    raise fields.wrong("size", "an object")
  # The names are of edges, the numbers of pixels.
  bounds = {
    "min_pixels": fields.get("min_pixels") or size.get("shortest_edge"),
    "max_pixels": fields.get("max_pixels") or size.get("longest_edge"),
  }
  if any(type(x) is not int or x < 1 for x in bounds.values()):
    raise fields.wrong(
      "size", "shortest_edge and longest_edge, the numbers of pixels"
    )
  kind = Native(fields.integer("patch_size"), fields.integer("merge_size"),
                resample=source.resample(), **bounds)  # fmt: skip
  return kind, presets.QWEN, "<|image_pad|>"


def _siglip2(source: _Source):
  fields = source.fields
  kind = NaFlex(fields.integer("max_num_patches"), fields.integer("patch_size"),
                resample=source.resample())  # fmt: skip
  return kind, Wrapped(), "<image>"


def _gemma3(source: _Source):
  if source.fields.flag("do_pan_and_scan"):
    kind = PanAndScan(
      source.side(),
      ratio=source.fields.number("pan_and_scan_min_ratio_to_activate"),
      min_crop=source.fields.integer("pan_and_scan_min_crop_size"),
      most_crops=source.fields.integer("pan_and_scan_max_num_crops"),
      resample=source.resample(),
      **source.encoder(),
    )
  else:
    kind = _square(source)
  return kind, WholeAndCrops(), "<image_soft_token>"


def _gemma4(source: _Source):
  fields = source.fields
  budget = fields.integer("max_soft_tokens")
  if budget not in GEMMA4_BUDGETS:
    named = ", ".join(map(str, GEMMA4_BUDGETS))
    raise fields.wrong("max_soft_tokens", f"one of {named}")
  kind = Budget(budget, fields.integer("patch_size"),
                fields.integer("pooling_kernel_size"),
                resample=source.resample())  # fmt: skip
  return kind, presets.GEMMA4, "<|image|>"


def _molmo2(source: _Source):
  fields = source.fields
  pool, margins = source.pair("pooling_size"), source.pair("overlap_margins")
  if pool[0] != pool[1]:
    raise fields.wrong("pooling_size", "two equal numbers")
  if source.resample() != "bilinear":
    raise fields.wrong("resample", "2 (bilinear)")
  kind = Overlap(
    source.side(),
    max_tiles=fields.integer("max_crops", most=400),
    margins=margins,
    patch=fields.integer("patch_size"),
    pool=pool[0],
    resample="bilinear_sampled",
    fit="stretch",
  )
  return kind, presets.MOLMO2, "<im_patch>"


def _defaults(normalisation: Normalisation, resample: int, **more) -> dict:
  return {
    "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": normalisation.mean,
    "image_std": normalisation.std, "resample": resample,
  } | more  # fmt: skip


_CROP = {
  "size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224,
}  # fmt: skip
_CROPS = ("size", "do_center_crop", "crop_size")
_IDEFICS3 = _Kind(
  _idefics3,
  ("size", "max_image_size", "do_image_splitting", "do_pad"),
  _defaults(
    HALF, 1, size={"longest_edge": 1456},
    max_image_size={"longest_edge": 364}, do_image_splitting=True,
  ),
)  # fmt: skip
_PAN = "pan_and_scan_"
_KINDS = {
  "CLIPImageProcessor": _Kind(_clip, _CROPS, _defaults(CLIP, 3, **_CROP)),
  "SiglipImageProcessor": _Kind(
    _siglip, ("size",), _defaults(HALF, 3, size={"height": 224, "width": 224})
  ),
  "LlavaImageProcessor": _Kind(
    _llava, (*_CROPS, "do_pad"), _defaults(CLIP, 3, **_CROP)
  ),
  "LlavaNextImageProcessor": _Kind(
    _llava_next,
    (*_CROPS, "do_pad", "image_grid_pinpoints", "aspect_ratio_setting"),
    _defaults(CLIP, 3, **_CROP, image_grid_pinpoints=LLAVA_NEXT),
  ),
  "Idefics3ImageProcessor": _IDEFICS3,
  "SmolVLMImageProcessor": _IDEFICS3,
  "GotOcr2ImageProcessor": _Kind(
    _internvl,
    ("size", "crop_to_patches", "min_patches", "max_patches"),
    _defaults(
      CLIP, 3, size={"height": 384, "width": 384}, min_patches=1,
      max_patches=12,
    ),
  ),
  "Qwen2VLImageProcessor": _Kind(
    _qwen,
    ("size", "min_pixels", "max_pixels", "patch_size", "merge_size",
     "temporal_patch_size"),
    _defaults(
      CLIP, 3, size={"shortest_edge": 3136, "longest_edge": 1_003_520},
      patch_size=14, merge_size=2, temporal_patch_size=2,
    ),
  ),
  "Siglip2ImageProcessor": _Kind(
    _siglip2, ("patch_size", "max_num_patches"),
    _defaults(HALF, 2, patch_size=16, max_num_patches=256),
  ),
  "Gemma3ImageProcessor": _Kind(
    _gemma3,
    ("size", "do_pan_and_scan", _PAN + "min_crop_size",
     _PAN + "max_num_crops", _PAN + "min_ratio_to_activate"),
    # Those of pan and scan are Gemma3Processor's.
    _defaults(HALF, 2, size={"height": 224, "width": 224}) | {
      _PAN + "min_crop_size": 256, _PAN + "max_num_crops": 4,
      _PAN + "min_ratio_to_activate": 1.2,
    },
  ),
  # Some files have a size of 224, which the class does not read.
  "Gemma4ImageProcessor": _Kind(
    _gemma4, ("patch_size", "max_soft_tokens", "pooling_kernel_size", "size"),
    _defaults(UNIT, 3, patch_size=16, max_soft_tokens=280,
              pooling_kernel_size=3) | {"do_normalize": False},
  ),
  "Molmo2ImageProcessor": _Kind(
    _molmo2,
    ("size", "max_crops", "overlap_margins", "patch_size", "pooling_size"),
    _defaults(
      HALF, 2, size={"height": 378, "width": 378}, max_crops=8,
      overlap_margins=(4, 4), patch_size=14, pooling_size=(2, 2),
    ),
  ),
}  # fmt: skip


def from_preprocessor_config(
  source: Mapping[str, Any] | str | os.PathLike,
  *,
  patch: int | None = None,
  pool: int | None = None,
) -> Preprocessor:
  """Returns what a published model does with its images.

  Args:
    source: a `preprocessor_config.json`, or a `processor_config.json` with its
      object `image_processor`; a path or the object itself.
    patch: the encoder's patch, in pixels, where the file does not say.
    pool: patches, each way, that become one soft token, likewise.

  Raises:
    UserError: the file is of a class that is not known here, or says something
      that would not be done.
  """
  values, where = _object(source)
  if isinstance(values.get("image_processor"), dict):
    outer = {"processor_class": values.get("processor_class")}
    values = outer | values["image_processor"]
  name = values.get("image_processor_type")
  stem = str(name).removesuffix("Fast").removesuffix("Pil")
  if stem not in _KINDS:
    raise UserError(
      f"{where}: image_processor_type is {name!r}, expected one of "
      f"{', '.join(_KINDS)}"
    )
  kind = _KINDS[stem]
  # A null in a file stands for the class's default, as in transformers.
  given = {k: v for k, v in values.items() if v is not None}
  known = _COMMON | _ELSEWHERE | set(kind.keys)
  # What is switched off says nothing, whatever it is.
  unknown = sorted(k for k, v in given.items() if k not in known and v)
  if unknown:
    raise UserError(
      f"{where}: {', '.join(unknown)}: not known of {stem}, so that the images "
      "might differ from what the model was trained on; remove what has no "
      "effect, or add it to research/vlm/images/configs.py"
    )
  fields = Fields(given, where, kind.defaults)
  for required in ("do_resize", "do_rescale"):
    if not fields.flag(required):
      raise fields.wrong(required, "true")
  if abs(fields.number("rescale_factor") * 255 - 1) > 1e-6:
    raise fields.wrong("rescale_factor", "1/255")
  found = _Source(fields, patch, pool)
  tiling, layout, placeholder = kind.read(found)
  prompt = _PROMPTS.get(str(given.get("processor_class")), PromptFormat())
  return Preprocessor(
    tiling, found.normalisation(), layout, placeholder, prompt
  )


def _object(source) -> tuple[Mapping[str, Any], str]:
  if isinstance(source, Mapping):
    return source, "preprocessor_config.json"
  where = os.fspath(source)
  try:
    with open(where, encoding="utf-8") as file:
      values = json.load(file)
  except OSError as e:
    raise UserError(f"{where}: it cannot be read: {e.strerror}") from e
  except ValueError as e:
    raise UserError(f"{where}: not JSON: {e}") from e
  if not isinstance(values, dict):
    raise UserError(f"{where}: a {type(values).__name__}, expected an object")
  return values, where
