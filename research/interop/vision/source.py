"""A new vision language model: an encoder, a connector, a language model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from research import tree
from research.interop.loaded import Loaded, Source, load_abstract
from research.nn.cross_attention import GatedCrossAttention
from research.nn.layers import Remat
from research.typing import Params, UserError
from research.vlm import cross_attention
from research.vlm.contrastive.dual_encoder import DualEncoder
from research.vlm.encoders.vit import Features, VisionTransformer
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.masks import Causal, PromptMask
from research.vlm.model import Connector, VisionLanguageModel
from research.vlm.splice import Splice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interleaved:
  """A language model with new layers that attend to images (Flamingo).

  Attributes:
    language: source of the language model, its weights and its tokenizer.
    layer: the new layer.
    every, first: which layers have one before them, as for `interleave`.
    seed: of the new weights.
  """

  language: Source
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
  """A vision language model of an encoder, a new connector, a language model.

  Attributes:
    language: source of the language model, its weights and its tokenizer.
    vision: the encoder.
    encoder: source of a model whose encoder's weights it starts with: a vision
      language model, all of it, or two towers that were trained contrastively
      (their pooling is left out); None for new ones.
    connector: whose size is the language model's width.
    image_token: id of the placeholder; None for the first id after the
      vocabulary.
    features: which activations of the encoder the connector gets.
    preprocessor: what becomes of images.
    mask: what the tokens of a prompt see of each other.
    placement: where the language model meets images: `LatestImage()` for an
      `Interleaved` one, with a placeholder of its vocabulary.
    seed: of the new weights.
  """

  language: Source
  vision: VisionTransformer
  encoder: Source | None = None
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

    Raises:
      UserError: the encoder's weights are those of another encoder, or it was
        trained on pixels of another normalisation.
    """
    loaded = self.language.load(shardings)
    model = self._model(loaded)
    key, places = jax.random.key(self.seed), None
    if shardings is not None:
      places = shardings(jax.eval_shape(model.new_towers, key))
    towers = jax.jit(model.new_towers, out_shardings=places)(key)
    source = {"format": "fresh", "language": loaded.source, "seed": self.seed}
    if self.encoder is not None:
      read = self.encoder.load()
      found = encoder_params(self.vision, read.model, read.params)
      _check_normalisation(read, self.preprocessor)
      new = towers["vision"]
      found = jax.tree.map(lambda x, y: x.astype(y.dtype), found, new)
      towers["vision"] = (
        tree.device_put_like(found, new)
        if places is None
        else jax.device_put(found, places["vision"])
      )
      source["encoder"] = read.source
    return self._assembled(loaded, model, towers, source)

  def load_abstract(self) -> Loaded:
    """Returns the same with shapes in place of weights, which are not read."""
    loaded = load_abstract(self.language)
    model = self._model(loaded)
    towers = jax.eval_shape(model.new_towers, jax.random.key(self.seed))
    return self._assembled(loaded, model, towers, {"format": "fresh"})

  def _model(self, language: Loaded) -> VisionLanguageModel:
    token = self.image_token
    return VisionLanguageModel(
      vision=self.vision.clone(remat=self.remat),
      connector=self.connector,
      language=language.model,
      features=self.features,
      normalise=self.preprocessor.normalise,
      mask=self.mask,
      placement=self.placement,
      image_token=language.model.vocab_size if token is None else token,
    )

  def _assembled(
    self,
    language: Loaded,
    model: VisionLanguageModel,
    towers: Params,
    source: dict[str, Any],
  ) -> Loaded:
    return dataclasses.replace(
      language,
      model=model,
      params=towers | {"language": language.params},
      source=source,
      preprocessor=self.preprocessor,
    )


def encoder_params(
  vision: VisionTransformer, model: Any, params: Params
) -> Params:
  """Returns the weights of a model's encoder, for an encoder that is equal.

  Raises:
    UserError: the model has no encoder, or another one.
  """
  if isinstance(model, VisionLanguageModel):
    found, weights = model.vision, params["vision"]
  elif isinstance(model, DualEncoder):
    found, weights = model.image, dict(params["image"])
    if vision.pooling is None:
      found = found.clone(pooling=None)
      weights.pop("pooling", None)
  else:
    raise UserError(
      f"Assembled.encoder: found a {type(model).__name__}, expected a vision"
      " language model (Pretrained with towers='all') or two towers"
    )
  alike = found.clone(remat=vision.remat, dtype=vision.dtype)
  if alike != vision:
    raise UserError(
      f"Assembled.encoder: found {_differences(alike, vision)}; the weights are"
      " those of another encoder"
    )
  return weights


def _check_normalisation(encoder: Loaded, preprocessor: Preprocessor) -> None:
  """Raises UserError if an encoder would get other pixels than its own."""
  if isinstance(encoder.model, VisionLanguageModel):
    own = encoder.model.normalise
  elif encoder.preprocessor is not None:
    own = encoder.preprocessor.normalise
  else:
    return  # nothing says what it was
  if preprocessor.normalise != own:
    raise UserError(
      f"Assembled.preprocessor: found {preprocessor.normalise}, expected {own},"
      " as the encoder was trained with; set Preprocessor.normalise"
    )


def _differences(found: VisionTransformer, vision: VisionTransformer) -> str:
  pairs = {
    field.name: (getattr(found, field.name), getattr(vision, field.name))
    for field in dataclasses.fields(vision)
    if field.name not in ("parent", "name")
  }
  return "; ".join(
    f"{name} {a}, expected {b}" for name, (a, b) in pairs.items() if a != b
  )
