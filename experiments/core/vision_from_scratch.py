"""A published vision language model's shape, with random weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from experiments.core.from_scratch import Vocabulary
from research.interop.loaded import Loaded
from research.nn.layers import Remat
from research.vlm import presets


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
    presets.preset(self.preset)

  def load(self, shardings: Callable[[Any], Any] | None = None) -> Loaded:
    """Returns the model, random weights, and the tokenizer.

    Args:
      shardings: abstract parameters -> their shardings, on which the values do
        not depend.
    """
    row = presets.preset(self.preset).reduced(self.shrink)
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
