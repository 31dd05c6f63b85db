"""A vision language model that reads prompts once, and then goes on with text.

Only a prompt has placeholders of images. So its keys and values are computed
with the images, and all that follows with the language model as it is: rows can
be copied and dropped, as in searches, without their images.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import weights
from research.reasoning.prompting import arrays_of
from research.typing import Array, Float, Int, Params, UserError
from research.vlm.arithmetic import pixels_flops
from research.vlm.masks import Causal, PromptMask
from research.vlm.model import VisionLanguageModel
from research.vlm.splice import Splice, rotates_by_axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WithPlaceholder(weights.WrappedWeight):
  """An embedding table without images, whose placeholder is never drawn.

  Attributes:
    w: the table `[V, D]`, any weight.
    token: id of the placeholder.
  """

  w: Any
  token: int = dataclasses.field(metadata=dict(static=True))

  @property
  def extra_ids(self) -> tuple[int, ...]:
    """Returns the placeholder's id, which may be no row of the table."""
    return (self.token,)

  def dense(self) -> Array:
    return weights.dense(self.w)

  def axes(self, names: tuple[str | None, ...]) -> "WithPlaceholder":
    return dataclasses.replace(self, w=weights.axes(self.w, names))

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    return weights.einsum(eq, x, self.w)

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns embeddings; of a placeholder, of any value."""
    return weights.take(self.w, jnp.where(ids == self.token, 0, ids))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageReader:
  """Reads prompts with pixels: a `generation.PromptReader`.

  Attributes:
    model: whose images take the place of placeholders (`Splice`).
    flops: of encoding the images of one prompt, for ledgers.
  """

  model: VisionLanguageModel
  params: Params
  flops: float | int = 0

  def __post_init__(self):
    language = self.model.transformer
    if not isinstance(self.model.placement, Splice):
      raise UserError(
        f"ImageReader: found the placement"
        f" {type(self.model.placement).__name__}, whose layers attend to images"
        " after the prompt as well, expected Splice"
      )
    if rotates_by_axes(language):
      raise UserError(
        "ImageReader: found a language model that rotates tokens by the place"
        " of patches in their image, expected one whose tokens after a prompt"
        " do not depend on its images"
      )

  @classmethod
  def of_prompts(
    cls,
    model: VisionLanguageModel,
    params: Params,
    prompts: Sequence[Sequence[int]],
  ) -> "ImageReader":
    """Returns a reader whose ledger counts the images of such prompts.

    Args:
      prompts: that have `pixels` of one shape.
    """
    shape = _pixels(arrays_of(prompts[:1])).shape[1:]
    return cls(model=model, params=params, flops=pixels_flops(model, shape))

  @property
  def mask(self) -> PromptMask | None:
    """What the tokens of a prompt see of each other; None for causal."""
    return None if self.model.mask == Causal() else self.model.mask

  @property
  def text_params(self) -> Params:
    """The language model's parameters, for what follows a prompt."""
    own = self.params["language"]
    table = WithPlaceholder(own["embed"], self.model.image_token)
    return {**own, "embed": table}

  def __call__(self, prompts: Sequence[Sequence[int]]) -> Params:
    """Returns the language model's parameters, which see prompts' images.

    Raises:
      UserError: a prompt has no pixels, or has others than the first one.
    """
    pixels = _pixels(arrays_of(prompts))
    return self.model.with_images_compiled(self.params, jnp.asarray(pixels))


def _pixels(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
  if set(arrays) != {"pixels"}:
    raise UserError(
      f"prompts: found {sorted(arrays) or 'tokens alone'}, and this model reads"
      " pixels beside them; expected prompts of a drawn.DrawnQuestion"
    )
  return arrays["pixels"]
