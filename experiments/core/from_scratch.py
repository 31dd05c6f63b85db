"""Models with random weights: of any size, or a published vision model's."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from research.interop.loaded import Loaded
from research.io.unread import Shardings
from research.nn import presets
from research.nn.layers import Remat
from research.ranges import OneOf, Ranged
from research.typing import Params, UserError
from research.vlm import presets as vision_presets
from research.vlm.contrastive.dual_encoder import DualEncoder
from research.vlm.encoders import vit
from research.vlm.encoders.text import TextEncoder
from research.vlm.encoders.vit import VisionTransformer
from research.vlm.images.preprocessor import Preprocessor


@runtime_checkable
class Vocabulary(Protocol):
  """A source of a tokenizer: one that is trained, or one that exists."""

  def load(self) -> Any: ...


def _drawn(
  init: Callable[[Any], Params], seed: int, shardings: Shardings | None
) -> Params:
  """Returns random weights, whose values do not depend on their shardings."""
  key, places = jax.random.key(seed), None
  if shardings is not None:
    places = shardings(jax.eval_shape(init, key))
  return jax.jit(init, out_shardings=places)(key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromScratch(Ranged):
  """A model of a known family, of any size, with random weights.

  Attributes:
    sizes: of the model; `vocab` at least the tokenizer's.
    family: a key of `presets.FAMILIES`.
    tokenizer: its source, e.g. `research.data.bpe.Bpe`; None where the data
      are ids.
    embed_std: standard deviation of the embeddings; None for the family's.
    seed: of the weights.
    dtype: of computation; the weights are float32.
    remat: what the backward pass recomputes.
  """

  sizes: presets.Sizes
  family: OneOf(*presets.FAMILIES) = "llama"
  tokenizer: Vocabulary | None = None
  embed_std: float | int | None = None
  seed: int = 0
  dtype: str = "float32"
  remat: Remat = "none"

  def load(self, shardings: Shardings | None = None) -> Loaded:
    """Returns the model, random weights, and its tokenizer.

    Raises:
      UserError: the tokenizer has more ids than the model.
    """
    tokenizer = None if self.tokenizer is None else self.tokenizer.load()
    if tokenizer is not None and tokenizer.vocab_size > self.sizes.vocab:
      raise UserError(
        f"FromScratch.sizes.vocab: found {self.sizes.vocab}, expected at least"
        f" the tokenizer's {tokenizer.vocab_size}."
      )
    family = presets.FAMILIES[self.family]
    model = presets.transformer(family, self.sizes, self.dtype)

    def init(key):
      params = model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]
      if self.embed_std is None:
        return params
      embed = params["embed"]
      return params | {"embed": embed * (self.embed_std / embed.std())}

    params = _drawn(init, self.seed, shardings)
    source = {"format": "fresh", "family": self.family, "seed": self.seed}
    return Loaded(model.clone(remat=self.remat), params, tokenizer, source)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionFromScratch:
  """A row of `research.vlm.presets`, for plans and tests: nothing is read.

  Attributes:
    shrink: what its widths and depths are divided by; 1 for its own.
    tokenizer: its source; with fewer ids than the model.
    seed: of the weights.
    dtype: of computation; the weights are float32.
    remat: what the backward pass recomputes.
  """

  preset: str
  shrink: int = 1
  tokenizer: Vocabulary | None = None
  seed: int = 0
  dtype: str = "float32"
  remat: Remat = "none"

  def __post_init__(self):
    vision_presets.preset(self.preset)

  def load(self, shardings: Shardings | None = None) -> Loaded:
    """Returns the model, random weights, and the tokenizer."""
    row = vision_presets.preset(self.preset).reduced(self.shrink)
    model = row.model(self.dtype).clone(remat=self.remat)
    return Loaded(
      model=model,
      params=_drawn(model.init, self.seed, shardings),
      tokenizer=None if self.tokenizer is None else self.tokenizer.load(),
      source={"format": "fresh", "preset": self.preset, "seed": self.seed},
      preprocessor=row.preprocessor,
    )


@dataclasses.dataclass(frozen=True)
class LoadedDualEncoder(Loaded):
  """A dual encoder and what came with it."""

  model: DualEncoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualFromScratch:
  """Two towers in one space, with random weights.

  Attributes:
    image: with a pooling.
    text: whose vectors are as wide as the images'.
    tokenizer: source of the text tower's.
    preprocessor: makes one view of an image.
    scale, bias: of the products, see `DualEncoder`.
    seed: of the weights.
  """

  image: VisionTransformer
  text: TextEncoder
  tokenizer: Vocabulary
  preprocessor: Preprocessor
  scale: float = 10.0
  bias: float | None = -10.0
  seed: int = 0

  def load(self, shardings: Shardings | None = None) -> LoadedDualEncoder:
    """Returns the model, random weights, and its tokenizer.

    Raises:
      UserError: the tokenizer has more ids than the text tower.
    """
    tokenizer = self.tokenizer.load()
    if tokenizer.vocab_size > self.text.vocab_size:
      raise UserError(
        f"DualFromScratch.text.vocab_size: found {self.text.vocab_size},"
        f" expected at least the tokenizer's {tokenizer.vocab_size}."
      )
    model = DualEncoder(
      image=self.image, text=self.text, scale=self.scale, bias=self.bias
    )

    def init(key):
      patches = jnp.zeros((1, 1, self.image.patch**2 * vit.CHANNELS))
      at = jnp.zeros((1, 1, 2), jnp.int32)
      tokens = jnp.zeros((1, self.text.length), jnp.int32)
      return model.init(key, patches, at, tokens)["params"]

    params = _drawn(init, self.seed, shardings)
    source = {"format": "fresh", "family": "dual encoder", "seed": self.seed}
    return LoadedDualEncoder(
      model, params, tokenizer, source, preprocessor=self.preprocessor
    )
