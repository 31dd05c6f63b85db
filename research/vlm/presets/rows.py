"""Published vision language models as rows: shapes, masks and images.

A row has no weights. Plans, the arithmetic of an image (`arithmetic`) and the
recipes of configs/runs/vlm are made of it; `interop.load_model` reads weights.
Figures are those of the models' `config.json`, unless a comment says otherwise;
tests count parameters against transformers' classes and the models' pages.
"""

import dataclasses
from collections.abc import Mapping

from research.nn import presets as language_models
from research.nn.attention import Attention
from research.nn.block import Block
from research.nn.gemma4 import Gemma4Sizes
from research.nn.mlp import PlainMlp
from research.nn.norm import LayerNorm
from research.nn.presets import Sizes
from research.nn.rope import InterleavedSections, Linear, Sections
from research.nn.stack import Stack
from research.nn.transformer import Transformer
from research.typing import UserError
from research.vlm.encoders import presets as encoders
from research.vlm.encoders import qwen
from research.vlm.encoders.clipped import Clipping
from research.vlm.encoders.gemma4 import Gemma4Heads, gemma4_vision
from research.vlm.encoders.presets import (
  CLIP_L14_336,
  SIGLIP_SIZES,
  EncoderSizes,
)
from research.vlm.encoders.vit import Features, VisionTransformer
from research.vlm.images.prompts import Token
from research.vlm.masks import (
  BidirectionalImages,
  BidirectionalPrompt,
  BidirectionalVision,
)
from research.vlm.presets.published import CrossLayers, Preset
from research.vlm.splice import Splice


def _siglip(size: str, pixels: int, patch: int = 16) -> VisionTransformer:
  return encoders.siglip(
    dataclasses.replace(SIGLIP_SIZES[size], patch=patch, grid=pixels // patch)
  )


_LLAVA_FEATURES = Features(layers=(-2,), normed=False)
_SMOLLM2 = dataclasses.replace(
  language_models.SMOLLM2_135M, vocab=49_280, tied=False
)
_GEMMA_2B = Sizes(
  vocab=257_216, width=2_048, depth=18, heads=8, kv_heads=1, head_dim=256,
  hidden=16_384, eps=1e-6, max_positions=8_192,
)  # fmt: skip
_QWEN3_4B = Sizes(
  vocab=151_936, width=2_560, depth=36, heads=32, kv_heads=8, head_dim=128,
  hidden=9_728, theta=1e6, eps=1e-6, tied=False, max_positions=32_768,
)  # fmt: skip
_QWEN3_8B = dataclasses.replace(_QWEN3_4B, width=4_096, hidden=12_288)
_LLAMA2_13B = dataclasses.replace(
  language_models.LLAMA2_7B, width=5_120, depth=40, heads=40, kv_heads=40,
  hidden=13_824,
)  # fmt: skip


def _llava(language: Sizes) -> Preset:
  # The placeholder follows the vocabulary, as in llava-hf's files.
  return Preset(
    vision=encoders.clip(CLIP_L14_336),
    connector="llava-1.5",
    family="llama",
    language=language,
    image_token=32_000,
    images="llava-1.5",
    features=_LLAVA_FEATURES,
  )


def _smolvlm(language: Sizes) -> Preset:
  return Preset(
    vision=_siglip("B", 512),
    connector="smolvlm-256m",
    family="llama",
    language=language,
    image_token=49_190,
    images="smolvlm-256m",
  )


def _paligemma(pixels: int) -> Preset:
  return Preset(
    vision=_siglip("So400m", pixels, patch=14),
    connector="paligemma",
    family="gemma",
    language=_GEMMA_2B,
    image_token=257_152,
    images=f"paligemma-{pixels}",
    mask=BidirectionalPrompt(),
  )


def _llava_onevision(language: Sizes) -> Preset:
  # RICE's class token, which the merger never sees, is left out.
  return Preset(
    vision=encoders.rice(CLIP_L14_336),
    connector="qwen2-vl",
    family="qwen3",
    language=language,
    image_token=151_655,
    images="llava-onevision-1.5",
    features=Features(normed=False),
  )


_QWEN_VISION = EncoderSizes(
  width=1_280, depth=32, heads=16, hidden=5_120, patch=14
)
# Qwen2's language models of 1.5 and 7 billion parameters, and 2.5's of 3.
_QWEN2_1B5 = Sizes(
  vocab=151_936, width=1_536, depth=28, heads=12, kv_heads=2, head_dim=128,
  hidden=8_960, theta=1e6, eps=1e-6, tied=True, max_positions=32_768,
)  # fmt: skip
_QWEN2_7B = dataclasses.replace(
  _QWEN2_1B5, vocab=152_064, width=3_584, heads=28, kv_heads=4, hidden=18_944,
  tied=False,
)  # fmt: skip
_QWEN2_3B = dataclasses.replace(
  _QWEN2_1B5, width=2_048, depth=36, heads=16, hidden=11_008,
  max_positions=128_000,
)  # fmt: skip


def _qwen_vl(
  version: str, vision: VisionTransformer, language: Sizes, **more
) -> Preset:
  given = dict(
    family="qwen2",
    features=Features(normed=False),
    positions=Sections(sizes=(16, 24, 24)),
  )
  return Preset(
    vision=vision, connector=version, images=version, language=language,
    image_token=151_655, **(given | more),
  )  # fmt: skip


def _qwen2_5_vl(language: Sizes) -> Preset:
  sizes = dataclasses.replace(_QWEN_VISION, hidden=3_420)
  return _qwen_vl("qwen2.5-vl", qwen.qwen2_5_vl(sizes), language)


def _qwen3_vl(vision: EncoderSizes, deeper: tuple, language: Sizes) -> Preset:
  # Theta is the published files'; the class's default is another.
  return _qwen_vl(
    "qwen3-vl", qwen.qwen3_vl(vision),
    dataclasses.replace(language, theta=5e6, max_positions=262_144),
    family="qwen3", features=Features(layers=(-1, *deeper), normed=False),
    positions=InterleavedSections(sizes=(24, 20, 20)),
  )  # fmt: skip


_QWEN3_VISION_L = EncoderSizes(
  width=1_024, depth=24, heads=16, hidden=4_096, patch=16, grid=48
)
_QWEN3_VISION_SO = EncoderSizes(
  width=1_152, depth=27, heads=16, hidden=4_304, patch=16, grid=48
)


def _internvl(language: Sizes) -> Preset:
  # InternVL3.5's, arXiv:2508.18265: InternViT-300M and Qwen3. 151,671 is the
  # first id behind its tokenizer's, <img> and </img>.
  return Preset(
    vision=encoders.intern_vit(encoders.INTERN_VIT_300M),
    connector="internvl", family="qwen3", language=language,
    image_token=151_671, images="internvl", features=Features(normed=False),
  )  # fmt: skip


# Sizes of Gemma 4: the variants of transformers'
# `convert_gemma4_weights.py`; the audio encoders of E2B and E4B are left out.
_GEMMA4_SMALL_VISION = gemma4_vision(
  EncoderSizes(
    width=768, depth=16, heads=12, hidden=3_072, patch=16, grid=10_240
  ),
  Gemma4Heads(kv_heads=12),
  clipping=Clipping(),
)
_GEMMA4_LARGE_VISION = gemma4_vision(
  EncoderSizes(
    width=1_152, depth=27, heads=16, hidden=4_304, patch=16, grid=10_240
  ),
  Gemma4Heads(kv_heads=16, head_dim=72),
)
_GEMMA4_E2B = Gemma4Sizes(
  vocab=262_144, width=1_536, hidden=6_144, heads=8,
  kinds=(*("local",) * 4, "global") * 7, kv_heads=1, global_kv_heads=1,
  kv_shared_layers=20, kv_shared_hidden=12_288, per_layer=256,
  per_layer_vocab=262_144, softcap=30.0,
)  # fmt: skip
_GEMMA4_E4B = dataclasses.replace(
  _GEMMA4_E2B, width=2_560, hidden=10_240,
  kinds=(*("local",) * 5, "global") * 7, kv_heads=2, global_kv_heads=2,
  kv_shared_layers=18, kv_shared_hidden=10_240,
)  # fmt: skip
_GEMMA4_31B = Gemma4Sizes(
  vocab=262_144, width=5_376, hidden=21_504, heads=32,
  kinds=(*("local",) * 5, "global") * 10, kv_heads=16, global_kv_heads=4,
  global_values="keys", global_images="causal", window=1_024, softcap=30.0,
  max_positions=262_144,
)  # fmt: skip


def _gemma4(vision: VisionTransformer, language: Gemma4Sizes, **more) -> Preset:
  given = dict(connector="gemma4")
  return Preset(
    vision=vision, language=language, image_token=258_880, images="gemma4",
    features=Features(normed=False), **(given | more),
  )  # fmt: skip


def _opt(width: int, depth: int, heads: int) -> Transformer:
  """Returns OPT (Zhang et al. 2022, arXiv:2205.01068), of positions unaware.

  Its 2,050 learned positions are left out: no Transformer here has any. They
  are additions, so that plans and arithmetic are OPT's, but for their memory.
  """
  block = Block(
    attention=Attention(
      heads=heads, kv_heads=heads, head_dim=width // heads, rope=None,
      qkv_bias=True, out_bias=True,
    ),
    mlp=PlainMlp(hidden=4 * width, activation="relu"),
    norm=LayerNorm(eps=1e-5),
  )  # fmt: skip
  return Transformer(
    vocab_size=50_272, width=width, stack=Stack(depth, (block,)),
    norm=LayerNorm(eps=1e-5), max_positions=2_048,
  )  # fmt: skip


PRESETS: Mapping[str, Preset] = {
  "llava-1.5-7b": _llava(language_models.LLAMA2_7B),
  "llava-1.5-13b": _llava(_LLAMA2_13B),
  "smolvlm-256m": _smolvlm(_SMOLLM2),
  "smolvlm-500m": _smolvlm(
    dataclasses.replace(
      _SMOLLM2, width=960, depth=32, heads=15, kv_heads=5, hidden=2_560
    )
  ),
  "nanovlm-222m": Preset(
    vision=_siglip("B", 224), connector="nanovlm", family="llama",
    language=language_models.SMOLLM2_135M, image_token=49_152,
    images="nanovlm-222m",
  ),
  "paligemma-3b-224": _paligemma(224),
  "paligemma-3b-448": _paligemma(448),
  "paligemma-3b-896": _paligemma(896),
  "gemma3-4b": Preset(
    vision=_siglip("So400m", 896, patch=14), connector="gemma3",
    family="gemma3",
    language=Sizes(
      vocab=262_208, width=2_560, depth=34, heads=8, kv_heads=4, head_dim=256,
      hidden=10_240, theta=1e6, local_theta=1e4, window=1_024, eps=1e-6,
      scaling=Linear(factor=8.0), max_positions=131_072,
    ),
    image_token=262_144, images="gemma3",
    mask=BidirectionalImages(image_token=262_144),
  ),
  "llava-onevision-1.5-4b": _llava_onevision(_QWEN3_4B),
  "llava-onevision-1.5-8b": _llava_onevision(_QWEN3_8B),
  # SigLIP 2's features before the last layer; the authors drop that layer.
  "llada-v-8b": Preset(
    vision=_siglip("So400m", 384, patch=14), connector="llava-1.5",
    family="llama", language=language_models.LLADA_8B, image_token=126_464,
    images="siglip2-so400m-384", features=_LLAVA_FEATURES, diffusion=True,
  ),
  "qwen2-vl-2b": _qwen_vl(
    "qwen2-vl", qwen.qwen2_vl(_QWEN_VISION), _QWEN2_1B5
  ),
  "qwen2-vl-7b": _qwen_vl(
    "qwen2-vl", qwen.qwen2_vl(_QWEN_VISION), _QWEN2_7B
  ),
  "qwen2.5-vl-3b": _qwen2_5_vl(_QWEN2_3B),
  "qwen2.5-vl-7b": _qwen2_5_vl(
    dataclasses.replace(_QWEN2_7B, max_positions=128_000)
  ),
  # DeepStack's layers 5, 11, 17 and 8, 16, 24 are theirs, which count from 0.
  "qwen3-vl-4b": _qwen3_vl(
    _QWEN3_VISION_L, (6, 12, 18), dataclasses.replace(_QWEN3_4B, tied=True)
  ),
  "qwen3-vl-8b": _qwen3_vl(_QWEN3_VISION_SO, (9, 17, 25), _QWEN3_8B),
  "internvl3.5-1b": _internvl(
    dataclasses.replace(
      _QWEN3_4B, width=1_024, depth=28, heads=16, hidden=3_072,
      max_positions=40_960,
    )
  ),
  "internvl3.5-8b": _internvl(
    dataclasses.replace(_QWEN3_8B, max_positions=40_960)
  ),
  "gemma4-e2b": _gemma4(_GEMMA4_SMALL_VISION, _GEMMA4_E2B),
  "gemma4-e4b": _gemma4(_GEMMA4_SMALL_VISION, _GEMMA4_E4B),
  "gemma4-31b": _gemma4(
    _GEMMA4_LARGE_VISION, _GEMMA4_31B, connector="gemma4-31b",
    mask=BidirectionalImages(image_token=258_880),
  ),
  # Molmo2-4B: Qwen3-4B of 2507, untied, and SigLIP 2 without its last two
  # layers. The connector is as wide inside as the language model's layers, by
  # its 4.85 billion parameters.
  "molmo2-4b": Preset(
    vision=encoders.siglip(
      dataclasses.replace(SIGLIP_SIZES["So400m"], depth=25, grid=27)
    ).clone(norm=None),
    connector="molmo2-4b", family="qwen3",
    language=dataclasses.replace(_QWEN3_4B, theta=5e6, max_positions=36_864),
    image_token=151_938, images="molmo2",
    features=Features(layers=(-1, -7), normed=False),
    placement=Splice(onto="embedding"),
    # The patches, what is around them, ends of rows, and of frames.
    mask=BidirectionalVision(tokens=(
      151_938, 151_936, 151_937, 151_939, 151_940, 151_942, 151_943, 151_944
    )),
    added_tokens=128,
  ),
  # Salesforce's blip2-opt-2.7b, arXiv:2301.12597: EVA's ViT-g without its last
  # layer. The queries' soft tokens come before the text.
  "blip-2-opt-2.7b": Preset(
    vision=encoders.eva(encoders.EVA_G14), connector="blip-2",
    language=_opt(2_560, 32, 32), image_token=50_265, images="blip-2",
    features=Features(class_token=True),
  ),
  # The first OpenFlamingo-9B (mlfoundations/open_flamingo, `factory.py` and
  # `helpers.py`): LLaMA-7B with three more tokens, a layer before each fourth,
  # and the features of CLIP's last layer without its class token.
  "open-flamingo-9b": Preset(
    vision=encoders.clip(dataclasses.replace(CLIP_L14_336, grid=16)),
    connector="flamingo", family="llama",
    language=dataclasses.replace(
      language_models.LLAMA2_7B, vocab=32_003, eps=1e-6, max_positions=2_048
    ),
    image_token=32_001, images="open-flamingo",
    features=Features(normed=False),
    placement=CrossLayers(every=4, first=3, hidden=16_384),
  ),
}  # fmt: skip


def preset(name: str) -> Preset:
  """Returns a published model.

  Raises:
    UserError: there is no such row.
  """
  if name not in PRESETS:
    raise UserError(
      f"preset: found {name!r}, expected one of {', '.join(PRESETS)}"
    )
  return PRESETS[name]


def wrapper_tokens(name: str) -> tuple[str, ...]:
  """Returns the tokens that may stand around a published model's images."""
  preprocessor = preset(name).preprocessor
  # A square image is cut into as many rows and columns as any.
  pieces = preprocessor.pieces(preprocessor.plan(64, 64))
  return tuple(dict.fromkeys(x.text for x in pieces if isinstance(x, Token)))
