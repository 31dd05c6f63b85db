"""A model that was loaded, from wherever."""

import dataclasses
from typing import Any

from research.nn.transformer import Transformer
from research.typing import Params


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model and what came with it.

  Attributes:
    model: how to compute.
    params: the weights.
    tokenizer: a `research.nn.tokenizer.Tokenizer`, or None.
    source: where it came from: `format`, `path`, and whatever else is known.
  """

  model: Transformer
  params: Params
  tokenizer: Any
  source: dict[str, Any]
