"""How many questions a model answers: `Experiment.answers` of toy tasks.

A masked diffusion model fills in what is asked for, wherever it stands, and a
next-token model goes on with what stands before it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from research.data.sources.infilling import Asks, Question
from research.diffusion.sampling import sampler
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.make_denoiser import make_denoiser
from research.generation.sampling import GREEDY
from research.training.alignment.rewarded_task import sampled
from research.typing import Int


@dataclasses.dataclass(frozen=True)
class Recalled:
  """Answers to questions, greedy.

  Attributes:
    right: share of rows of which all that was asked is right, by question.
    tokens_per_call: tokens of an answer for each call of the model.
  """

  right: Mapping[str, float]
  tokens_per_call: Mapping[str, float]

  @property
  def wrong(self) -> float:
    """The share of wrong answers, the mean over questions."""
    return 1 - float(np.mean([*self.right.values()]))

  def __str__(self) -> str:
    return ", ".join(f"{name} {100 * x:.1f}" for name, x in self.right.items())

  def to_json(self) -> dict[str, Any]:
    """Returns the shares and tokens per call by question, and `wrong`."""
    speed = {"tokens_per_call": dict(self.tokens_per_call)}
    return {**self.right, **speed, "wrong": self.wrong}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
  """Asks a model for tokens of rows, and counts the answers that are right.

  Attributes:
    source: the questions.
    mask_id: the token that hides others; None for a next-token model, which is
      not asked where nothing stands before the answer.
    shift: whether a token is predicted by the state before it.
    sampler: how masks are filled; length and block are those of the rows.
  """

  source: Asks
  mask_id: int | None = None
  shift: bool = False
  sampler: SamplerConfig = SamplerConfig()

  def __call__(self, loaded: Any) -> Recalled:
    """Returns how many answers are right."""
    right, speed = {}, {}
    for name, question in self.source.questions().items():
      if self.mask_id is None and question.scored[0]:
        continue
      answer = self._continued if self.mask_id is None else self._filled
      answers, calls = answer(loaded, question)
      want = question.rows[:, question.scored]
      right[name] = float((answers == want).all(1).mean())
      speed[name] = float(want.shape[1] / calls)
    return Recalled(right, speed)

  def _continued(
    self, loaded: Any, question: Question
  ) -> tuple[Int[np.ndarray, "N A"], float]:
    """Returns the tokens that follow, and calls of the model for a row."""
    first, count = int(question.scored.argmax()), int(question.scored.sum())
    prompts, key = question.rows[:, :first].tolist(), jax.random.key(0)
    model, params = loaded.model, loaded.params
    answers = sampled(model, params, prompts, count, (), GREEDY, key)
    return np.asarray(answers), float(count)

  def _filled(
    self, loaded: Any, question: Question
  ) -> tuple[Int[np.ndarray, "N A"], float]:
    """Returns what masks are filled with, and calls of the model for a row."""
    rows = np.where(question.visible, question.rows, self.mask_id)
    asked = np.broadcast_to(question.scored, rows.shape)
    length = rows.shape[1]
    config = self.sampler.for_model(self.mask_id, length=length, block=length)
    denoiser = make_denoiser(config, loaded.model, self.shift)
    start = sampler.begin(rows, asked, np.ones_like(asked), jax.random.key(0))
    made = sampler.sample(denoiser, loaded.params, start, config)
    return made.tokens[:, question.scored], float(made.counts.mean())
