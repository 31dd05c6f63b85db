"""A reward model's scores of labelled solutions, and what they are worth."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from research.prm import rows
from research.prm.conventions import Convention
from research.prm.labelled import LabelledSolution
from research.prm.scores.report import StepReport, evaluate_steps
from research.reasoning.prompting import Prompting, arrays_of, as_text
from research.rounding import next_power_of_two
from research.typing import Params, UserError


@runtime_checkable
class ImageConditioned(Protocol):
  """A reward model behind an encoder, such as a `vlm.VisionLanguageModel`.

  Attributes:
    language: the reward model.
  """

  language: Any

  def with_images_compiled(self, params: Params, images: Any) -> Params:
    """Returns the reward model's parameters, which see each row's images."""


def score_solutions(
  model: Any,
  params: Params,
  tokenizer: Any,
  solutions: Sequence[LabelledSolution],
  separator: str = "",
  batch_size: int = 256,
  prompting: Prompting = as_text,
  convention: Convention | None = None,
) -> list[list[float]]:
  """Returns the score of each step of solutions, read whole.

  Args:
    model: a `RewardModel` or `GenerativeReward`, or one of these that sees
      images.
    separator: as for `rows.encode`.
    batch_size: solutions of a program. All batches have one shape, whose
      length and number of steps are powers of two: calls share programs.
    prompting: what the model reads of a solution's prompt.
    convention: encoding of a public reward model, in place of prompt and
      separator.

  Raises:
    UserError: a solution is longer than the model's context, or the model sees
      images and has a convention.
  """
  if convention is not None and isinstance(model, ImageConditioned):
    raise UserError(
      f"score_solutions: found {type(convention).__name__} and a vision"
      " language model, expected a model of text alone"
    )
  # Solutions of one problem share its prompt, and a picture is drawn once.
  prompts = {x.prompt: prompting(tokenizer, x.prompt) for x in solutions}
  encoded = [
    rows.encode(
      *(x, tokenizer, separator, lambda _, prompt: prompts[prompt]), convention
    )
    for x in solutions
  ]
  reward = model.language if isinstance(model, ImageConditioned) else model
  longest = max((len(x.tokens) for x in encoded), default=1)
  room = reward.max_positions
  if room is not None and longest > room:
    raise UserError(
      f"score_solutions: found a solution of {longest} tokens with its prompt,"
      f" expected at most {room}, the reward model's context"
    )
  length = next_power_of_two(longest)
  most = next_power_of_two(max((len(x.ends) for x in encoded), default=1))
  tokens = np.zeros((len(encoded), length), np.int32)
  ends = np.full((len(encoded), most), -1, np.int32)
  for i, (ids, places) in enumerate(encoded):
    tokens[i, : len(ids)], ends[i, : len(places)] = ids, places
  scores_by_solution: list[list[float]] = []
  for start in range(0, len(encoded), batch_size):
    part = slice(start, start + batch_size)
    fill = ((0, max(0, start + batch_size - len(encoded))), (0, 0))
    batch_params = params
    if isinstance(model, ImageConditioned):
      problems = [x.prompt for x in solutions[part]]
      problems += problems[-1:] * fill[0][1]
      pixels = arrays_of([prompts[x] for x in problems])["pixels"]
      batch_params = model.with_images_compiled(params, jnp.asarray(pixels))
    scores = reward.scores(
      batch_params,
      np.pad(tokens[part], fill),
      np.pad(ends[part], fill, constant_values=-1),
    )
    for solution, row in zip(encoded[part], np.asarray(scores), strict=False):
      scores_by_solution.append(row[: len(solution.ends)].tolist())
  return scores_by_solution


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepEvaluation:
  """How well a reward model judges labelled solutions: ProcessBench's way.

  `Experiment.step_report` of a reward model.

  Attributes:
    data: the solutions, of problems that it has not learned; their own labels
      are the truth, whatever `data.labels` says.
    threshold: below it a step is called wrong; fix it before the test.
  """

  data: rows.LabelledRows
  threshold: float | int = 0.5

  def __call__(self, loaded: Any) -> StepReport:
    """Returns the report of a loaded reward model.

    Raises:
      UserError: the model gives no scores of steps.
    """
    model = loaded.model
    reward = model.language if isinstance(model, ImageConditioned) else model
    if not hasattr(reward, "scores"):
      raise UserError(
        f"StepEvaluation: found a {type(reward).__name__}, expected a reward"
        " model: interop.rewards.WithHead makes one of a language model."
      )
    solutions = self.data.solutions()
    scores = score_solutions(
      model,
      jax.device_put(loaded.params),
      loaded.tokenizer,
      solutions,
      self.data.separator,
      self.data.batch_size,
      self.data.prompting,
      self.data.convention,
    )
    return evaluate_steps(solutions, scores, self.threshold)
