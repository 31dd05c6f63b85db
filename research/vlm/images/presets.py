"""The preprocessing of published models, as rows.

Figures are those of the models' `preprocessor_config.json`, as transformers 5
reads them, unless a comment says otherwise; a file of one's own is read by
`configs.from_preprocessor_config`.
"""

from collections.abc import Mapping

from research.errors import UserError
from research.vlm.images.normalise import CLIP, HALF, IMAGENET, UNIT
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.prompts import (
  PromptFormat,
  RowEnds,
  RowsAndColumns,
  WholeAndCrops,
  WholeThenTiles,
  Wrapped,
)
from research.vlm.images.tiling.anyres import AnyRes
from research.vlm.images.tiling.budget import Budget
from research.vlm.images.tiling.centre_crop import CentreCrop
from research.vlm.images.tiling.idefics3 import Idefics3
from research.vlm.images.tiling.internvl import InternVL
from research.vlm.images.tiling.naflex import NaFlex
from research.vlm.images.tiling.nanovlm import NanoVLM
from research.vlm.images.tiling.native import Native
from research.vlm.images.tiling.overlap import Overlap
from research.vlm.images.tiling.pad_to_square import PadToSquare
from research.vlm.images.tiling.pan_and_scan import PanAndScan
from research.vlm.images.tiling.square import Square

QWEN = Wrapped(("<|vision_start|>",), ("<|vision_end|>",))
INTERNVL = Wrapped(("<img>",), ("</img>",))
GEMMA4 = Wrapped(("<|image>",), ("<image|>",))
MOLMO2 = RowEnds(whole="<low_res_im_start>")
PALIGEMMA = PromptFormat(begin="after_images", end="\n")
"""Beyer et al. 2024 (arXiv:2407.07726), and `PaliGemmaProcessor`."""
MOLMO2_PROMPT = PromptFormat(begin="always")
"""`Molmo2Processor`; the tokenizer is Qwen's, which has no `bos`."""

_SMOLVLM = Preprocessor(
  Idefics3(longest=2048, tile=512, patch=16, pool=4), HALF, RowsAndColumns()
)
# Qwen2-VL's and 2.5-VL's files allow 16,384 tokens; the class's default is
# 1,280, `Native()`.
_QWEN2 = Preprocessor(
  Native(patch=14, merge=2, min_pixels=3136, max_pixels=12_845_056), CLIP, QWEN,
  "<|image_pad|>",
)  # fmt: skip


def _paligemma(pixels: int) -> Preprocessor:
  return Preprocessor(Square(pixels, patch=14), HALF, prompt=PALIGEMMA)


PRESETS: Mapping[str, Preprocessor] = {
  "clip-vit-l-336": Preprocessor(CentreCrop(336, 336, patch=14), CLIP),
  # One placeholder for a view, to which text attends in layers of its own.
  "open-flamingo": Preprocessor(CentreCrop(224, 224, patch=14, pool=16), CLIP),
  # `BlipImageProcessor`: stretched, 32 queries; the text follows, with </s>.
  "blip-2": Preprocessor(
    Square(224, patch=14, queries=32), CLIP,
    prompt=PromptFormat(begin="after_images"),
  ),
  "siglip-b-224": Preprocessor(Square(224, patch=16), HALF),
  # LLaVA's class for SigLIP: bicubic, whatever SigLIP 2's file says.
  "siglip2-so400m-384": Preprocessor(Square(384, patch=14), HALF),
  "siglip2-naflex": Preprocessor(NaFlex(256, patch=16), HALF),
  # Stage 1 crops; stage 2, and use, pads. (llava-hf's file crops.)
  "llava-1.5-stage1": Preprocessor(CentreCrop(336, 336, patch=14), CLIP),
  "llava-1.5": Preprocessor(PadToSquare(336, patch=14), CLIP),
  "llava-next": Preprocessor(AnyRes(), CLIP),
  "idefics3": Preprocessor(
    Idefics3(longest=1456, tile=364, patch=14, pool=2), HALF, RowsAndColumns()
  ),
  "smolvlm-256m": _SMOLVLM,
  "smolvlm-500m": _SMOLVLM,
  "smolvlm-2.2b": Preprocessor(
    Idefics3(longest=1536, tile=384, patch=14, pool=3), HALF, RowsAndColumns()
  ),
  "nanovlm-222m": Preprocessor(
    Square(224, patch=16, pool=2, resample="bilinear"), UNIT,
    placeholder="<|image|>",
  ),
  "nanovlm-460m": Preprocessor(NanoVLM(), UNIT, WholeThenTiles(), "<|image|>"),
  # big_vision trained with bilinear; the published file says bicubic.
  "paligemma-224": _paligemma(224),
  "paligemma-448": _paligemma(448),
  "paligemma-896": _paligemma(896),
  "gemma3": Preprocessor(
    Square(896, patch=14, pool=4, resample="bilinear"), HALF, WholeAndCrops(),
    "<image_soft_token>",
  ),
  "gemma3-pan-and-scan": Preprocessor(
    PanAndScan(), HALF, WholeAndCrops(), "<image_soft_token>"
  ),
  "gemma4": Preprocessor(Budget(), UNIT, GEMMA4, "<|image|>"),
  "internvl": Preprocessor(InternVL(), IMAGENET, INTERNVL, "<IMG_CONTEXT>"),
  "qwen2-vl": _QWEN2,
  "qwen2.5-vl": _QWEN2,
  "llava-onevision-1.5": _QWEN2,  # Qwen2.5-VL's processor
  "qwen3-vl": Preprocessor(
    Native(patch=16, merge=2, min_pixels=65_536, max_pixels=16_777_216), HALF,
    QWEN,
    "<|image_pad|>",
  ),
  "molmo": Preprocessor(Overlap(), CLIP, RowEnds(), "<im_patch>"),
  "molmo2": Preprocessor(
    Overlap(tile=378, max_tiles=8, resample="bilinear_sampled", fit="stretch"),
    HALF, MOLMO2, "<im_patch>", MOLMO2_PROMPT,
  ),
}  # fmt: skip


def preset(name: str) -> Preprocessor:
  """Returns a published model's preprocessing."""
  if name not in PRESETS:
    raise UserError(
      f"preset is {name!r}, expected one of {', '.join(sorted(PRESETS))}"
    )
  return PRESETS[name]
