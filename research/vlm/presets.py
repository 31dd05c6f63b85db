"""Published vision language models as rows: shapes, masks and images.

A row has no weights. Plans, the arithmetic of an image (`arithmetic`) and the
recipes of configs/runs/vlm are made of it; `interop.load_model` reads weights.
Figures are those of the models' `config.json`, unless a comment says otherwise.
"""

import dataclasses
from collections.abc import Mapping

from research.nn import presets as language_models
from research.nn.presets import FAMILIES, Sizes
from research.nn.rope import Linear
from research.typing import UserError
from research.vlm.connectors.presets import CONNECTORS
from research.vlm.encoders import presets as encoders
from research.vlm.encoders.presets import CLIP_L14_336, SIGLIP_SIZES
from research.vlm.encoders.vit import Features, VisionTransformer
from research.vlm.images import presets as images
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.prompts import Token
from research.vlm.masks import (
  BidirectionalImages,
  BidirectionalPrompt,
  Causal,
  PromptMask,
)
from research.vlm.model import VisionLanguageModel

SMALLEST = 16
"""Width of a head that `reduced` leaves, at least; a multiple of 4, so that
rotary axes can share it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
  """A published model.

  Attributes:
    vision: the encoder.
    connector: a key of `connectors.presets.CONNECTORS`.
    family: of the language model, a key of `nn.presets.FAMILIES`.
    language: its sizes.
    image_token: id of the placeholder.
    images: its preprocessing, a key of `images.presets.PRESETS`.
    features: which activations of the encoder the connector gets.
    mask: what the tokens of a prompt see of each other.
    diffusion: whether the language model fills in masks, and sees both ways.
  """

  vision: VisionTransformer
  connector: str
  family: str
  language: Sizes
  image_token: int
  images: str
  features: Features = Features()
  mask: PromptMask = Causal()
  diffusion: bool = False

  @property
  def preprocessor(self) -> Preprocessor:
    """Returns what becomes of its images."""
    return images.preset(self.images)

  def model(self, dtype: str = "float32") -> VisionLanguageModel:
    """Returns the model, which computes in `dtype`."""
    family = FAMILIES[self.family]
    language = language_models.transformer(family, self.language, dtype)
    features = len(self.features.layers) * self.vision.width
    return VisionLanguageModel(
      vision=self.vision.clone(dtype=dtype),
      connector=CONNECTORS[self.connector](self.language.width, features),
      language=language,
      features=self.features,
      image_token=self.image_token,
      normalise=self.preprocessor.normalise,
      mask=self.mask,
      # No published connector's output is scaled as embeddings are.
      scale=1 / language.embed_scale,
    )

  def reduced(self, shrink: int) -> "Preset":
    """Returns the same model with widths and depths divided, for tests.

    Heads, vocabulary, images and so the numbers of tokens stay as they are.
    Layers are two at least, and features are taken as far from the last.

    Args:
      shrink: what widths and depths are divided by; 1 for all of it.
    """
    if shrink == 1:
      return self
    return dataclasses.replace(
      self,
      vision=_reduced_encoder(self.vision, shrink),
      language=_reduced_language(self.language, shrink),
    )


def _less(size: int, shrink: int, least: int) -> int:
  return max(least, size // shrink)


def _reduced_encoder(model: VisionTransformer, shrink: int):
  [block] = model.stack.blocks
  attention = block.attention
  dim = _less(attention.head_dim, shrink, SMALLEST)
  hidden = _less(block.mlp.hidden, shrink, SMALLEST)
  block = block.clone(
    attention=attention.clone(head_dim=dim), mlp=block.mlp.clone(hidden=hidden)
  )
  stack = dataclasses.replace(
    model.stack, depth=_less(model.stack.depth, shrink, 2), blocks=(block,)
  )
  return model.clone(width=attention.heads * dim, stack=stack)


def _reduced_language(sizes: Sizes, shrink: int) -> Sizes:
  dim = _less(sizes.head_dim, shrink, SMALLEST)
  return dataclasses.replace(
    sizes,
    head_dim=dim,
    width=_less(sizes.width, shrink, SMALLEST),
    hidden=_less(sizes.hidden, shrink, SMALLEST),
    depth=_less(sizes.depth, shrink, 2),
  )


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


def _llava(language: Sizes, preprocessor: str = "llava-1.5") -> Preset:
  # The placeholder follows the vocabulary, as in llava-hf's files.
  return Preset(
    vision=encoders.clip(CLIP_L14_336),
    connector="llava-1.5",
    family="llama",
    language=language,
    image_token=32_000,
    images=preprocessor,
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
  """Returns the tokens that may stand around a published model's images.

  Args:
    name: of a preset.
  """
  preprocessor = preset(name).preprocessor
  # A square image is cut into as many rows and columns as any.
  pieces = preprocessor.pieces(preprocessor.plan(64, 64))
  return tuple(dict.fromkeys(x.text for x in pieces if isinstance(x, Token)))
