"""Countdown in steps: make a target of some numbers, each used once.

A prompt is `3 5 7 12 > 24 >`. A step takes two of the numbers and puts what
they make in front of the others, `7 + 5 = 12 3 12 ;`, so that the numbers left
are always those behind the last `=`. After the last step one number is left,
which has to be the target. Tokens are words between spaces, one a number
(`vocabulary`).

The oracle is exact: a step is right if it uses numbers that are there, computes
and copies right, and the target can still be made of what is left. Whether it
can is found by trying everything. No answer key is needed, so a deployed system
has this verifier, too.
"""

import collections
import dataclasses
import functools
import random
import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from research.data.sources import split_of
from research.errors import UserError
from research.ranges import Between
from research.reasoning.problem import Problem, StepVerdict, Verdict
from research.reasoning.segmentation import SEMICOLON, steps_of
from research.reasoning.tasks.task import (
  DRAWS,
  GeneratedTask,
  SolvedProblems,
  answer_of,
  mutate,
)
from research.reasoning.words import EOS, PAD

OPERATORS = "+-*"

BLOCK = 1 << 13
"""Draws at once of `Countdown.solved`."""

MAX_NUMBERS = 6
"""Beyond it, trying everything takes minutes."""

_STEP = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)((?: \d+)*) ;")

Numbers = tuple[int, ...]


class IllegalStep(ValueError):
  """A step that the rules do not have; the message says which rule."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Countdown(GeneratedTask):
  """Countdown with exact oracles of traces and of steps.

  Attributes:
    numbers: number of them, K.
    values: least and largest of them.
    targets: least and largest target.
    largest: largest number on the way; none is below 0.
    operators: those used, out of `+`, `-` and `*`.
  """

  NAME: ClassVar[str] = "countdown"

  numbers: Between(2, MAX_NUMBERS) = 4
  values: tuple[int, int] = (1, 12)
  targets: tuple[int, int] = (10, 99)
  largest: int = 199
  operators: str = OPERATORS

  def __post_init__(self):
    super().__post_init__()
    for name in ("values", "targets"):
      low, high = getattr(self, name)
      if not 0 <= low <= high <= self.largest:
        raise UserError(
          f"Countdown.{name}: found {low} to {high}, expected a range within 0"
          f" to {self.largest}."
        )
    if not self.operators or set(self.operators) - set(OPERATORS):
      raise UserError(
        f"Countdown.operators: found {self.operators!r}, expected some of"
        f" {OPERATORS!r}."
      )

  def draw(self, rng: random.Random) -> Problem | None:
    """Returns a problem that was solved by playing forward at random."""
    numbers = tuple(rng.randint(*self.values) for _ in range(self.numbers))
    left, steps = numbers, []
    while len(left) > 1:
      i, j = rng.sample(range(len(left)), 2)
      sign = rng.choice(self.operators)
      if left[i] < left[j]:
        i, j = j, i  # as all canonical steps have it
      result = _apply(left[i], sign, left[j])
      if not 0 <= result <= self.largest:
        return None
      steps.append(_step(left, i, sign, j, result))
      left = (result, *_without(left, i, j))
    target = left[0]
    if not self.targets[0] <= target <= self.targets[1]:
      return None
    prompt = f"{' '.join(map(str, numbers))} > {target} >"
    return Problem(
      id=f"{self.NAME}/{_key(numbers, target)}",
      prompt=prompt,
      meta={"solution": steps},
      difficulty=float(self.numbers),
    )

  def solved(self) -> SolvedProblems:
    """Returns `count` problems with solutions, all at once: data of training.

    They are drawn as `draw` does, but by arrays, some ten times as fast, so
    that these are other problems than those of the task's indices, though of
    the same split.

    Raises:
      UserError: there is none, or hardly any in this split.
    """
    self.expect("count", 1)
    blocks, size = [], 0
    while size < self.count:
      name = f"{self.NAME}/{self.split}/{self.seed}/{len(blocks)}"
      rng = np.random.default_rng(list(name.encode()))
      blocks.append(self._solved_block(rng))
      size += len(blocks[-1])
      if size * DRAWS < len(blocks) * BLOCK:
        raise UserError(
          f"Countdown: found {size} problems of split {self.split!r} in"
          f" {len(blocks) * BLOCK:,} draws: the settings admit too few."
        )
    rows = np.concatenate(blocks)[: self.count].astype(np.int32)
    return SolvedProblems(vocabulary(self.largest), rows, self.numbers + 3)

  def _solved_block(self, rng: np.random.Generator) -> np.ndarray:
    """Returns the problems of `BLOCK` draws that are of the split, `[P, W]`."""
    index = {word: i for i, word in enumerate(vocabulary(self.largest))}
    signs = np.array([index[sign] for sign in self.operators])

    def every(word):
      return np.full((BLOCK, 1), index[word])

    low, high = self.values
    left = rng.integers(low, high + 1, (BLOCK, self.numbers))
    numbers, legal, steps = left, np.ones(BLOCK, bool), []
    for n in range(self.numbers, 1, -1):
      i = rng.integers(n, size=(BLOCK, 1))
      j = (i + rng.integers(1, n, size=(BLOCK, 1))) % n
      a, b = (np.take_along_axis(left, x, 1) for x in (i, j))
      a, b = np.maximum(a, b), np.minimum(a, b)
      which = rng.integers(len(signs), size=(BLOCK, 1))
      all_made = {"+": a + b, "-": a - b, "*": a * b}
      made = np.concatenate([all_made[x] for x in self.operators], 1)
      made = np.take_along_axis(made, which, 1)
      legal &= ((made >= 0) & (made <= self.largest))[:, 0]
      made = np.clip(made, 0, self.largest)
      kept = (np.arange(n) != i) & (np.arange(n) != j)
      rest = left[kept].reshape(BLOCK, n - 2)
      steps += [a, signs[which], b, every("="), made, rest, every(";")]
      left = np.concatenate([made, rest], 1)
    legal &= (left[:, 0] >= self.targets[0]) & (left[:, 0] <= self.targets[1])
    head = [numbers, every(">"), left, every(">")]
    rows = np.concatenate([*head, *steps, every(EOS)], 1)
    ours = [
      i
      for i in np.flatnonzero(legal)
      if split_of(_key(numbers[i].tolist(), int(left[i, 0]))) == self.split
    ]
    return rows[ours]

  def key(self, problem: Problem) -> str:
    """Returns the sorted numbers and the target, whatever their order."""
    return _key(*parse_prompt(problem.prompt))

  def oracle(self, problem: Problem) -> str:
    """Returns the steps by which the problem was made, or those of a search."""
    steps = problem.meta.get("solution")
    if not steps:
      steps = next(self.solutions(*parse_prompt(problem.prompt)), None)
    if not steps:
      raise UserError(f"{problem.id}: has no solution.")
    return " ".join(steps)

  def mutated(self, problem: Problem) -> str:
    """Returns the solution with another last number."""
    return mutate(self.oracle(problem))

  def hedges(self, problem: Problem) -> list[str]:
    """Returns texts of two solutions, of which one is wrong."""
    both = self.oracle(problem), self.mutated(problem)
    orders = both, both[::-1]
    return [sign.join(x) for sign in (" ", " or ") for x in orders]

  def verify(self, problem: Problem, text: str | None) -> Verdict:
    """Returns whether every step is legal and the last number is the target.

    The answer is the expression that the steps make up; its canonical form has
    sums and products in one order. Steps that break a rule are an answer, too,
    a wrong one, and stand for themselves: a policy that is forced to end at the
    target errs by its arithmetic, so that leaving such answers out of a vote
    would be an exact check of all of them.
    """
    numbers, target = parse_prompt(problem.prompt)
    steps = steps_of(SEMICOLON, answer_of(text))
    if not steps:
      return Verdict(False, reason="no answer")
    written = " ".join(x.strip() for x in steps)
    for step in steps:
      if _match(step) is None:
        reason = f"no answer: found {step.strip()!r:.60}, not a step"
        return Verdict(False, reason=reason)
    left, expressions = numbers, list(map(str, numbers))
    for step in steps:
      try:
        a, sign, b, left_now = self._read(left, step)
      except IllegalStep as error:
        return Verdict(False, written, written, f"wrong: {error}")
      i, j = _places(left, a, b)
      made = _expression(expressions[i], sign, expressions[j])
      rest = _without(tuple(expressions), i, j)
      # The copies may be in another order than the numbers were.
      expressions = [made, *_ordered(rest, _without(left, i, j), left_now[1:])]
      left = left_now
    if len(left) > 1:
      reason = f"wrong: {len(left)} numbers left"
      return Verdict(False, written, written, reason)
    correct = left[0] == target
    reason = "correct" if correct else f"wrong: {left[0]}"
    return Verdict(correct, written, expressions[0], reason)

  def verify_step(
    self, problem: Problem, steps: Sequence[str], step: str
  ) -> StepVerdict:
    """Returns "ok" if the step is legal and the target can still be made."""
    left, target = parse_prompt(problem.prompt)
    for before in steps:
      try:
        left = self._read(left, before)[-1]
      except IllegalStep as error:
        return StepVerdict("error", f"an earlier step: {error}")
    try:
      left = self._read(left, step)[-1]
    except IllegalStep as error:
      return StepVerdict("error", str(error))
    if self.solvable(left, target):
      return StepVerdict("ok")
    return StepVerdict("error", f"{target} cannot be made of what is left")

  def solvable(self, numbers: Sequence[int], target: int) -> bool:
    """Whether the target can be made of all of the numbers."""
    return target in self.reachable(numbers)

  def reachable(self, numbers: Sequence[int]) -> frozenset[int]:
    """Returns every number that can be made of all of the numbers."""
    return _reachable(tuple(sorted(numbers)), self.largest, self.operators)

  def solutions(
    self, numbers: Sequence[int], target: int
  ) -> Iterator[list[str]]:
    """Yields every canonical trace: the larger number first, none twice."""
    left = tuple(numbers)
    if len(left) == 1:
      if left[0] == target:
        yield []
      return
    for step, after in self.moves(left):
      if self.solvable(after, target):
        for rest in self.solutions(after, target):
          yield [step, *rest]

  def moves(self, numbers: Sequence[int]) -> Iterator[tuple[str, Numbers]]:
    """Yields every canonical step, and the numbers after it."""
    left = tuple(numbers)
    written = set()
    for i in range(len(left)):
      for j in range(len(left)):
        if i == j or left[i] < left[j]:
          continue
        for sign in self.operators:
          result = _apply(left[i], sign, left[j])
          step = _step(left, i, sign, j, result)
          if 0 <= result <= self.largest and step not in written:
            written.add(step)
            yield step, (result, *_without(left, i, j))

  def _read(self, left: Numbers, step: str) -> tuple[int, str, int, Numbers]:
    """Returns a legal step's parts and the numbers after it.

    Raises:
      IllegalStep: naming the first rule that it breaks.
    """
    match = _match(step)
    if match is None:
      raise IllegalStep(f"found {step.strip()!r:.60}, not a step")
    a, b, c = (int(match[i]) for i in (1, 3, 4))
    sign, copies = match[2], tuple(map(int, match[5].split()))
    if sign not in self.operators:
      raise IllegalStep(f"{sign} is not allowed")
    rest = collections.Counter(left)
    rest.subtract([a, b])
    if min(rest.values()) < 0:
      raise IllegalStep(f"{a} and {b} are not both there")
    result = _apply(a, sign, b)
    if not 0 <= result <= self.largest:
      raise IllegalStep(f"{result} is not within 0 to {self.largest}")
    if result != c:
      raise IllegalStep(f"{a} {sign} {b} is {result}, not {c}")
    if +rest != collections.Counter(copies):
      raise IllegalStep("the other numbers are not copied")
    return a, sign, b, (c, *copies)


def _match(text: str) -> re.Match[str] | None:
  """Returns a step's parts, if a text has its form; they may be wrong."""
  return _STEP.fullmatch(text.strip()) if len(text) <= 200 else None


def vocabulary(largest: int = 199) -> tuple[str, ...]:
  """Returns a model's words: every number, signs, `<eos>` and `<pad>`."""
  numbers = map(str, range(largest + 1))
  return (*numbers, *"+-*=;>", EOS, PAD)


def parse_prompt(prompt: str) -> tuple[Numbers, int]:
  """Returns the numbers and the target of a prompt.

  Raises:
    UserError: it is not one of countdown.
  """
  match = re.fullmatch(r"(\d+(?: \d+)+) > (\d+) >", prompt)
  if not match:
    raise UserError(
      f"countdown: found the prompt {prompt!r:.60}, expected one such as"
      " '3 5 7 12 > 24 >'."
    )
  return tuple(map(int, match[1].split())), int(match[2])


@functools.lru_cache(maxsize=1 << 18)
def _reachable(
  numbers: Numbers, largest: int, operators: str
) -> frozenset[int]:
  """As `Countdown.reachable`, of sorted numbers."""
  if len(numbers) == 1:
    return frozenset(numbers)
  results: set[int] = set()
  for i in range(len(numbers)):
    for j in range(i):  # sorted: the larger one comes first
      rest = _without(numbers, i, j)
      for sign in operators:
        result = _apply(numbers[i], sign, numbers[j])
        if 0 <= result <= largest:
          after = tuple(sorted((result, *rest)))
          results |= _reachable(after, largest, operators)
  return frozenset(results)


def _apply(a: int, sign: str, b: int) -> int:
  return a + b if sign == "+" else a - b if sign == "-" else a * b


def _without(values: tuple, i: int, j: int) -> tuple:
  return tuple(x for k, x in enumerate(values) if k not in (i, j))


def _step(left: Numbers, i: int, sign: str, j: int, result: int) -> str:
  copies = "".join(f" {x}" for x in _without(left, i, j))
  return f"{left[i]} {sign} {left[j]} = {result}{copies} ;"


def _key(numbers: Sequence[int], target: int) -> str:
  return f"{' '.join(map(str, sorted(numbers)))} > {target}"


def _places(left: Numbers, a: int, b: int) -> tuple[int, int]:
  i = left.index(a)
  return i, left.index(b, i + 1 if a == b else 0)


def _ordered(
  expressions: Sequence[str], numbers: Sequence[int], copies: Sequence[int]
) -> list[str]:
  """Returns expressions in the order in which their numbers were copied."""
  rest = list(zip(numbers, expressions, strict=True))
  out = []
  for copy in copies:
    at = [x for x, _ in rest].index(copy)
    out.append(rest.pop(at)[1])
  return out


def _expression(a: str, sign: str, b: str) -> str:
  if sign != "-":
    a, b = sorted((a, b))
  return f"({a}{sign}{b})"
