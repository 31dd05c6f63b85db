"""Searches against what they must reduce to, and their ledgers."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from research.generation import generate
from research.generation.boundary import Boundary
from research.generation.generated import NO_TOKEN
from research.generation.sampling import Sampling
from research.generation.stepwise import Stepwise
from research.nn.flops import Causal, model_cost
from research.prm.scores.aggregate import Product
from research.search import ledger as ledgers
from research.search.engine import Engine
from research.search.lookahead import Lookahead
from research.search.step_search import Limits, StepSearch
from research.search.strategies.beam import Beam
from research.search.strategies.diverse_trees import DiverseTrees
from research.search.strategies.independent import Independent
from research.search.strategies.rebase import Rebase
from research.typing import UserError
from tests import support

PROMPTS = [[5, 6, 7, 2, 9], [5, 1], [8, 8, 8]]
NEW, STEP = 11, 3
RULES = Sampling(temperature=1.2)
STOP = (3, 30, 40, 41, 50)


@functools.cache
def policy(kind=Stepwise, **fields):
  model = support.model("llama", tied=False)
  none = np.zeros((1, model.vocab_size), bool)
  boundary = Boundary(np.zeros_like(none, np.int32), none, np.int32(STEP))
  return kind(
    model=model,
    params=support.params(model),
    sampling=RULES,
    stop_tokens=STOP,
    boundary=boundary,
    **fields,
  )


def joined(path):
  """Whether a stop token came alone, and joined the step before it."""
  return path.stopped and len(path.steps[-1]) > STEP


def unread(path):
  """Whether its last token ends a text, of which it is no part."""
  return path.stopped and len(path.tokens) > 1


def score(tokens):
  """Returns an arbitrary score, 0 to 1, of a path's tokens."""
  return (hash(tuple(tokens)) % 1009) / 1009


@dataclasses.dataclass(frozen=True)
class Arbitrary:
  """Scores by a function of all tokens; counts what it reads."""

  cost: object = None
  value: object = score

  def prompt_cost(self, tokens):
    if self.cost is None:
      return ledgers.Ledger()
    return ledgers.verification(self.cost, tokens, [])

  def step_cost(self, start, tokens):
    if self.cost is None:
      return ledgers.Ledger()
    read = self.cost.forward(tokens, Causal(start, tokens), 1)
    return ledgers.Ledger(verifier_new_tokens=tokens, flops_verifier=read)

  def start(self, prompts, copies, max_new_tokens):
    return [0] * (len(prompts) * copies)

  def read(self, state, paths, new):
    counts = (new != NO_TOKEN).sum(axis=1).tolist()
    state = [n + k for n, k in zip(state, counts, strict=True)]
    for path, count in zip(paths, state, strict=True):
      # A stop token behind a text is not read.
      unread = len(path.tokens) - count
      assert unread == 0 or (unread == 1 and path.stopped)
    return state, np.array([self.value(path.tokens) for path in paths])

  def select(self, state, rows):
    return [state[row] for row in rows]

  def store(self, state, new, rows):
    state = list(state)
    for row, value in zip(rows, new, strict=True):
      if row < len(state):
        state[row] = value
    return state


def found(strategy, engine=None, prompts=PROMPTS, **limits):
  engine = engine or Engine(policy=policy(), verifier=Arbitrary())
  key = jax.random.key(2)
  return strategy(engine, prompts, Limits(tokens=NEW, key=key, **limits))


@functools.cache
def beam():
  return found(Beam(copies=4, width=2))


def tokens(samples):
  return [sorted(path.tokens for path in one.paths) for one in samples]


def test_independent_paths_are_generated_texts():
  """Token by token, and so is a beam of width 1."""
  it = policy()
  prompts = [prompt for prompt in PROMPTS for _ in range(4)]
  rows = generate.generate(
    *(it.model, it.params, prompts, NEW, RULES, jax.random.key(2), STOP)
  )
  engine = Engine(policy=policy())
  samples = found(Independent(copies=4), engine)
  for i, one in enumerate(samples):
    part = slice(4 * i, 4 * i + 4)
    assert sorted(
      path.tokens[:-1] if path.stopped else path.tokens for path in one.paths
    ) == sorted(map(tuple, rows.tokens[part]))
    reasons = ["stop" if path.stopped else "length" for path in one.paths]
    assert sorted(reasons) == sorted(rows.reasons[part])
  ends = {path.stopped for one in samples for path in one.paths}
  assert ends == {True, False}
  assert tokens(found(Beam(copies=4, width=1))) == tokens(samples)


def test_one_tree_is_a_beam_of_one():
  trees = found(DiverseTrees(copies=4, width=4))
  assert tokens(trees) == tokens(found(Beam(copies=4, width=4)))


@pytest.mark.slow
def test_a_beam_of_many_problems_is_that_of_each():
  alone = found(Beam(copies=4, width=2), prompts=PROMPTS[:1])
  assert tokens(alone) == tokens(beam())[:1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watched(StepSearch):
  """A strategy, and all that it was asked and said."""

  inner: object
  said: list = dataclasses.field(default_factory=list)

  def children(self, paths):
    counts = self.inner.children(paths)
    self.said.append((list(paths), list(counts)))
    return counts


@pytest.mark.parametrize(
  "strategy",
  [
    Beam(copies=4, width=2, prune=Product()),
    DiverseTrees(copies=4, width=2),
    Rebase(copies=4),
  ],
)
def test_the_best_go_on_and_their_children_differ(strategy):
  watched = Watched(inner=strategy, copies=4)
  samples = found(watched)
  for paths, counts in watched.said:
    kept = [path for path, n in zip(paths, counts, strict=True) if n]
    assert kept and sum(counts) <= 4
    if isinstance(strategy, DiverseTrees):
      for tree in {path.root // 2 for path in paths}:
        best = max(
          (path for path in paths if path.root // 2 == tree),
          key=lambda path: path.scores[-1],
        )
        assert best in kept
    elif isinstance(strategy, Beam):
      value = {id(path): np.prod(path.scores) for path in paths}
      best = sorted(value.values())[-2:]
      assert sorted(value[id(path)] for path in kept) == best
    else:
      order = np.argsort([path.scores[-1] for path in paths])
      assert (np.diff(np.array(counts)[order]) >= -1).all()
  for one in samples:
    assert len({path.tokens for path in one.paths}) == len(one.paths) >= 2
    for path in one.paths:
      assert len(path.scores) == len(path.steps)
      assert path.done == (path.stopped or len(path.tokens) == NEW)


def test_the_ledger_is_that_of_the_closed_forms():
  """Prompts once, each token once, the verifier's included."""
  cost = model_cost(policy().model)
  judge = dataclasses.replace(cost, head=policy().model.width)
  engine = Engine(policy=policy(), verifier=Arbitrary(cost=judge))
  for prompt, one in zip(
    PROMPTS, found(Independent(copies=4), engine), strict=True
  ):
    lengths = [len(path.tokens) for path in one.paths]
    ends = [np.cumsum([len(x) for x in path.steps]) for path in one.paths]
    for path, steps in zip(one.paths, ends, strict=True):
      steps[-1] -= unread(path)
    expected = ledgers.generation(cost, len(prompt), lengths).alongside(
      ledgers.verification(judge, len(prompt), [x.tolist() for x in ends])
    )
    for name in ("flops_policy", "flops_verifier", "policy_decode_tokens"):
      assert getattr(one.ledger, name) == getattr(expected, name), name
    assert one.ledger.policy_prefill_tokens == len(prompt)
    assert one.ledger.verifier_prefill_tokens == len(prompt)
    assert one.ledger.verifier_new_tokens == sum(x[-1] for x in ends)
    assert one.ledger.seconds > 0


def test_dropped_paths_are_paid_for():
  for prompt, one in zip(PROMPTS, beam(), strict=True):
    assert one.ledger.policy_prefill_tokens == len(prompt)
    texts = [path.tokens for path in one.paths]
    tree = {text[: i + 1] for text in texts for i in range(len(text))}
    assert one.ledger.policy_decode_tokens > len(tree)


@pytest.mark.slow
def test_a_step_is_worth_what_follows_it():
  """Against a greedy rollout of each path, alone; its cost is on the ledger."""
  it = policy()
  look = Lookahead(policy=it, verifier=Arbitrary(), steps=2)
  watched = Watched(inner=Beam(copies=4, width=2), copies=4)
  samples = found(watched, look)
  ahead = 2 * STEP
  for paths, _ in watched.said:
    for path in paths:
      prompt = [*PROMPTS[path.problem], *path.tokens]
      rows = generate.generate(
        *(it.model, it.params, [prompt], min(ahead, NEW - len(path.tokens))),
        stop_tokens=STOP,
      )
      (more,) = rows.tokens
      texts = [(*path.tokens, *more)]
      if rows.reasons == ["stop"] and len(more) % STEP:
        texts = [(*texts[0], stop) for stop in STOP]
      assert path.scores[-1] in [score(text) for text in texts]
  plain = found(Beam(copies=4, width=2))
  for one, other in zip(samples, plain, strict=True):
    assert one.ledger.policy_decode_tokens > other.ledger.policy_decode_tokens


def test_steps_ahead_are_in_the_cache_beside_the_paths():
  it = dataclasses.replace(policy(), stop_tokens=())
  look = Lookahead(policy=it, verifier=Arbitrary(), steps=1)
  samples = found(Independent(copies=2), look)
  ends = [*range(STEP, NEW, STEP), NEW]
  most = max(x + min(x + STEP, NEW) for x in ends if x < NEW)
  for prompt, one in zip(PROMPTS, samples, strict=True):
    # Two paths and the two of the rollouts; each row has the prompt.
    assert one.ledger.peak_cache_tokens == 2 * (2 * len(prompt) + most)


def test_the_peak_is_what_is_in_the_cache():
  """Each row has its prompt."""
  it = dataclasses.replace(policy(), stop_tokens=())
  samples = found(Independent(copies=3), Engine(policy=it))
  for prompt, one in zip(PROMPTS, samples, strict=True):
    new = 3 * NEW
    assert one.ledger.peak_cache_tokens == 3 * len(prompt) + new


def test_steps_are_capped():
  samples = found(Independent(copies=2), steps=2)
  steps = [len(path.steps) for one in samples for path in one.paths]
  assert max(steps) == 2 and len(steps) == 6
  assert not all(path.done for one in samples for path in one.paths)


class Greedy(StepSearch):
  """Asks for more than it has."""

  def children(self, paths):
    return [2] * len(paths)


@pytest.mark.parametrize(
  ("engine", "strategy", "message"),
  [
    (
      Engine(policy=policy()),
      Beam(copies=2, width=2),
      "found no verifier",
    ),
    (
      Engine(policy=policy(), verifier=Arbitrary(value=lambda _: np.nan)),
      Independent(copies=2),
      "found the score nan for problem 0 after 1 steps",
    ),
    (None, Greedy(copies=2), r"Greedy: found \[2, 2\] children of 2 paths"),
  ],
)
def test_what_cannot_be_searched_is_an_error(engine, strategy, message):
  with pytest.raises(UserError, match=message):
    found(strategy, engine)


def test_settings_are_checked():
  with pytest.raises(UserError, match="width is 3"):
    Beam(copies=4, width=3)
