"""Reasoning tasks for training: solutions as rows, verdicts as rewards.

`Solutions` is data of supervised training, `VerifiedTask` the prompts and the
judge of `training.alignment`. Both read any task of `research.reasoning`, whose
splits share no problem.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from research.data.array_batches import ShuffledBatches
from research.data.packing import Row
from research.ranges import AtLeast, NonNegativeInt, PositiveInt, Ranged
from research.reasoning import isolation
from research.reasoning.isolation import Guarded
from research.reasoning.problem import Problem, Verdict
from research.reasoning.prompting import (
  Prompting,
  PromptWithArrays,
  arrays_of,
  as_text,
)
from research.reasoning.tasks.task import SolvedProblems, Task
from research.training.alignment.rewarded_task import Prompt
from research.typing import UserError


@runtime_checkable
class Vocabulary(Protocol):
  """A source of a tokenizer, such as `reasoning.words.WordVocabulary`."""

  def load(self) -> Any: ...


@runtime_checkable
class DrawsAtOnce(Protocol):
  """A task that draws all problems with their solutions at once."""

  def solved(self) -> SolvedProblems: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solutions(Ranged, ShuffledBatches):
  """Problems with the solutions of the task's oracle, one a row.

  The loss covers the solution and the token that ends it. A task that draws all
  of its problems at once (`DrawsAtOnce`) does so. Those of others are drawn and
  encoded when their row is first read, in the thread that reads ahead, and
  their tokens are kept: no run waits for all of them, nor draws one twice.

  Attributes:
    task: has the problems; its `count` is the number of rows.
    length: row length T.
    prompting: what the model reads of a problem. Arrays beside the tokens, such
      as a picture's pixels, are in the batch; they are made anew for each.
    batch_size: rows in a batch over all processes, B.
  """

  task: Task
  length: AtLeast(2)
  prompting: Prompting = as_text
  batch_size: PositiveInt = 256
  seed: NonNegativeInt = 0

  def rows(self, tokenizer: Any) -> "_SolutionRows":
    if tokenizer is None:
      raise UserError(
        f"{type(self.task).__name__}: is text, and this model has no tokenizer."
        "\nGive it one: FromScratch.tokenizer = @words.WordVocabulary()"
      )
    rows = _SolutionRows(self, tokenizer)
    drawn = isinstance(self.task, DrawsAtOnce) and self.prompting is as_text
    if drawn and len(self.task):
      rows.fill(self.task.solved())
    return rows


class _SolutionRows:
  """Rows that are made when they are read, see `Solutions`."""

  def __init__(self, data: Solutions, tokenizer: Any):
    self._task, self._tokenizer = data.task, tokenizer
    self._prompting, self._length = data.prompting, data.length
    task, length = data.task, data.length
    self._questions: dict[int, str] = {}  # of prompts that have arrays
    self._tokens = np.zeros((len(task), length), np.int32)
    self._prompt = np.zeros(len(task), np.int32)
    self._size = np.zeros(len(task), np.int32)  # 0: not made yet

  def __len__(self) -> int:
    return len(self._task)

  def __getitem__(self, index: int) -> Row:
    batch = self.take(np.array([index]))
    return {name: x[0] for name, x in batch.items()}

  def take(self, indices: np.ndarray) -> Row:
    """Returns a batch of rows, as `packing.one_per_row` makes them."""
    new = indices[self._size[indices] == 0].tolist()
    prompts = {index: self._make(index) for index in new}
    tokens, size = self._tokens[indices], self._size[indices, None]
    at = np.arange(self._length, dtype=np.int32)[None]
    real, followed = at < size, at < size - 1
    after = np.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    learned = followed & (at >= self._prompt[indices, None] - 1)
    return self._arrays(indices.tolist(), prompts) | {
      "tokens": tokens,
      "targets": np.where(followed, after, np.int32(0)),
      "weights": learned.astype(np.float32),
      "positions": np.where(real, at, np.int32(-1)),
      "segments": np.where(real, np.int32(0), np.int32(-1)),
    }

  def _arrays(
    self, indices: Sequence[int], prompts: Mapping[int, Sequence[int]]
  ) -> Row:
    """Returns the arrays of rows; of `prompts` they are there already."""
    if not self._questions:
      return {}
    return arrays_of([prompts.get(i) or self._prompt_of(i) for i in indices])

  def _prompt_of(self, index: int) -> Sequence[int]:
    return self._prompting(self._tokenizer, self._questions[index])

  def fill(self, solved: SolvedProblems) -> None:
    """Makes all rows from what the task has drawn at once.

    Raises:
      UserError: a word is not one token, or a row is too short.
    """
    ids = [self._tokenizer.encode(word) for word in solved.words]
    for word, word_ids in zip(solved.words, ids, strict=True):
      if len(word_ids) != 1:
        raise UserError(
          f"{type(self._task).__name__}: found {word!r} to be the tokens"
          f" {word_ids}, expected one: give the model @words.WordVocabulary()."
        )
    size = solved.rows.shape[1]
    self._check("problems", size)
    self._tokens[:, :size] = np.array(ids, np.int32)[solved.rows, 0]
    self._prompt[:], self._size[:] = solved.prompt, size

  def _make(self, index: int) -> Sequence[int]:
    """Makes a row, and returns its prompt."""
    problem = self._task[index]
    text = self._task.oracle(problem)
    prompt = self._prompting(self._tokenizer, problem.prompt)
    end = [] if self._tokenizer.eos is None else [self._tokenizer.eos]
    tokens = [*prompt, *self._tokenizer.encode_after(prompt, text), *end]
    size = len(tokens)
    self._check(f"problem {problem.id!r}", size)
    self._tokens[index, :size] = tokens
    self._prompt[index] = len(prompt)
    if isinstance(prompt, PromptWithArrays):
      self._questions[index] = problem.prompt
    self._size[index] = size  # last: other threads read
    return prompt

  def _check(self, what: str, size: int) -> None:
    if size > self._length:
      raise UserError(
        f"Solutions.length: found {self._length}, and {what} with a solution of"
        f" {size} tokens in all; expected at least as many."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifiedTask:
  """Prompts and rewards of a task: 1 if its verifier accepts the answer.

  A `RewardedTask` of `training.alignment`. Answers without an end have 0.

  Attributes:
    task: has the problems, and judges answers.
    prompting: what the policy reads of a problem.
    stop: ids that end an answer; None for the tokenizer's.
    excluding: problems whose questions are never sampled. Generators may ask
      the same in two splits, as reasoning-gym's do where there is little to
      ask; None for a task that does not.
    reward_fn: problem, text of an answer -> reward; None for the verifier's.
    guard: makes what judges answers of the task: `isolation.Guarded`, or
      `isolation.Isolated` for verifiers that may hang.
    timeout: seconds that a verdict may take; None for the guard's default.
  """

  task: Task
  vocabulary: Vocabulary
  prompting: Prompting = as_text
  stop: tuple[int, ...] | None = None
  excluding: Task | None = None
  reward_fn: Callable[[Problem, str], float] | None = None
  guard: Callable[..., Any] = Guarded
  timeout: float | int | None = None

  def __post_init__(self):
    if self.reward_fn is None:
      self.task.require_answers()

  @functools.cached_property
  def _judge(self) -> Any:
    return isolation.guard(self.guard, self.task, self.timeout)

  @functools.cached_property
  def tokenizer(self) -> Any:
    return self.vocabulary.load()

  @property
  def stop_tokens(self) -> tuple[int, ...]:
    """Ids that end an answer."""
    return self.tokenizer.stop if self.stop is None else self.stop

  def sample(self, rng: np.random.Generator, count: int) -> list[Prompt]:
    """Returns prompts of different problems of the task.

    Raises:
      UserError: the task has fewer.
    """
    if count > len(self._allowed):
      raise UserError(
        f"{type(self.task).__name__}.count: found {len(self._allowed)}"
        f"{' that are not excluded' if self.excluding else ''}, expected at"
        f" least {count}, as many as prompts are sampled at once."
      )
    chosen = rng.choice(self._allowed, count, replace=False)
    return [self.prompt(self.task[int(i)]) for i in chosen]

  @functools.cached_property
  def _allowed(self) -> np.ndarray:
    if self.excluding is None:
      return np.arange(len(self.task))
    excluded = {problem.prompt for problem in self.excluding}
    numbered = enumerate(self.task)
    return np.array([i for i, x in numbered if x.prompt not in excluded], int)

  def prompt(self, problem: Problem) -> Prompt:
    """Returns what the policy reads of a problem.

    Raises:
      UserError: that is more than tokens; rollouts have no arrays.
    """
    tokens = self.prompting(self.tokenizer, problem.prompt)
    if isinstance(tokens, PromptWithArrays):
      raise UserError(
        f"VerifiedTask.prompting: found {self.prompting}, whose prompts have"
        f" the arrays {', '.join(tokens.arrays)}, expected tokens alone."
      )
    return Prompt(tuple(tokens), problem)

  def reward(self, prompt: Prompt, answer: Sequence[int]) -> float:
    """Returns the reward of an answer: 0 for one that was cut."""
    if self.reward_fn is not None:
      text = self._ended_text(answer)
      return (
        0.0 if text is None else float(self.reward_fn(prompt.problem, text))
      )
    verdict = self.verdict(prompt, answer)
    return float(verdict is not None and verdict.correct)

  def verdict(self, prompt: Prompt, answer: Sequence[int]) -> Verdict | None:
    """Returns the task's verdict on an answer; None for one that was cut."""
    text = self._ended_text(answer)
    return None if text is None else self._judge.verify(prompt.problem, text)

  def _ended_text(self, answer: Sequence[int]) -> str | None:
    """Returns the text of an answer; None for one that was cut."""
    # What was cut may look right, and go on wrongly.
    if not answer or answer[-1] not in self.stop_tokens:
      return None
    return self.tokenizer.decode(answer)
