"""What `load.load_model` returns, and the files that tell directories apart."""

import dataclasses
from typing import Any

from flax import linen as nn

from research.interop.diffusion import spec
from research.nn.transformer import Transformer
from research.prm.model import GenerativeReward, RewardModel
from research.typing import Params
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
    preprocessor: what becomes of images; None for models without eyes.
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
