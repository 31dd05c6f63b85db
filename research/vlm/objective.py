"""Losses of a language model that sees images."""

import dataclasses

from research import weights
from research.training.objectives.objective import (
  PER_ROW,
  Batch,
  NextToken,
  Objective,
  Sums,
)
from research.typing import Params, PRNGKey
from research.vlm.model import VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class WithImages:
  """Any objective of the language model, with images at its placeholders.

  A batch has `pixels`, uint8 [G, V, H, W, 3], beside the objective's own keys,
  or `features`, which the encoder made of them (`research.vlm.cached`). B rows
  of tokens share G of images, usually one each. A batch without either is text,
  and its loss is the language model's. Prompts that predict the next token have
  the model's mask, as they have when it answers.

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
    language = self._language(bound, batch)
    inner = dataclasses.replace(self.objective, model=self.model.language)
    if isinstance(inner, NextToken):
      inner = dataclasses.replace(inner, mask=self.model.mask.of_rows)
    text = {k: v for k, v in batch.items() if k not in PER_ROW}
    return inner(language, text, key)

  def _language(self, params: Params, batch: Batch) -> Params:
    """Returns the language model's parameters, which see a batch's images."""
    ways = (
      ("pixels", self.model.with_images),
      ("features", self.model.with_features),
    )
    for name, see in ways:
      if name in batch:
        pool = len(batch["tokens"]) // len(batch[name])
        return see(params, batch[name], pool)
    return params["language"]
