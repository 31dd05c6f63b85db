"""Monte Carlo tree search with a process reward model in place of rollouts.

A step is an action. Each simulation goes down from the problem by PUCT (Silver
et al. 2017, arXiv:1712.01815), expands the step where it ends by `width` next
steps at once, and adds their scores to all steps above. All problems simulate
together. Every step's cache is stored, so no text is read twice.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from research.prm.scores.aggregate import Aggregate, Last
from research.ranges import NonNegativeInt, PositiveInt, Ranged
from research.search.engine import Engine, Frontier, Path
from research.search.step_search import Limits, Samples, check_scores
from research.typing import Int, UserError


class Node:
  """A step of the tree, or the problem itself, which has no path.

  Attributes:
    path: solution up to this step.
    slot: row of its state.
    prior: the policy's probability, among its siblings.
    visits: evaluations below it, its own included.
    total: sum of their scores.
    children: next steps.
  """

  def __init__(
    self, path: Path | None = None, slot: int = -1, prior: float = 1.0
  ):
    """Creates a step without visits."""
    self.path, self.slot, self.prior = path, slot, prior
    self.visits, self.total = 0, 0.0
    self.children: list[Node] = []

  def walk(self) -> Iterator["Node"]:
    """Yields this node and all below it."""
    yield self
    for child in self.children:
      yield from child.walk()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeSearch(Ranged):
  """MCTS over steps.

  Attributes:
    simulations: number of them after the first expansion.
    width: next steps that an expansion adds.
    base, init: constants of PUCT's exploration: it grows with `log((visits +
      base + 1) / base) + init`.
    prune: makes one score, 0 to 1, of a path's steps.
  """

  needs_scores: ClassVar[bool] = True
  simulations: NonNegativeInt = 16
  width: PositiveInt = 4
  base: float | int = 19_652
  init: float | int = 1.25
  prune: Aggregate = Last()

  def __call__(
    self, engine: Engine, prompts: Sequence[Sequence[int]], limits: Limits
  ) -> list[Samples]:
    """Returns the paths that ended, or else the best one; see `Strategy`."""
    check_scores(self, engine)
    first = engine.start(prompts, limits.tokens, self.width, limits.key)
    if any(path.log_prob is None for path in first.paths):
      raise UserError(
        "TreeSearch: found paths without log-probabilities, expected some for"
        " the priors of steps: set Stepwise.log_probs"
      )
    room = self.width * (1 + self.simulations)
    stored = engine.select(first, *_spread(len(prompts), self.width, room))
    roots = [Node() for _ in prompts]
    for i, root in enumerate(roots):
      slots = range(i * room, i * room + self.width)
      self._expand([root], [(s, stored.paths[s]) for s in slots])
    peaks = _cached(stored)
    for k in range(1, 1 + self.simulations):
      lines = [self._descend(root) for root in roots]
      at = [i * room + k * self.width for i in range(len(roots))]
      stored, more = self._simulate(engine, stored, lines, at, limits)
      peaks = np.maximum(peaks, more)
    return [
      _samples(
        root,
        self.prune,
        dataclasses.replace(ledger, peak_cache_tokens=int(peak)),
      )
      for root, ledger, peak in zip(roots, stored.ledgers, peaks, strict=True)
    ]

  def _descend(self, root: Node) -> list[Node]:
    """Returns the nodes from the root to one without children."""
    line = [root]
    while line[-1].children:
      line.append(max(line[-1].children, key=self._bound(line[-1])))
    return line

  def _bound(self, parent: Node):
    growth = math.log((parent.visits + self.base + 1) / self.base) + self.init

    def bound(node: Node) -> float:
      explore = growth * math.sqrt(parent.visits) / (1 + node.visits)
      return node.total / node.visits + node.prior * explore

    return bound

  def _simulate(
    self,
    engine: Engine,
    stored: Frontier,
    lines: Sequence[list[Node]],
    at: Sequence[int],
    limits: Limits,
  ) -> tuple[Frontier, Int[np.ndarray, " P"]]:
    """Expands the last node of each line, or visits it again if it ended.

    Returns:
      All nodes, and each problem's tokens in the cache while they grew.
    """
    opened = [
      not line[-1].path.done and len(line[-1].path.steps) < limits.steps
      for line in lines
    ]
    rows = [line[-1].slot for line in lines for _ in range(self.width)]
    branch = list(range(self.width)) * len(lines)
    now = engine.select(stored, rows, branch)
    idle = [not x for x in opened for _ in range(self.width)]
    now = engine.advance(engine.end(now, idle))
    cached = _cached(stored) + _cached(now)
    nowhere, slots = len(stored.paths), []
    for i, (line, begin) in enumerate(zip(lines, at, strict=True)):
      if not opened[i]:
        slots += [nowhere] * self.width
        self._visit(line)
        continue
      new_slots = range(begin, begin + self.width)
      slots += new_slots
      paths = now.paths[i * self.width : (i + 1) * self.width]
      self._expand(line, list(zip(new_slots, paths, strict=True)))
    return engine.store(stored, now, slots), cached

  def _visit(self, line: Sequence[Node]) -> None:
    value = self.prune.weight(line[-1].path.scores)
    for node in line:
      node.visits, node.total = node.visits + 1, node.total + value

  def _expand(
    self, line: Sequence[Node], made: Sequence[tuple[int, Path]]
  ) -> None:
    """Adds children to the last node of a line, and their scores to all."""
    parent = line[-1]
    likely = [_likelihood(parent.path, path) for _, path in made]
    for (slot, path), weight in zip(made, likely, strict=True):
      node = Node(path, slot, weight / sum(likely))
      parent.children.append(node)
      self._visit([*line, node])


def _spread(
  problems: int, width: int, room: int
) -> tuple[list[int], list[int]]:
  """Returns the rows and branches that give each problem room for its nodes."""
  rows = [
    i * width + min(k, width - 1) for i in range(problems) for k in range(room)
  ]
  branch = [max(0, k - width + 1) for _ in range(problems) for k in range(room)]
  return rows, branch


def _new_tokens(parent: Path | None, path: Path) -> int:
  return len(path.tokens) - (0 if parent is None else len(parent.tokens))


def _likelihood(parent: Path | None, path: Path) -> float:
  """Returns the geometric mean of the new tokens' probabilities."""
  before = 0.0 if parent is None else parent.log_prob
  return math.exp((path.log_prob - before) / _new_tokens(parent, path))


def _cached(frontier: Frontier) -> Int[np.ndarray, " P"]:
  """Returns each problem's tokens in the cache, where a row has its prompt."""
  tokens = np.zeros(len(frontier.ledgers), int)
  for path in frontier.paths:
    tokens[path.problem] += path.prompt + len(path.tokens)
  return tokens


def _samples(root: Node, prune: Aggregate, ledger) -> Samples:
  paths = [node.path for node in root.walk() if node.path is not None]
  ended = [path for path in paths if path.done]
  best = max(paths, key=lambda path: prune(path.scores))
  return Samples(tuple(ended) or (best,), ledger)
