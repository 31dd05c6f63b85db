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

from research.generation.decoding import Drawn
from research.generation.generated import NO_TOKEN
from research.generation.stepwise import Stepwise
from research.search.cost import Causal, ModelCost, model_cost
from research.search.ledger import Ledger, prefill
from research.typing import Bool, Float, Int, PRNGKey, UserError


@dataclasses.dataclass(frozen=True)
class Path:
  """A solution on its way.

  Attributes:
    problem: index of its problem.
    root: index of the copy of the prompt from which it comes, from 0.
    prompt: number of tokens of the prompt.
    steps: tokens of each step.
    scores: the verifier's, of each step; empty without a verifier.
    log_prob: of all tokens under the policy, in nats; 0 if not asked for.
    done: whether it has ended.
    stopped: whether it ended by a stop token, rather than by its length.
  """

  problem: int
  root: int
  prompt: int
  steps: tuple[tuple[int, ...], ...] = ()
  scores: tuple[float, ...] = ()
  log_prob: float | int = 0.0
  done: bool = False
  stopped: bool = False

  @property
  def tokens(self) -> tuple[int, ...]:
    """All new tokens."""
    return tuple(token for step in self.steps for token in step)


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
      tokens: of the step.
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
      state: of rows.
      paths: of the rows, new tokens included.
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
    self, state: Any, fresh: Bool[np.ndarray, " R"]
  ) -> Float[np.ndarray, " R"]:
    """Returns each row's score at its last token.

    Args:
      state: the policy's, after the tokens that are scored.
      fresh: rows whose score is asked for; others' mean nothing.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Frontier:
  """The rows of all problems between two steps.

  Attributes:
    state: the policy's.
    verifier: the verifier's state, or None.
    paths: one for each row.
    fresh: whether each row got tokens in the last step; others are idle.
    ledgers: one for each problem.
    started: when, in seconds of a clock.
  """

  state: Any
  verifier: Any
  paths: tuple[Path, ...]
  fresh: tuple[bool, ...]
  ledgers: tuple[Ledger, ...]
  started: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
  """A policy, and what judges its steps.

  Attributes:
    policy: whose rows pause at the ends of steps.
    verifier: scores steps; None: paths have no scores.
  """

  policy: Stepwise
  verifier: Verifier | StateVerifier | None = None

  @property
  def _reader(self) -> Verifier | None:
    """The verifier, if it has a state of its own."""
    return self.verifier if isinstance(self.verifier, Verifier) else None

  @functools.cached_property
  def _cost(self) -> ModelCost:
    return model_cost(self.policy.model)

  def prompt_cost(self, tokens: int) -> Ledger:
    """Returns what reading a prompt of so many tokens costs, once."""
    cost = prefill(self._cost, tokens)
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
      prompts: of the problems, token ids.
      max_new_tokens: of a path.
      copies: paths of a problem, one after the other.
      key: random key of the sampling; seed 0 by default.
    """
    began = time.perf_counter()
    state, drawn = self.policy.start(prompts, max_new_tokens, key, copies)
    paths = tuple(
      Path(problem=i, root=root, prompt=len(prompt))
      for i, prompt in enumerate(prompts)
      for root in range(copies)
    )
    ledgers = tuple(self.prompt_cost(len(prompt)) for prompt in prompts)
    judged = None
    if self._reader is not None:
      judged = self._reader.start(prompts, copies, max_new_tokens)
    fresh = (True,) * len(paths)
    frontier = Frontier(state, judged, paths, fresh, ledgers, began)
    return self._with_tokens(frontier, state, drawn)

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
      fresh=tuple(frontier.fresh[row] for row in rows),
    )

  def append(
    self,
    frontier: Frontier,
    tokens: Sequence[Sequence[int]],
    replace: Sequence[bool],
  ) -> Frontier:
    """Returns the frontier after tokens that were not drawn, as a step.

    Args:
      frontier: any; its buffers are used up.
      tokens: of each path, or none.
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
    cost, ledgers = self._cost, list(frontier.ledgers)
    paths = list(frontier.paths)
    for row, (own, lost) in enumerate(zip(tokens, replace, strict=True)):
      if not own:
        continue
      path = paths[row]
      *steps, last = path.steps
      kept = last[:-1] if lost else last
      before = path.prompt + len(path.tokens) - 1
      fed = len(own) - lost
      ledgers[path.problem] += Ledger(
        policy_decode_tokens=len(own),
        flops_policy=cost.forward(fed, Causal(before, fed), 0),
      )
      steps = (*steps, kept, tuple(own)) if kept else (*steps, tuple(own))
      paths[row] = dataclasses.replace(
        path, steps=tuple(steps), done=False, stopped=False
      )
    done = np.asarray(self.policy.done(state))
    paths = [
      dataclasses.replace(path, done=bool(end)) if own else path
      for path, end, own in zip(paths, done, tokens, strict=True)
    ]
    return dataclasses.replace(
      frontier, state=state, paths=tuple(paths), ledgers=tuple(ledgers)
    )

  def store(
    self, frontier: Frontier, new: Frontier, rows: Sequence[int]
  ) -> Frontier:
    """Returns the frontier with rows of `new` in place of some.

    Args:
      frontier: any; its buffers are used up.
      new: of the same problems, with what they have cost by now.
      rows: where each row of `new` goes; past the last row, nowhere.
    """
    judged = frontier.verifier
    if self._reader is not None:
      judged = self._reader.store(judged, new.verifier, rows)
    paths, fresh = list(frontier.paths), list(frontier.fresh)
    for row, path, own in zip(rows, new.paths, new.fresh, strict=True):
      if row < len(paths):
        paths[row], fresh[row] = path, own
    return dataclasses.replace(
      frontier,
      state=self.policy.store(frontier.state, new.state, rows),
      verifier=judged,
      paths=tuple(paths),
      fresh=tuple(fresh),
      ledgers=new.ledgers,
    )

  def end(self, frontier: Frontier, idle: Sequence[bool]) -> Frontier:
    """Returns the frontier with some rows idle from now on."""
    state = self.policy.end(frontier.state, np.array(idle))
    return dataclasses.replace(frontier, state=state)

  def _with_tokens(
    self, frontier: Frontier, state: Any, drawn: Drawn
  ) -> Frontier:
    new = np.asarray(drawn.tokens)
    paths = [
      self._longer(path, row, scores, bool(done))
      for path, row, scores, done in zip(
        frontier.paths,
        new,
        np.zeros(len(new)) if drawn.log_probs is None else drawn.log_probs,
        drawn.done,
        strict=True,
      )
    ]
    judged = frontier.verifier
    asked = self._asked(frontier.paths, new)
    if self.verifier is not None:
      fresh = (asked != NO_TOKEN).any(axis=1)
      if self._reader is None:
        found = self.verifier.score(state, fresh)
      else:
        judged, found = self._reader.read(judged, paths, asked)
      paths = [
        _scored(path, score) if own else path
        for path, score, own in zip(paths, found, fresh, strict=True)
      ]
    fresh = tuple(bool(x) for x in (new != NO_TOKEN).any(axis=1))
    return dataclasses.replace(
      frontier,
      state=state,
      verifier=judged,
      paths=tuple(paths),
      fresh=fresh,
      ledgers=self._costs(frontier, new, asked),
    )

  def _asked(
    self, paths: Sequence[Path], new: Int[np.ndarray, "R C"]
  ) -> Int[np.ndarray, "R C"]:
    """Returns the new tokens of steps, `NO_TOKEN` in other places.

    A stop token alone is no step, and has no score: it joins the step before.
    """
    ends = np.isin(new, [*self.policy.stop_tokens, NO_TOKEN]).all(axis=1)
    ends &= np.array([bool(path.steps) for path in paths])
    return np.where(ends[:, None], NO_TOKEN, new)

  def _longer(
    self, path: Path, row: Int[np.ndarray, " C"], log_probs: Any, done: bool
  ) -> Path:
    tokens = tuple(int(token) for token in row if token != NO_TOKEN)
    if not tokens:
      return path
    steps = *path.steps, tokens
    if path.steps and set(tokens) <= set(self.policy.stop_tokens):
      steps = *path.steps[:-1], path.steps[-1] + tokens
    return dataclasses.replace(
      path,
      steps=steps,
      log_prob=path.log_prob + float(np.sum(log_probs)),
      done=done,
      stopped=done and tokens[-1] in self.policy.stop_tokens,
    )

  def _costs(
    self,
    frontier: Frontier,
    new: Int[np.ndarray, "R C"],
    asked: Int[np.ndarray, "R C"],
  ) -> tuple[Ledger, ...]:
    """Returns the ledgers with the passes that drew and judged new tokens."""
    cost, ledgers = self._cost, list(frontier.ledgers)
    cached = [0] * len(ledgers)
    for path, row, step in zip(frontier.paths, new, asked, strict=True):
      count, before = int((row != NO_TOKEN).sum()), len(path.tokens)
      cached[path.problem] += before + count
      if not count:
        continue
      # A path's first token is drawn from its prompt's last state; the last
      # one of each step is fed when the next step begins.
      fed = count if path.steps else count - 1
      start = path.prompt + (before - 1 if path.steps else 0)
      now = Ledger(
        policy_decode_tokens=count,
        flops_policy=cost.forward(fed, Causal(start, fed), fed),
      )
      if self.verifier is not None and (step != NO_TOKEN).any():
        read = self.verifier.step_cost(path.prompt + before, count)
        now = now.alongside(read)
      ledgers[path.problem] += now
    seconds = time.perf_counter() - frontier.started
    prompts = {path.problem: path.prompt for path in frontier.paths}
    return tuple(
      dataclasses.replace(
        ledger,
        seconds=seconds,
        peak_cache_tokens=max(
          ledger.peak_cache_tokens, prompts.get(i, 0) + cached[i]
        ),
      )
      for i, ledger in enumerate(ledgers)
    )


def _scored(path: Path, score: Any) -> Path:
  if not np.isfinite(score):
    raise UserError(
      f"verifier: found the score {score} for problem {path.problem} after"
      f" {len(path.steps)} steps, expected a number"
    )
  return dataclasses.replace(path, scores=(*path.scores, float(score)))
