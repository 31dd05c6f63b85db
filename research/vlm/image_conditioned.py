"""What a model that sees images can do, whatever it is made of."""

from typing import Any, Protocol, runtime_checkable

from research.typing import Params
from research.vlm.encoders.native import Images
from research.vlm.masks import PromptMask


@runtime_checkable
class ImageConditioned(Protocol):
  """A language model that sees images: `VisionLanguageModel` is one.

  Commands ask for this rather than for a class, so that a model of other
  towers is one as well.

  Attributes:
    image_token: id of the placeholder.
    mask: what the tokens of a prompt see of each other.
    square: side, in patches, of the squares that become one soft token.
  """

  language: Any
  image_token: int
  mask: PromptMask
  square: int

  def with_images(self, params: Params, images: Images) -> dict[str, Any]:
    """Returns the language model's parameters, which see these images."""

  def with_images_compiled(
    self, params: Params, images: Images
  ) -> dict[str, Any]:
    """Returns `with_images`, compiled once for each shape of `images`."""
