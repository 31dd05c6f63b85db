"""What a row of a published vision language model says."""

import dataclasses

from research.nn import presets as language_models
from research.nn.attention import CrossAttention
from research.nn.cross_attention import GatedCrossAttention
from research.nn.gemma4 import Gemma4Sizes, gemma4
from research.nn.mlp import PlainMlp
from research.nn.multimodal import with_axes
from research.nn.presets import FAMILIES, Sizes
from research.nn.rope import Axes
from research.nn.transformer import Transformer
from research.vlm import cross_attention
from research.vlm.connectors.presets import CONNECTORS
from research.vlm.cross_attention import LatestImage
from research.vlm.encoders.vit import Features, VisionTransformer
from research.vlm.images import presets as images
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.masks import Causal, PromptMask
from research.vlm.model import VisionLanguageModel
from research.vlm.presets import reduced
from research.vlm.splice import Splice


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossLayers:
  """Gated cross-attention layers among a language model's own: Flamingo's.

  Attributes:
    every, first: before which layers they stand, see
      `cross_attention.interleave`.
    heads, head_dim: of their attention.
    hidden: inner width of their feed-forwards.
  """

  every: int
  first: int
  heads: int = 8
  head_dim: int = 64
  hidden: int

  def add_to(self, model: Transformer, media_width: int) -> Transformer:
    layer = GatedCrossAttention(
      attention=CrossAttention(heads=self.heads, head_dim=self.head_dim),
      mlp=PlainMlp(hidden=self.hidden, bias=False),
      media_width=media_width,
    )
    return cross_attention.interleave(model, layer, self.every, self.first)

  def reduced(self, shrink: int, depth: int) -> "CrossLayers":
    """Returns narrower layers, for a language model of `depth` at least."""
    every = min(self.every, depth)
    return dataclasses.replace(
      self,
      every=every,
      first=min(self.first, every - 1),
      head_dim=reduced.less(self.head_dim, shrink),
      hidden=reduced.less(self.hidden, shrink),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
  """A published model.

  Attributes:
    connector: a key of `connectors.presets.CONNECTORS`.
    family: of the language model, a key of `nn.presets.FAMILIES`, if it is of
      one.
    language: its sizes; or the model itself, without weights.
    image_token: id of the placeholder.
    images: its preprocessing, a key of `images.presets.PRESETS`.
    features: which activations of the encoder the connector gets.
    placement: where the language model meets the soft tokens: at placeholders,
      or in layers of cross-attention. An image prefix is at placeholders that
      stand before the text, see `images.prompts.PromptFormat.begin`.
    mask: what the tokens of a prompt see of each other.
    positions: rotary coordinates of the tokens, M-RoPE's; None for a token's
      place among all others.
    added_tokens: rows of the embedding behind the vocabulary, of tokens that
      are read and never written.
    diffusion: whether the language model fills in masks, and sees both ways.
  """

  vision: VisionTransformer
  connector: str
  family: str | None = None
  language: Sizes | Gemma4Sizes | Transformer
  image_token: int
  images: str
  features: Features = Features()
  placement: Splice | CrossLayers = Splice()
  mask: PromptMask = Causal()
  positions: Axes | None = None
  added_tokens: int = 0
  diffusion: bool = False

  @property
  def preprocessor(self) -> Preprocessor:
    return images.preset(self.images)

  def model(self, dtype: str = "float32") -> VisionLanguageModel:
    """Returns the model, which computes in `dtype`."""
    language, placement = self._language(dtype), self.placement
    features = len(self.features.layers) * self.vision.width
    if isinstance(placement, CrossLayers):
      # Resamplers leave what layers attend to as wide as the features.
      language = placement.add_to(language, features)
      placement = LatestImage()
    return VisionLanguageModel(
      vision=self.vision.clone(dtype=dtype),
      connector=CONNECTORS[self.connector](language.width, features),
      language=language,
      features=self.features,
      image_token=self.image_token,
      normalise=self.preprocessor.normalise,
      mask=self.mask,
      # No published connector's output is scaled as embeddings are.
      scale=1 / language.embed_scale,
      placement=placement,
    )

  def _language(self, dtype: str) -> Transformer:
    if isinstance(self.language, Transformer):
      model = self.language.clone(dtype=dtype)
    elif isinstance(self.language, Gemma4Sizes):
      model = gemma4(self.language, dtype)
    else:
      family = FAMILIES[self.family]
      model = language_models.transformer(family, self.language, dtype)
    if self.positions is not None:
      model = with_axes(model, self.positions)
    if self.added_tokens:
      model = model.clone(input_vocab=model.vocab_size + self.added_tokens)
    return model

  def reduced(self, shrink: int) -> "Preset":
    """Returns the same model with widths and depths divided, for tests.

    Heads, vocabulary, images and so the numbers of tokens stay as they are.
    Layers are two at least, and features are taken as far from the last as
    there are layers.
    """
    if shrink == 1:
      return self
    vision, placement = reduced.encoder(self.vision, shrink), self.placement
    # DeepStack serves a layer of the language model with each of its features.
    least = max(2, len(self.features.layers))
    language = reduced.language(
      self.language, shrink, least, rotated=self.positions is not None
    )
    if isinstance(placement, CrossLayers):
      placement = placement.reduced(shrink, least)
    return dataclasses.replace(
      self,
      vision=vision,
      language=language,
      features=reduced.features(self.features, vision.stack.depth),
      placement=placement,
      positions=reduced.positions(self.positions, self.language, language),
    )
