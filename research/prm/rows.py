"""Labelled steps as training data: files of any format, a solution a row.

What the model reads of a step is `conventions.step_tokens`, as TRL's
`tokenize_row` has it; a step's last token is where its score is read. Rows have
what `StepReward` takes: `tokens`, `positions`, `segments`, `labels` and
`weights`.
"""

import dataclasses
import functools
import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from research.data.array_batches import ShuffledBatches
from research.data.packing import Row
from research.data.sources import (
  FromFiles,
  NoExamples,
  Split,
  is_stream,
  split_of,
)
from research.prm.conventions import Convention, Encoded, step_tokens
from research.prm.formats import Format, Native, read
from research.prm.labelled import Label, LabelledSolution
from research.prm.labels import rollouts
from research.ranges import AtLeast, NonNegativeInt, PositiveInt, Ranged
from research.reasoning.prompting import Prompting, arrays_of, as_text
from research.typing import UserError

StepLabels = Callable[[LabelledSolution], Sequence[Label]]
"""What is learned of a solution: a label for each step, None for unknown."""


def recorded(solution: LabelledSolution) -> Sequence[Label]:
  """Returns the labels of the file."""
  return solution.labels


def truncated(solution: LabelledSolution) -> Sequence[Label]:
  """Returns the labels of the file until the first 0, unknown after it."""
  return rollouts.truncate(solution.labels)


def unrecovered(solution: LabelledSolution) -> Sequence[Label]:
  """Returns the labels of the file, and 0 for what follows the first 0.

  True of tasks in which no step makes an error good, such as countdown, whose
  target cannot be made any more. A model that learns them may choose by its
  last score.
  """
  labels = tuple(solution.labels)
  if 0 not in labels:
    return labels
  n = labels.index(0)
  return labels[:n] + (0,) * (len(labels) - n)


def outcome(solution: LabelledSolution) -> Sequence[Label]:
  """Returns for every step whether the final answer is correct.

  With the supervision `every_step` a model learns it from every prefix (Cobbe
  et al. 2021, arXiv:2110.14168), with `last_step` from whole solutions.
  """
  correct = solution.final_correct
  return [None if correct is None else int(correct)] * len(solution.steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted:
  """Labels from the file's counts of rollouts, the share that succeeded.

  Attributes:
    rollouts: number of them that are used, drawn without replacement; None for
      all. So one file shows what fewer rollouts would have given.
    threshold: a larger share is 1, others 0: hard labels, which end at the
      first error. None for soft labels, which do not.
    seed: random seed of the draws.
  """

  rollouts: int | None = None
  threshold: float | int | None = None
  seed: int = 0

  def __call__(self, solution: LabelledSolution) -> Sequence[Label]:
    """Returns the labels; all unknown where there are no counts."""
    counts = solution.mc or (None,) * len(solution.steps)
    if self.rollouts is not None:
      text = "\n".join((solution.prompt, *solution.steps))
      rng = np.random.default_rng([self.seed, zlib.crc32(text.encode())])
      counts = [x and self._fewer(x, rng) for x in counts]
    if self.threshold is None:
      return rollouts.soft(counts)
    return rollouts.truncate(rollouts.hard(counts, self.threshold))

  def _fewer(self, counts, rng):
    c, k = counts
    # A verdict, of one rollout, is exact.
    drawn = min(self.rollouts, k)
    right = int(rng.hypergeometric(c, k - c, drawn))
    return type(counts)(right, drawn)


def encode(
  solution: LabelledSolution,
  tokenizer: Any,
  separator: str = "",
  prompting: Prompting = as_text,
  convention: Convention | None = None,
) -> Encoded:
  """Returns a solution's tokens, and where its steps end.

  Args:
    tokenizer: has `encode(text)`, and `prompt(text)` for what begins a text.
    separator: text after each step, as for `step_tokens`.
    prompting: what the model reads of the solution's prompt.
    convention: encoding of a public reward model, in place of prompt and
      separator.

  Raises:
    UserError: a step has no token.
  """
  if convention is not None:
    return convention.encode(tokenizer, solution.prompt, solution.steps)
  tokens, ends = list(prompting(tokenizer, solution.prompt)), []
  for i, step in enumerate(solution.steps):
    step_ids = step_tokens(tokenizer, step, separator)
    if not step_ids:
      raise UserError(
        f"{solution.problem_id}: steps[{i}]: found {step!r:.60}, which has no"
        " tokens, expected a text"
      )
    tokens += step_ids
    ends.append(len(tokens) - 1)
  return Encoded(tokens, ends)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledRows(Ranged, FromFiles, ShuffledBatches):
  """Solutions of files with labelled steps, one a row.

  Solutions longer than a row lose what is beyond it; those that are left
  without a label are dropped. Both are warned of, with their numbers.

  Attributes:
    paths: a file, or a pattern of several.
    format: their layout, of `prm.formats`.
    labels: which labels are learned: `recorded`, `truncated`, `unrecovered`,
      `outcome`, or a `Counted`.
    separator: text after each step, as for `encode`.
    split: which solutions, by the hash of their prompt; None for all. No
      problem is in two splits.
    length: row length T.
    prompting: what the model reads of a solution's prompt. Arrays beside the
      tokens, such as a picture's pixels, are in the batch.
    convention: encoding of a public reward model, which says itself what it
      reads of prompt and steps; None for `prompting` and `separator`.
    batch_size: rows in a batch over all processes, B.
    seed: random seed of the shuffle.
  """

  paths: str
  format: Format = Native()
  labels: StepLabels = recorded
  separator: str = ""
  split: Split | None = None
  length: AtLeast(2) = 256
  prompting: Prompting = as_text
  convention: Convention | None = None
  batch_size: PositiveInt = 32
  seed: NonNegativeInt = 0

  def __post_init__(self):
    super().__post_init__()
    as_is = self.separator == "" and self.prompting is as_text
    if self.convention is not None and not as_is:
      raise UserError(
        f"LabelledRows.convention: found {type(self.convention).__name__} and a"
        " separator or a prompting, expected one or the other: a convention has"
        " its own"
      )

  def check_files(self) -> None:
    """Raises UserError for the first record that is not of the layout.

    Pipes and devices are left out, since they can be read only once.
    """
    if not is_stream(self.paths):
      read(self.paths, self.format)

  def solutions(self) -> list[LabelledSolution]:
    all_splits = read(self.paths, self.format)
    if self.split is None:
      return all_splits
    return [x for x in all_splits if split_of(x.prompt) == self.split]

  def rows(self, tokenizer: Any) -> "_LabelledRows":
    """Returns the rows that have a label, in the files' order.

    Raises:
      UserError: there is no tokenizer.
      NoExamples: no step of the split has a label.
    """
    if tokenizer is None:
      raise UserError(
        f"{self.paths}: is text, and this model has no tokenizer."
      )
    solutions = self.solutions()
    made = _LabelledRows.from_solutions(solutions, tokenizer, self)
    dropped = len(solutions) - len(made)
    if made.cut or dropped:
      warnings.warn(
        f"{self.paths}: {made.cut:,} of {len(solutions):,} solutions are longer"
        f" than LabelledRows.length, {self.length}, and were cut; {dropped:,}"
        " have no label and were dropped.",
        RuntimeWarning,
        stacklevel=2,
      )
    if not len(made):
      raise NoExamples(
        f"{self.paths}: {len(solutions)} solutions, none with a labelled step."
        "\nExpected at least one; check the split, and the labels."
      )
    return made


@dataclasses.dataclass(frozen=True, eq=False)
class _LabelledRows:
  """Tokens, sizes and labels of all rows; `cut` counts those cut short.

  Arrays beside the tokens are those of prompts, which rows share.
  """

  tokens: np.ndarray
  sizes: np.ndarray
  labels: np.ndarray  # NaN where there is none
  cut: int
  prompts: np.ndarray  # of each row, an index
  arrays: dict[str, np.ndarray]

  @classmethod
  def from_solutions(
    cls,
    solutions: Sequence[LabelledSolution],
    tokenizer: Any,
    data: LabelledRows,
  ) -> "_LabelledRows":
    """Returns the rows of solutions that keep a label."""
    words = _Cached(tokenizer)
    # A convention encodes whole texts, which no two solutions share.
    encoder = words if data.convention is None else tokenizer
    prompting = functools.lru_cache(None)(data.prompting)
    shape = len(solutions), data.length
    tokens = np.zeros(shape, np.int32)
    labels = np.full(shape, np.nan, np.float32)
    sizes = np.zeros(len(solutions), np.int32)
    cut = 0
    for i, solution in enumerate(solutions):
      ids, ends = encode(
        *(solution, encoder, data.separator, prompting, data.convention)
      )
      cut += len(ids) > data.length
      ids = ids[: data.length]
      tokens[i, : len(ids)], sizes[i] = ids, len(ids)
      for end, label in zip(ends, data.labels(solution), strict=True):
        if label is not None and end < data.length:
          labels[i, end] = label
    has_label = ~np.isnan(labels).all(axis=1)
    prompts = [
      x.prompt
      for x, is_kept in zip(solutions, has_label, strict=True)
      if is_kept
    ]
    places = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return cls(
      tokens[has_label],
      sizes[has_label],
      labels[has_label],
      cut,
      np.array([places[x] for x in prompts], int),
      arrays_of([prompting(words, x) for x in places]),
    )

  def __len__(self) -> int:
    return len(self.sizes)

  def __getitem__(self, index: int) -> Row:
    batch = self.take(np.array([index]))
    return {name: x[0] for name, x in batch.items()}

  def take(self, indices: np.ndarray) -> Row:
    at = np.arange(self.tokens.shape[1], dtype=np.int32)[None]
    real = at < self.sizes[indices, None]
    labels = self.labels[indices]
    known = ~np.isnan(labels)
    of = self.prompts[indices]
    return {name: x[of] for name, x in self.arrays.items()} | {
      "tokens": self.tokens[indices],
      "positions": np.where(real, at, np.int32(-1)),
      "segments": np.where(real, np.int32(0), np.int32(-1)),
      "labels": np.where(known, labels, np.float32(0)),
      "weights": known.astype(np.float32),
    }


class _Cached:
  """A tokenizer that remembers texts: solutions share prompts and steps."""

  def __init__(self, tokenizer: Any):
    self._tokenizer = tokenizer
    self.encode = functools.lru_cache(1 << 16)(tokenizer.encode)
    self.prompt = functools.lru_cache(1 << 16)(tokenizer.prompt)

  def __getattr__(self, name: str) -> Any:
    # A prompt may ask for more: special tokens, a chat template.
    return getattr(self._tokenizer, name)
