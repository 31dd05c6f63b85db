"""A loaded model as what writes solutions: of text alone, or with images."""

from collections.abc import Sequence
from typing import NamedTuple

from research.generation import generate
from research.generation.stepwise import PromptReader
from research.interop.loaded import Loaded
from research.nn.transformer import Transformer
from research.typing import Params, UserError
from research.vlm.model import VisionLanguageModel
from research.vlm.prompts.reader import ImageReader


class TokenPolicy(NamedTuple):
  """A language model that writes token by token.

  Attributes:
    model: the language model.
    loaded: its parameters as they were loaded.
    params: the same in the layout that decodes fastest.
    reader: gives the parameters that read prompts; None: `params` do.
  """

  model: Transformer
  loaded: Params
  params: Params
  reader: PromptReader | None = None


def policy_of(
  loaded: Loaded, prompts: Sequence[Sequence[int]], where: str
) -> TokenPolicy:
  """Returns what writes solutions.

  Args:
    loaded: a language model, or one that sees images.
    prompts: of which the first one shows what stands beside their tokens.
    where: the field that it comes from, for errors.

  Raises:
    UserError: it is neither; or the prompts have no images for one that sees
      them.
  """
  if isinstance(loaded.model, VisionLanguageModel):
    model, params = loaded.model.language, loaded.params["language"]
  else:
    model, params = loaded.model, loaded.params
  if not isinstance(model, Transformer):
    raise UserError(
      f"{where}: found a {type(model).__name__}, expected a language model that"
      " writes token by token."
    )
  prepared = generate.prepare(params, model)
  if not isinstance(loaded.model, VisionLanguageModel):
    return TokenPolicy(model, params, prepared)
  towers = {**loaded.params, "language": prepared}
  reader = ImageReader.of_prompts(loaded.model, towers, prompts)
  return TokenPolicy(model, params, reader.text_params, reader)
