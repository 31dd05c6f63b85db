"""Losses of a language model that sees images."""

import dataclasses

from research import weights
from research.training.objectives.objective import (
  PER_ROW,
  Batch,
  NextToken,
  Objective,
  Rearranges,
  Sums,
  TakesMask,
  with_model,
)
from research.typing import Params, PRNGKey, UserError
from research.vlm.encoders.grouped import GroupedViews
from research.vlm.encoders.native import Images, Patches
from research.vlm.masks import Causal
from research.vlm.model import VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class WithImages:
  """Any objective of the language model, with images at its placeholders.

  Beside the objective's own keys, a batch has `pixels`, uint8 [G, V, H, W, 3];
  or, of images of native resolution, `patches` and `grids` (`Patches`); or
  `features`, which the encoder made of them (`research.vlm.cached`). B rows of
  tokens share G of images, usually one each. A batch without any is text, and
  its loss is the language model's. Where the objective takes a mask it gets the
  model's, which prompts have when it answers as well. Any other is causal, for
  models whose prompts are, or of masked diffusion, in which tokens see all.

  Attributes:
    model: the experiment sets it after loading.
    objective: of the language model: next token, masked diffusion, ...
  """

  model: VisionLanguageModel | None = None
  objective: Objective = NextToken()

  def __post_init__(self):
    own = self.objective
    if isinstance(own, Rearranges) and own.rearranged:
      raise UserError(
        f"WithImages.objective: found {type(own).__name__}, which reads"
        f" {own.rearranged}, expected an objective of a batch's rows as they"
        " are, such as NextToken: images are placed row by row"
      )
    causal = self.model is None or self.model.mask == Causal()
    diffusion = hasattr(own, "mask_id")
    if not (causal or diffusion or isinstance(own, TakesMask)):
      raise UserError(
        f"WithImages.objective: found {type(own).__name__}, which is causal,"
        " and a model whose prompts have the mask"
        f" {type(self.model.mask).__name__}, expected an objective that takes a"
        " mask, such as NextToken"
      )

  def __call__(self, params: Params, batch: Batch, key: PRNGKey | None) -> Sums:
    towers = {k: v for k, v in params.items() if k != "language"}
    # The objective binds the language model's weights itself.
    bound = weights.bind(towers, key=key) | {"language": params["language"]}
    language = self._language(bound, batch)
    if "rotary" in language:
      rows = batch["tokens"], batch.get("segments")
      rotary = weights.with_tokens(language["rotary"], *rows)
      language = {**language, "rotary": rotary}
    inner = with_model(self.objective, self.model.language)
    if isinstance(inner, TakesMask):
      inner = inner.with_mask(self.model.mask.of_rows)
    text = {k: v for k, v in batch.items() if k not in PER_ROW}
    return inner(language, text, key)

  def _language(self, params: Params, batch: Batch) -> Params:
    """Returns the language model's parameters, which see a batch's images."""
    for name, bind_images in (
      ("pixels", self.model.with_images),
      ("patches", self.model.with_images),
      ("features", self.model.with_features),
    ):
      if name in batch:
        images = batch[name] if name == "features" else images_of(batch)
        pool = len(batch["tokens"]) // len(batch[name])
        return bind_images(params, images, pool)
    return params["language"]


def images_of(batch: Batch) -> Images:
  """Returns the images of a batch."""
  if "patches" in batch:
    return Patches(batch["patches"], batch["grids"])
  if "groups" in batch:
    return GroupedViews(batch["pixels"], batch["groups"])
  return batch["pixels"]
