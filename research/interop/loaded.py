"""What `load.load_model` and other sources of models return.

And the files that tell directories apart.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
from flax import linen as nn

from research.interop.diffusion import spec
from research.io.unread import Shardings
from research.nn.transformer import Transformer
from research.prm.model import GenerativeReward, RewardModel
from research.typing import Params, UserError
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.model import VisionLanguageModel

NOTE = "heptad.json"
"""In a checkpoint that `research.interop.native` wrote."""

ADAPTER_CONFIG = "adapter_config.json"
"""In an adapter in PEFT's format."""


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model and what came with it.

  Attributes:
    model: how to compute; one tower's module for a transform of that tower.
    params: the weights.
    tokenizer: a `research.text.tokenizer.Tokenizer`, or None.
    source: where it came from: `format`, `path`, and whatever else is known.
    diffusion: how its masks are to be filled; None for models that predict the
      next token.
    preprocessor: what becomes of images; None for models without an encoder.
  """

  model: (
    Transformer
    | VisionLanguageModel
    | RewardModel
    | GenerativeReward
    | nn.Module
  )
  params: Params
  tokenizer: Any
  source: dict[str, Any]
  diffusion: spec.Spec | None = None
  preprocessor: Preprocessor | None = None

  @property
  def predicts_next_token(self) -> bool:
    """Whether what a causal pass says of the next token means something."""
    return self.diffusion is None or self.diffusion.predicts_next_token


@runtime_checkable
class Source(Protocol):
  """Where a model and its first weights come from."""

  def load(self, shardings: Shardings | None = None) -> Loaded: ...


@runtime_checkable
class AbstractSource(Protocol):
  """A source that knows the shapes of its weights without reading them."""

  def load_abstract(self) -> Loaded: ...


def load_abstract(source: Source) -> Loaded:
  """Returns a source's model, with shapes in place of weights."""
  if isinstance(source, AbstractSource):
    return source.load_abstract()
  found: list[Loaded] = []

  def params():
    found.append(source.load())
    return found[-1].params

  made = jax.eval_shape(params)
  return dataclasses.replace(found[-1], params=made)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerOf:
  """A model's tokenizer, without its weights."""

  source: Source

  def load(self) -> Any:
    found = load_abstract(self.source).tokenizer
    if found is None:
      raise UserError(
        f"TokenizerOf.source: found {self.source}, a model without a tokenizer"
      )
    return found
