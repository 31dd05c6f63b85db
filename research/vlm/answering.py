"""A vision language model's answers to questions about images.

`Answerer` is the model as a function of images and questions; `Answers` asks it
a data set, and reports its score beside those of the baselines.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from research.generation import generate
from research.generation.generate import TokenSource
from research.generation.sampling import GREEDY, Sampling
from research.typing import Params, UInt8, UserError
from research.vlm import data
from research.vlm.evaluation import protocol
from research.vlm.evaluation.parsers import Parser, exact_choice
from research.vlm.evaluation.report import Report
from research.vlm.evaluation.scores import Score, exact_match
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.model import VisionLanguageModel
from research.vlm.scenes.mixed import Mixed
from research.vlm.scenes.sample import Sample
from research.vlm.scenes.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answerer:
  """Answers as a function of images and questions, greedily by default.

  It is what `evaluation.protocol.evaluate` calls.

  Attributes:
    params: of all three towers.
    preprocessor: how an image becomes views, and what stands for it.
    views: views of a row; prompts may have fewer, or none.
    template: the text around images.
    source: what generates tokens; None for one after the other, with the
      model's mask.
    rows: a batch is padded to a multiple of so many rows, by its last one, so
      that few shapes are compiled.
  """

  model: VisionLanguageModel
  params: Params
  tokenizer: Any
  preprocessor: Preprocessor
  views: int = 1
  template: data.Template = data.Template()
  max_new_tokens: int = 8
  sampling: Sampling = GREEDY
  source: TokenSource | None = None
  rows: int = 1

  def __call__(
    self,
    images: Sequence[Sequence[UInt8[np.ndarray, "..."]]],
    questions: Sequence[str],
  ) -> list[str]:
    """Returns the answers, without spaces around them.

    Raises:
      UserError: the preprocessor is another model's, or images have more views.
    """
    self.model.check_placeholders(self.preprocessor)
    made = [
      data.Prompt.from_images(each, self.preprocessor, self.views)
      for each in images
    ]
    missing = -len(made) % self.rows
    made += made[-1:] * missing
    questions = [*questions, *questions[-1:] * missing]
    prompts = [
      data.prompt_ids(
        question,
        prompt.pieces,
        self.tokenizer,
        self.model.image_token,
        self.template,
        self.preprocessor.prompt,
      )
      for question, prompt in zip(questions, made, strict=True)
    ]
    found = generate.generate(
      self.model.language,
      self.model.with_images_compiled(
        self.params, data.batch_images(made, self.model.square)
      ),
      prompts,
      self.max_new_tokens,
      self.sampling,
      stop_tokens=self.tokenizer.stop,
      source=self.source or self.model.token_source(),
    )
    tokens = found.tokens[: len(images)]
    return [self.tokenizer.decode(each).strip() for each in tokens]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
  """An evaluation: a model's answers to a data set, and its baselines'.

  Attributes:
    questions: what is asked, the text around it, and how its images become
      views.
    max_new_tokens: tokens of an answer.
    limit: samples at most, the first ones; None for all.
    batch: samples in a call.
    source: what generates tokens, see `Answerer`: for a masked diffusion model
      a `diffusion.token_source.DiffusionSource`.
    score, parser, seed: see `evaluation.protocol.evaluate`.
  """

  questions: data.ImageQuestions
  max_new_tokens: int = 8
  limit: int | None = None
  batch: int = 64
  source: TokenSource | None = None
  score: Score = exact_match
  parser: Parser = exact_choice
  seed: int = 0

  def __call__(self, loaded: Any) -> Report:
    """Returns the scores with real, blind and shuffled images, and of rules.

    Args:
      loaded: the model with the weights to evaluate, and its tokenizer: a
        `research.interop.loaded.Loaded`.

    Raises:
      UserError: a sample is a conversation, which has several answers.
    """
    samples = self.questions.samples
    asked = samples[: self.limit]
    if not all(isinstance(each, Sample) for each in asked):
      raise UserError(
        "Answers.questions: found conversations, expected questions with one"
        " answer each"
      )
    answer = Answerer(
      model=loaded.model,
      params=loaded.params,
      tokenizer=loaded.tokenizer,
      preprocessor=self.questions.preprocessor,
      views=self.questions.views,
      template=self.questions.template,
      max_new_tokens=self.max_new_tokens,
      source=self.source,
      rows=self.batch,
    )
    return protocol.evaluate(
      asked,
      answer,
      # Only who draws the scenes knows what a part of them says.
      samples.rules() if isinstance(samples, Task | Mixed) else {},
      score=self.score,
      parser=self.parser,
      batch=self.batch,
      seed=self.seed,
    )
