"""Losses of a language model that sees images."""

import dataclasses

from research import weights
from research.training.objectives.objective import (
  PER_ROW,
  Batch,
  NextToken,
  Objective,
  Sums,
  TakesMask,
)
from research.typing import Params, PRNGKey
from research.vlm.encoders.native import Images, Patches
from research.vlm.model import VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class WithImages:
  """Any objective of the language model, with images at its placeholders.

  Beside the objective's own keys, a batch has `pixels`, uint8 [B, V, H, W, 3],
  or, of images of native resolution, `patches` and `grids` (`Patches`). Where
  the objective takes a mask it gets the model's, which prompts have when it
  answers as well.

  Attributes:
    model: the experiment sets it after loading.
    objective: of the language model: next token, masked diffusion, ...
  """

  model: VisionLanguageModel | None = None
  objective: Objective = NextToken()

  def __call__(self, params: Params, batch: Batch, key: PRNGKey | None) -> Sums:
    """Returns the sums of the language model's objective."""
    towers = {k: v for k, v in params.items() if k != "language"}
    # The objective binds the language model's weights itself.
    bound = weights.bind(towers, key=key) | {"language": params["language"]}
    language = self.model.with_images(bound, images_of(batch))
    if "rotary" in language:
      rows = batch["tokens"], batch.get("segments")
      rotary = weights.with_tokens(language["rotary"], *rows)
      language = {**language, "rotary": rotary}
    inner = dataclasses.replace(self.objective, model=self.model.language)
    if isinstance(inner, TakesMask):
      inner = inner.with_mask(self.model.mask.of_rows)
    text = {k: v for k, v in batch.items() if k not in PER_ROW}
    return inner(language, text, key)


def images_of(batch: Batch) -> Images:
  """Returns the images of a batch."""
  if "patches" in batch:
    return Patches(batch["patches"], batch["grids"])
  return batch["pixels"]
