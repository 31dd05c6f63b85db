"""Models with random weights: of any size, or a published vision model's."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from research.interop.loaded import Loaded
from research.nn import presets
from research.nn.layers import Remat
from research.typing import UserError
from research.vlm import presets as vision_presets


@runtime_checkable
class Vocabulary(Protocol):
  """A source of a tokenizer: one that is trained, or one that exists."""

  def load(self) -> Any: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromScratch:
  """A model of a known family, of any size, with random weights.

  Attributes:
    sizes: of the model; `vocab` at least the tokenizer's.
    family: a key of `presets.FAMILIES`.
    tokenizer: its source, e.g. `research.data.bpe.Bpe`; None where the data
      are ids.
    seed: of the weights.
    dtype: of computation; the weights are float32.
    remat: what the backward pass recomputes.
  """

  sizes: presets.Sizes
  family: str = "llama"
  tokenizer: Vocabulary | None = None
  seed: int = 0
  dtype: str = "float32"
  remat: Remat = "none"

  def __post_init__(self):
    if self.family not in presets.FAMILIES:
      raise UserError(
        f"FromScratch.family: found {self.family!r}, expected one of "
        f"{', '.join(presets.FAMILIES)}."
      )

  def load(self, shardings: Callable[[Any], Any] | None = None) -> Loaded:
    """Returns the model, random weights, and its tokenizer.

    Args:
      shardings: abstract parameters -> their shardings, on which the values do
        not depend.

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
      return model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    key, places = jax.random.key(self.seed), None
    if shardings is not None:
      places = shardings(jax.eval_shape(init, key))
    params = jax.jit(init, out_shardings=places)(key)
    source = {"format": "fresh", "family": self.family, "seed": self.seed}
    return Loaded(model.clone(remat=self.remat), params, tokenizer, source)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionFromScratch:
  """A row of `research.vlm.presets`, for plans and tests: nothing is read.

  Attributes:
    preset: its name.
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

  def load(self, shardings: Callable[[Any], Any] | None = None) -> Loaded:
    """Returns the model, random weights, and the tokenizer.

    Args:
      shardings: abstract parameters -> their shardings, on which the values do
        not depend.
    """
    row = vision_presets.preset(self.preset).reduced(self.shrink)
    model = row.model(self.dtype).clone(remat=self.remat)
    key, places = jax.random.key(self.seed), None
    if shardings is not None:
      places = shardings(jax.eval_shape(model.init, key))
    return Loaded(
      model=model,
      params=jax.jit(model.init, out_shardings=places)(key),
      tokenizer=None if self.tokenizer is None else self.tokenizer.load(),
      source={"format": "fresh", "preset": self.preset, "seed": self.seed},
      preprocessor=row.preprocessor,
    )
