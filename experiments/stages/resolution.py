"""A stage whose images are larger than those of the stage before it."""

import dataclasses
import math

import jax

from experiments.stages.staged import StageResult
from research.interop.loaded import Loaded
from research.interop.vision import image_size
from research.io.unread import Shardings
from research.typing import UserError
from research.vlm.model import VisionLanguageModel
from research.vlm.resolution import at_resolution


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageAtResolution(StageResult):
  """The result of an earlier stage, its positions on a finer grid.

  Its preprocessor makes views of this stage's size as well.

  In a run file, where `high` is a stage:

    high/experiment.Experiment.model = @resolution.StageAtResolution()
    high/resolution.StageAtResolution.stage = 'low'
    high/resolution.StageAtResolution.pixels = 448

  Attributes:
    pixels: along each side of this stage's images.
  """

  pixels: int

  def load(self, shardings: Shardings | None = None) -> Loaded:
    """Returns the model for images of `pixels`; see `StageResult.load`."""
    return self._resized(super().load(shardings), at_resolution)

  def load_abstract(self) -> Loaded:
    return self._resized(super().load_abstract(), _abstractly)

  def _resized(self, loaded, resize) -> Loaded:
    if not isinstance(loaded.model, VisionLanguageModel):
      raise UserError(
        f"StageAtResolution: stage {self.stage!r} has no vision language model"
      )
    model, params = resize(loaded.model, loaded.params, self.pixels)
    side = self.pixels // model.vision.patch
    tokens = model.tokens_per_view(self.pixels, self.pixels)
    return dataclasses.replace(
      loaded,
      model=model,
      params=params,
      preprocessor=image_size.with_views_of(
        loaded.preprocessor, self.pixels, pool=side // math.isqrt(tokens)
      ),
    )


def _abstractly(model, params, pixels):
  found = []

  def resize(params):
    new, resized = at_resolution(model, params, pixels)
    found.append(new)
    return resized

  made = jax.eval_shape(resize, params)
  return found[-1], made
