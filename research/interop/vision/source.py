"""A new vision language model: an encoder, a connector, a language model."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax

from research.interop.loaded import Loaded
from research.nn.cross_attention import GatedCrossAttention
from research.nn.layers import Remat
from research.vlm import cross_attention
from research.vlm.encoders.vit import Features, VisionTransformer
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.masks import Causal, PromptMask
from research.vlm.model import Connector, VisionLanguageModel
from research.vlm.splice import Splice


@runtime_checkable
class LanguageSource(Protocol):
  """Where a language model comes from."""

  def load(self, shardings: Any = None) -> Loaded: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interleaved:
  """A language model with new layers that attend to images (Flamingo).

  Attributes:
    language: source of the language model, its weights and its tokenizer.
    layer: the new layer.
    every, first: which layers have one before them, as for `interleave`.
    seed: of the new weights.
  """

  language: LanguageSource
  layer: GatedCrossAttention
  every: int
  first: int = 0
  seed: int = 0

  def load(self, shardings: Callable[[Any], Any] | None = None) -> Loaded:
    """Returns the model with its new layers; arguments as for `Assembled`."""
    loaded = self.language.load(shardings)
    model = cross_attention.interleave(
      loaded.model, self.layer, self.every, self.first
    )

    def add(params):
      key = jax.random.key(self.seed)
      return cross_attention.add_layers(model, params, key)

    places = None
    if shardings is not None:
      places = shardings(jax.eval_shape(add, loaded.params))
    params = jax.jit(add, out_shardings=places)(loaded.params)
    return dataclasses.replace(loaded, model=model, params=params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assembled:
  """A vision language model whose encoder and connector are new.

  Attributes:
    language: source of the language model, its weights and its tokenizer.
    vision: the encoder.
    connector: whose size is the language model's width.
    image_token: id of the placeholder; None for the first id after the
      vocabulary.
    features: which activations of the encoder the connector gets.
    preprocessor: what becomes of images.
    mask: what the tokens of a prompt see of each other.
    placement: where the language model meets images: `LatestImage()` for an
      `Interleaved` one, with a placeholder of its vocabulary.
    seed: of the new weights.
    remat: what the encoder's backward pass recomputes.
  """

  language: LanguageSource
  vision: VisionTransformer
  connector: Connector
  image_token: int | None = None
  features: Features = Features()
  preprocessor: Preprocessor
  mask: PromptMask = Causal()
  placement: Splice | cross_attention.LatestImage = Splice()
  seed: int = 0
  remat: Remat = "none"

  def load(self, shardings: Callable[[Any], Any] | None = None) -> Loaded:
    """Returns the model, its weights, and the language model's tokenizer.

    Args:
      shardings: abstract parameters -> their shardings.
    """
    loaded = self.language.load(shardings)
    token = self.image_token
    model = VisionLanguageModel(
      vision=self.vision.clone(remat=self.remat),
      connector=self.connector,
      language=loaded.model,
      features=self.features,
      normalise=self.preprocessor.normalise,
      mask=self.mask,
      placement=self.placement,
      image_token=loaded.model.vocab_size if token is None else token,
    )
    key, places = jax.random.key(self.seed), None
    if shardings is not None:
      places = shardings(jax.eval_shape(model.new_towers, key))
    towers = jax.jit(model.new_towers, out_shardings=places)(key)
    source = {"format": "fresh", "language": loaded.source, "seed": self.seed}
    return dataclasses.replace(
      loaded,
      model=model,
      params=towers | {"language": loaded.params},
      source=source,
      preprocessor=self.preprocessor,
    )
