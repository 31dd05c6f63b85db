"""Images of a prompt: which stand where, and what the model sees of them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from research.generation import generate
from research.generation.decoding import PromptMask
from research.generation.generate import TokenSource
from research.interop.loaded import Loaded
from research.interop.vision import read
from research.typing import UserError
from research.vlm import data
from research.vlm.contrastive.dual_encoder import DualEncoder
from research.vlm.image_conditioned import ImageConditioned
from research.vlm.images import open_image, prompt_ids
from research.vlm.images.prompts import MARK, PromptFormat
from research.vlm.masks import Causal, by_index


@dataclasses.dataclass(frozen=True)
class PromptWithImages:
  """A prompt with images.

  Attributes:
    ids: of the prompt, placeholders among them.
    params: of the language model, with the images in them.
    image_tokens: number of placeholders.
  """

  ids: list[int]
  params: Any
  image_tokens: int


def check(model: Any, files: Sequence[str], prompts: Sequence[str]) -> None:
  """Raises UserError for images without a model or a prompt to see them.

  So it does for a model that has no text to give.
  """
  if isinstance(model, DualEncoder):
    raise UserError(
      "--model: found a contrastive model (CLIP, SigLIP), which generates no"
      " text; expected a language model"
    )
  if files and not isinstance(model, ImageConditioned):
    raise UserError(
      f"--image={files[0]}: this model reads text alone; expected a vision"
      f" language model, or leave --image out"
    )
  if files and len(prompts) != 1:
    raise UserError(
      f"--image: found {len(prompts)} prompts, expected one; run the command"
      " once for each"
    )


def check_text(model: Any, text: str, ids: Sequence[int]) -> None:
  """Raises UserError if a prompt without images has a place for one.

  The model would read an untrained vector there.
  """
  if isinstance(model, ImageConditioned) and (
    MARK in text or model.image_token in ids
  ):
    raise UserError(
      f"--prompt: found the image placeholder {MARK} in {text[:80]!r} and no"
      " --image, expected --image=FILE, or a prompt without placeholders"
    )


def text_ids(loaded: Loaded, text: str, *, rendered: bool) -> list[int]:
  """Returns the ids of a prompt without images.

  Those of a vision language model begin as its prompts with images do, also
  where a chat template leaves that to the processor (LLaVA's).

  Args:
    rendered: whether a chat template has rendered it.
  """
  tokenizer, how = loaded.tokenizer, loaded.preprocessor
  if not isinstance(loaded.model, ImageConditioned):
    return tokenizer.encode(text) if rendered else tokenizer.prompt(text)
  form = PromptFormat() if how is None else how.prompt
  _, special = prompt_ids.place_begin([], tokenizer, form)
  return special.prompt(tokenizer.encode(text + form.end))


def prompt_of(
  loaded: Loaded,
  files: Sequence[str],
  text: str,
  render: Callable[[str], str] | None = None,
) -> PromptWithImages:
  """Returns a prompt and parameters that see the images.

  Args:
    text: the prompt; its `MARK`s are images, in order. Without any, the images
      come first.
    render: the prompt -> a conversation as the model's chat template renders
      it; None for the prompt itself.

  Raises:
    UserError: the prompt has more or fewer marks than there are images, or a
      placeholder besides, its rendering has others, or a file cannot be read.
  """
  if loaded.preprocessor is None:
    raise UserError(
      "--image: found no preprocessor_config.json with the model, which defines"
      " how images are preprocessed; add the published one"
    )
  marks = text.count(MARK)
  if marks not in (0, len(files)):
    raise UserError(
      f"--image: found {len(files)} files and {marks} placeholders {MARK} in"
      " the prompt, expected one for each file, or none"
    )
  images = [open_image(file) for file in files]
  plans = [loaded.preprocessor.plan(*image.shape[:2]) for image in images]
  views = sum(plan.views for plan in plans)
  prompt = data.Prompt.from_images(images, loaded.preprocessor, views)
  whole = text if marks else MARK * len(files) + text
  if render is not None:
    whole = render(whole)
  if whole.count(MARK) != len(files):
    raise UserError(
      f"--chat: found {whole.count(MARK)} placeholders {MARK} in the rendered"
      f" conversation, expected {len(files)}: the model's chat template drops"
      " images, or adds some; generate without --chat"
    )
  params = loaded.model.with_images_compiled(
    loaded.params, data.batch_images([prompt], loaded.model.square)
  )
  ids = prompt_ids.joined_ids(
    whole.split(MARK),
    prompt.pieces,
    loaded.tokenizer,
    loaded.model.image_token,
    loaded.preprocessor.prompt,
  )
  return PromptWithImages(ids, params, prompt.soft_tokens)


def language_of(loaded: Loaded, params: Any = None) -> Loaded:
  """Returns the language model alone, with `params` if given."""
  if not isinstance(loaded.model, ImageConditioned):
    return loaded
  return read.language_of(loaded, params)


def mask_of(model: Any) -> PromptMask | None:
  """Returns what a prompt's tokens see of each other; None for causal."""
  if not isinstance(model, ImageConditioned) or model.mask == Causal():
    return None
  return model.mask


def source_of(
  mask: PromptMask | None, kv: Any, pages: TokenSource | None
) -> dict[str, Any]:
  """Returns the arguments of `stream.stream` that say where tokens come from.

  Raises:
    UserError: the prompts have a mask that pages cannot apply.
  """
  if mask is None:
    return {"kv": kv, "source": pages}
  if pages is not None:
    return {"source": functools.partial(pages, mask=by_index(mask))}
  return {"source": functools.partial(generate.chunks, kv=kv, mask=mask)}
