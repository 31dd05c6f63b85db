"""Paths of many problems, step by step: policy, verifier and their cost.

All rows of all problems are one batch. A policy's row pauses where a step ends,
the verifier reads the new tokens alone, and `select` says which rows go on, and
how often. Every token of policy and verifier is on the problem's ledger.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from research.generation.decoding import GeneratedTokens
from research.generation.generated import NO_TOKEN
from research.generation.stepwise import Stepwise
from research.nn.flops import Causal, ModelCost, model_cost
from research.reasoning.isolation import TimedOut, within
from research.search.ledger import Ledger
from research.search.policy import (
  AutoregressiveCost,
  Frontier,
  Path,
  Policy,
  PolicyCost,
)
from research.typing import Float, Int, PRNGKey, UserError


@runtime_checkable
class Verifier(Protocol):
  """Scores steps; it has a state for each row, as the policy does."""

  def prompt_cost(self, tokens: int) -> Ledger:
    """Returns what a prompt of so many tokens costs it."""
    ...

  def step_cost(self, start: int, tokens: int) -> Ledger:
    """Returns what a step costs it.

    Args:
      start: tokens before the step.
      tokens: tokens in the step.
    """
    ...

  def start(
    self, prompts: Sequence[Sequence[int]], copies: int, max_new_tokens: int
  ) -> Any:
    """Returns the state of `copies` rows for each prompt, read once."""
    ...

  def read(
    self, state: Any, paths: Sequence[Path], new: Int[np.ndarray, "R C"]
  ) -> tuple[Any, Float[np.ndarray, " R"]]:
    """Returns the state, and each row's score after its new tokens.

    Args:
      state: verifier's state of the rows.
      paths: paths of the rows, new tokens included.
      new: the tokens that were not read yet, `NO_TOKEN` in other places; a row
        without any keeps its state, and its score means nothing.
    """
    ...

  def select(self, state: Any, rows: Sequence[int]) -> Any:
    """Returns the state of chosen rows."""
    ...

  def store(self, state: Any, new: Any, rows: Sequence[int]) -> Any:
    """Returns the state with rows of `new` in place of some.

    Only tree searches need it. A row past the last one of `state` goes nowhere.
    """
    ...


@runtime_checkable
class StateVerifier(Protocol):
  """Scores steps by the policy's own states, and has none itself."""

  def prompt_cost(self, tokens: int) -> Ledger:
    """Returns what a prompt costs it, see `Verifier`."""
    ...

  def step_cost(self, start: int, tokens: int) -> Ledger:
    """Returns what a step costs it, see `Verifier`."""
    ...

  def score(
    self, state: Any, last: Int[np.ndarray, " R"]
  ) -> Float[np.ndarray, " R"]:
    """Returns each row's score.

    Args:
      state: the policy's, after the tokens that are scored.
      last: token at which a row is scored, the newest one or that before a
        stop token; `NO_TOKEN` of rows whose score means nothing.
    """
    ...


@runtime_checkable
class WritingVerifier(Verifier, Protocol):
  """A verifier whose cost is known once it has judged, such as a judge's."""

  def spent(self, state: Any) -> Sequence[Ledger]:
    """Returns what the last `read` has cost, of each row."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
  """A policy, and what judges its steps.

  Attributes:
    policy: whose rows pause at the ends of steps.
    verifier: scores steps; None: paths have no scores.
    timeout: seconds that the verifier has for the steps of all paths; None for
      any number. One that asks elsewhere may never answer.
    silent: stop tokens without a text, which no verifier reads: rows of
      training have texts alone. None for all of the policy's.
  """

  policy: Policy
  verifier: Verifier | StateVerifier | None = None
  timeout: float | int | None = None
  silent: tuple[int, ...] | None = None

  @property
  def _reader(self) -> Verifier | None:
    """The verifier, if it has a state of its own."""
    return self.verifier if isinstance(self.verifier, Verifier) else None

  @functools.cached_property
  def _cost(self) -> PolicyCost:
    # What stands in `generation` knows no ledger.
    if isinstance(self.policy, Stepwise):
      return AutoregressiveCost(self._model_cost, self.policy.reader)
    return self.policy

  @functools.cached_property
  def _model_cost(self) -> ModelCost:
    return model_cost(self.policy.model, params=self.policy.params)

  def prompt_cost(self, tokens: int) -> Ledger:
    """Returns what reading a prompt of so many tokens costs, once."""
    cost = self._cost.prompt(tokens)
    if self.verifier is None:
      return cost
    return cost.alongside(self.verifier.prompt_cost(tokens))

  def start(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    copies: int,
    key: PRNGKey | None = None,
  ) -> Frontier:
    """Returns `copies` paths for each problem, after their first step.

    Args:
      prompts: token ids of each problem.
      max_new_tokens: most tokens of a path.
      copies: paths of a problem, one after the other.
      key: random key of the sampling; seed 0 by default.
    """
    began = time.perf_counter()
    state, drawn = self.policy.start(prompts, max_new_tokens, key, copies)
    frontier = self._without_steps(
      state, prompts, max_new_tokens, copies, began
    )
    return self._with_tokens(frontier, state, drawn)

  def begin(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    copies: int,
    key: PRNGKey | None = None,
  ) -> Frontier:
    """Returns paths before their first step, so that it can be drawn again.

    Arguments as for `start`. `advance` draws the first step; it feeds the last
    token of the prompt, as every step feeds the last token of the step before.
    """
    began = time.perf_counter()
    state = self.policy.begin(prompts, max_new_tokens, key, copies)
    frontier = self._without_steps(
      state, prompts, max_new_tokens, copies, began
    )
    paths = tuple(dataclasses.replace(x, rereads=True) for x in frontier.paths)
    return dataclasses.replace(frontier, paths=paths)

  def _without_steps(
    self,
    state: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    copies: int,
    began: float,
  ) -> Frontier:
    """Returns paths without a token, their prompts read and paid for."""
    paths = tuple(
      Path(problem=i, root=root, prompt=len(prompt))
      for i, prompt in enumerate(prompts)
      for root in range(copies)
    )
    ledgers = tuple(self.prompt_cost(len(prompt)) for prompt in prompts)
    judged = None
    if self._reader is not None:
      judged = self._reader.start(prompts, copies, max_new_tokens)
    advanced = (True,) * len(paths)
    return Frontier(state, judged, paths, advanced, ledgers, began)

  def advance(self, frontier: Frontier) -> Frontier:
    """Returns the frontier after one more step of all paths that go on.

    The buffers of `frontier` are used up.
    """
    state, drawn = self.policy.advance(frontier.state)
    return self._with_tokens(frontier, state, drawn)

  def select(
    self, frontier: Frontier, rows: Sequence[int], branch: Sequence[int]
  ) -> Frontier:
    """Returns chosen paths; arguments as for `decoding.select`."""
    judged = frontier.verifier
    if self._reader is not None:
      judged = self._reader.select(judged, rows)
    return dataclasses.replace(
      frontier,
      state=self.policy.select(frontier.state, rows, branch),
      verifier=judged,
      paths=tuple(frontier.paths[row] for row in rows),
      advanced=tuple(frontier.advanced[row] for row in rows),
    )

  def append(
    self,
    frontier: Frontier,
    tokens: Sequence[Sequence[int]],
    replace: Sequence[bool],
  ) -> Frontier:
    """Returns the frontier after tokens that were not drawn, as a step.

    Such a path has no `log_prob`: the new tokens were not drawn.

    Args:
      frontier: any; its buffers are used up.
      tokens: token ids for each path, or none.
      replace: which paths that get some lose their last token first.

    Raises:
      UserError: there is a verifier, which has read what would be lost; or a
        path would have too many tokens.
    """
    if self.verifier is not None:
      raise UserError(
        "append: found a verifier, expected none: it has read the tokens that"
        " are replaced.\nScore the finished paths instead"
      )
    state = self.policy.append(frontier.state, tokens, replace)
    cost, ledgers = self._model_cost, list(frontier.ledgers)
    paths = list(frontier.paths)
    for row, (added, lost) in enumerate(zip(tokens, replace, strict=True)):
      if not added:
        continue
      path = paths[row]
      *steps, last = path.steps
      kept = last[:-1] if lost else last
      before = path.prompt + len(path.tokens) - 1
      fed = len(added) - lost
      ledgers[path.problem] += Ledger(
        policy_decode_tokens=len(added),
        flops_policy=cost.forward(fed, Causal(before, fed), 0),
      )
      steps = (*steps, kept, tuple(added)) if kept else (*steps, tuple(added))
      paths[row] = dataclasses.replace(
        path, steps=tuple(steps), log_prob=None, done=False, stopped=False
      )
    done = np.asarray(self.policy.done(state))
    paths = [
      dataclasses.replace(path, done=bool(end)) if added else path
      for path, end, added in zip(paths, done, tokens, strict=True)
    ]
    return dataclasses.replace(
      frontier, state=state, paths=tuple(paths), ledgers=tuple(ledgers)
    )

  def store(
    self, frontier: Frontier, new: Frontier, rows: Sequence[int]
  ) -> Frontier:
    """Returns the frontier with rows of `new` in place of some.

    Args:
      frontier: any frontier; its buffers are used up.
      new: frontier of the same problems, with what they have cost by now.
      rows: where each row of `new` goes; past the last row, nowhere.
    """
    judged = frontier.verifier
    if self._reader is not None:
      judged = self._reader.store(judged, new.verifier, rows)
    paths, advanced = list(frontier.paths), list(frontier.advanced)
    for row, path, new_step in zip(rows, new.paths, new.advanced, strict=True):
      if row < len(paths):
        paths[row], advanced[row] = path, new_step
    return dataclasses.replace(
      frontier,
      state=self.policy.store(frontier.state, new.state, rows),
      verifier=judged,
      paths=tuple(paths),
      advanced=tuple(advanced),
      ledgers=new.ledgers,
    )

  def end(self, frontier: Frontier, idle: Sequence[bool]) -> Frontier:
    """Returns the frontier with some rows idle from now on."""
    state = self.policy.end(frontier.state, np.array(idle))
    return dataclasses.replace(frontier, state=state)

  def _with_tokens(
    self, frontier: Frontier, state: Any, drawn: GeneratedTokens
  ) -> Frontier:
    new = np.asarray(drawn.tokens)
    paths = [
      self._longer(path, row, scores, bool(done))
      for path, row, scores, done in zip(
        frontier.paths,
        new,
        [None] * len(new) if drawn.log_probs is None else drawn.log_probs,
        drawn.done,
        strict=True,
      )
    ]
    judged = frontier.verifier
    to_score = self._to_score(frontier.paths, new)
    if self.verifier is not None:
      advanced = (to_score != NO_TOKEN).any(axis=1)
      judged, step_scores = self._judged(judged, state, paths, to_score)
      paths = [
        _scored(path, score) if is_scored else path
        for path, score, is_scored in zip(
          paths, step_scores, advanced, strict=True
        )
      ]
    advanced = tuple(bool(x) for x in (new != NO_TOKEN).any(axis=1))
    return dataclasses.replace(
      frontier,
      state=state,
      verifier=judged,
      paths=tuple(paths),
      advanced=advanced,
      ledgers=self._costs(frontier, drawn, judged, to_score),
    )

  def _to_score(
    self, paths: Sequence[Path], new: Int[np.ndarray, "R C"]
  ) -> Int[np.ndarray, "R C"]:
    """Returns the new tokens that are read, `NO_TOKEN` in other places.

    Of a solution that is a stop token alone there is nothing else to read.
    """
    silent = np.isin(new, [*self._silent, NO_TOKEN])
    first = np.array([not path.steps for path in paths])
    return np.where(silent & ~(first & silent.all(1))[:, None], NO_TOKEN, new)

  @property
  def _silent(self) -> list[int]:
    """Tokens that end a text and are no part of it."""
    return list(self.policy.stop_tokens if self.silent is None else self.silent)

  def _judged(
    self,
    judged: Any,
    state: Any,
    paths: Sequence[Path],
    to_score: Int[np.ndarray, "R C"],
  ) -> tuple[Any, Float[np.ndarray, " R"]]:
    """Returns the verifier's state and scores, if they come in time."""

    def read():
      if self._reader is None:
        last = [([NO_TOKEN, *row[row != NO_TOKEN]])[-1] for row in to_score]
        return judged, self.verifier.score(state, np.array(last, np.int32))
      return self._reader.read(judged, paths, to_score)

    try:
      judged, scores = within(self.timeout, read)
    except TimedOut:
      raise UserError(
        f"verifier: found no scores after {self.timeout} s, expected them by"
        " then.\nGive Engine.timeout more (SearchRun.timeout in a run file), or"
        " judge fewer paths at a time."
      ) from None
    if np.shape(scores) != (len(paths),):
      raise UserError(
        f"verifier: found scores of shape {np.shape(scores)}, expected one for"
        f" each of {len(paths)} paths"
      )
    return judged, scores

  def _longer(
    self, path: Path, row: Int[np.ndarray, " C"], log_probs: Any, done: bool
  ) -> Path:
    tokens = tuple(int(token) for token in row if token != NO_TOKEN)
    if not tokens:
      return path
    steps = *path.steps, tokens
    # It is no step, and has no score.
    if path.steps and set(tokens) <= set(self._silent):
      steps = *path.steps[:-1], path.steps[-1] + tokens
    log_prob = None
    if path.log_prob is not None and log_probs is not None:
      log_prob = path.log_prob + float(np.sum(log_probs))
    return dataclasses.replace(
      path,
      steps=steps,
      log_prob=log_prob,
      done=done,
      stopped=done and tokens[-1] in self.policy.stop_tokens,
    )

  def _costs(
    self,
    frontier: Frontier,
    drawn: GeneratedTokens,
    judged: Any,
    to_score: Int[np.ndarray, "R C"],
  ) -> tuple[Ledger, ...]:
    """Returns the ledgers with the passes that drew and judged new tokens."""
    ledgers, paths = list(frontier.ledgers), frontier.paths
    prompts = {path.problem: path.prompt for path in paths}
    shared = {
      problem: self._cost.prompt(tokens).peak_cache_tokens
      for problem, tokens in prompts.items()
    }
    cached = [shared.get(i, 0) for i in range(len(ledgers))]
    counts = (np.asarray(drawn.tokens) != NO_TOKEN).sum(axis=1).tolist()
    steps = self._cost.steps(paths, drawn)
    judges = (to_score != NO_TOKEN).sum(axis=1).tolist()
    reads = self._reads(paths, judges, judged)
    for path, count, now, read in zip(paths, counts, steps, reads, strict=True):
      cached[path.problem] += now.peak_cache_tokens
      if count:
        now = dataclasses.replace(now, peak_cache_tokens=0)
        ledgers[path.problem] += now.alongside(read)
    seconds = time.perf_counter() - frontier.started
    return tuple(
      dataclasses.replace(
        ledger,
        seconds=seconds,
        peak_cache_tokens=max(ledger.peak_cache_tokens, peak),
      )
      for ledger, peak in zip(ledgers, cached, strict=True)
    )

  def _reads(
    self, paths: Sequence[Path], counts: Sequence[int], judged: Any
  ) -> Sequence[Ledger]:
    """Returns what judging each path's new tokens costs."""
    if self.verifier is None:
      return [Ledger()] * len(paths)
    if isinstance(self.verifier, WritingVerifier):
      return self.verifier.spent(judged)
    return [
      self.verifier.step_cost(path.prompt + len(path.tokens), count)
      if count
      else Ledger()
      for path, count in zip(paths, counts, strict=True)
    ]


def _scored(path: Path, score: Any) -> Path:
  if not np.isfinite(score):
    raise UserError(
      f"verifier: found the score {score} for problem {path.problem} after"
      f" {len(path.steps)} steps, expected a number"
    )
  return dataclasses.replace(path, scores=(*path.scores, float(score)))
