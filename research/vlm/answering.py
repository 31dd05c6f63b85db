"""A vision language model's answers to questions about images."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.generation import generate
from research.generation.sampling import GREEDY, Sampling
from research.typing import Params, UInt8
from research.vlm import data
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.model import VisionLanguageModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answerer:
  """Answers as a function of images and questions, greedily by default.

  It is what `evaluation.protocol.evaluate` calls.

  Attributes:
    model: the model.
    params: of all three towers.
    tokenizer: of the language model.
    preprocessor: how an image becomes views, and what stands for it.
    views: views of a row.
    template: the text around images.
    most: tokens of an answer.
    sampling: how tokens are chosen.
  """

  model: VisionLanguageModel
  params: Params
  tokenizer: Any
  preprocessor: Preprocessor
  views: int = 1
  template: data.Template = data.Template()
  most: int = 8
  sampling: Sampling = GREEDY

  def __call__(
    self,
    images: Sequence[Sequence[UInt8[np.ndarray, "..."]]],
    questions: Sequence[str],
  ) -> list[str]:
    """Returns the answers, without spaces around them.

    Args:
      images: of each question, at least one.
      questions: texts; all are one batch.
    """
    made = [
      data.Prompt.of(each, self.preprocessor, self.views) for each in images
    ]
    pixels = jnp.asarray(np.stack([prompt.pixels for prompt in made]))
    prompts = [
      data.prompt_ids(
        question, prompt, self.tokenizer, self.model.image_token, self.template
      )
      for question, prompt in zip(questions, made, strict=True)
    ]
    found = generate.generate(
      self.model.language,
      self.model.with_images_compiled(self.params, pixels),
      prompts,
      self.most,
      self.sampling,
      stop_tokens=self.tokenizer.stop,
      source=self.model.token_source(),
    )
    return [self.tokenizer.decode(tokens).strip() for tokens in found.tokens]
