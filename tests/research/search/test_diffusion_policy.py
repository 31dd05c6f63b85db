"""Searches over a diffusion policy: the plain sampler, and enumerations."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.diffusion.sampling import layout, sampler
from research.diffusion.sampling.block_causal import BlockCausal
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.delayed_kv_cache import DelayedKVCache
from research.diffusion.sampling.denoiser import BlockCache, NoCache
from research.diffusion.sampling.policies import Threshold
from research.diffusion.sampling.prefix_cache import PrefixCache
from research.generation.sampling import Sampling
from research.nn import flops
from research.nn.flops import Dense, model_cost
from research.search.block_rows import BlockRows
from research.search.diffusion_cost import Blockwise, DenoiserCost, Passes
from research.search.diffusion_policy import DiffusionPolicy, GeneratedBlocks
from research.search.engine import Engine
from research.search.ledger import Ledger
from research.search.policy import Frontier, Path
from research.search.step_search import Limits
from research.search.strategies import remasking
from research.search.strategies.beam import Beam
from research.search.strategies.diverse_trees import DiverseTrees
from research.search.strategies.independent import Independent
from research.search.strategies.remasking import (
  AllButBest,
  BelowThreshold,
  Remasking,
)
from research.search.strategies.tree import TreeSearch
from research.typing import UserError
from tests import support
from tests.research.diffusion import joint
from tests.research.search.test_search import Arbitrary, score, tokens
from tests.research.search.test_search import policy as autoregressive

V, K, NEW, COPIES = 24, 4, 12, 4
MASK, END = V - 1, (3, 11, 17)
# One ends where a block does, two within one.
PROMPTS = [[5, 6, 7, 2, 9], [5, 1], [8, 8, 8, 1]]
KEY = jax.random.key(2)


@functools.cache
def network():
  model = support.model("llama", depth=2, hidden=32, vocab=V)
  return model, support.params(model)


@functools.cache
def policy(kind):
  model, params = network()
  denoiser = {
    "full": NoCache(model=model),
    "blocks": NoCache(model=model, block=K),
    "cached blocks": BlockCausal(model=model, block=K),
  }[kind]
  config = SamplerConfig(
    mask_id=MASK,
    end=END,
    length=K,
    block=K,
    policy=Threshold(threshold=0.2),
  )
  sampling = Sampling(temperature=3.0)
  return DiffusionPolicy(
    denoiser=denoiser, params=params, config=config, sampling=sampling
  )


def found(strategy, kind, **fields):
  engine = Engine(policy=policy(kind), verifier=Arbitrary())
  limits = Limits(tokens=NEW, key=KEY, **fields)
  return strategy(engine, PROMPTS, limits)


@functools.cache
def plain(kind):
  """Returns the sampler's rows, and the passes of each in every block."""
  it, blocks = policy(kind), []
  unit = 1 if kind == "full" else K
  rows = [
    [*prompt, *[MASK] * (NEW - len(prompt) % unit)]
    for prompt in PROMPTS
    for _ in range(COPIES)
  ]
  width = layout.width(4 if unit == K else 5, NEW, unit)
  padded = layout.pad_rows(rows, MASK, NEW, width, unit)
  state = sampler.begin(padded.tokens, padded.masked, padded.valid, KEY)
  config = dataclasses.replace(it.config, length=NEW)
  made = sampler.sample(
    *(it.denoiser, it.params, state, config, it.sampling),
    look=lambda state: blocks.append(np.asarray(state.count)),
  )
  texts = []
  for row, masked in zip(made.tokens, padded.masked, strict=True):
    own = row[masked].tolist()
    ends = [i for i, token in enumerate(own) if token in END]
    texts.append(tuple(own[: ends[0] + 1] if ends else own))
  return texts, np.diff(blocks, axis=0, prepend=0).T


@pytest.mark.slow
@pytest.mark.parametrize(
  "kind", [pytest.param("full", marks=pytest.mark.slow), "cached blocks"]
)
def test_independent_paths_are_the_samplers_rows(kind):
  texts, passes = plain(kind)
  samples = found(Independent(copies=COPIES), kind)
  assert {text[-1] in END for text in texts} == {True, False}
  it = policy(kind)
  cost, unit = model_cost(it.denoiser.model), 1 if kind == "full" else K
  for i, (prompt, one) in enumerate(zip(PROMPTS, samples, strict=True)):
    part = slice(COPIES * i, COPIES * (i + 1))
    assert sorted(path.tokens for path in one.paths) == sorted(texts[part])
    for path in one.paths:
      assert path.done and path.stopped == (path.tokens[-1] in END)
      assert path.log_prob < 0
    # Every pass of every row, by what it reads.
    whole = len(prompt) // unit * unit
    spent, row = 0, len(prompt) + NEW
    if unit == K:
      spent = cost.forward(whole, Blockwise(whole, K), 0)
    for counts in passes[part]:
      for block, count in enumerate(counts):
        start = whole + block * K
        each = cost.forward(K, Dense(K, start + K), K)
        if unit == 1:
          each = cost.forward(row, Dense(row, row), K)
        elif block and count:
          spent += cost.forward(K, Dense(K, start), 0)
        spent += int(count) * each
    assert one.ledger.flops_policy == spent
    written = sum(len(path.tokens) for path in one.paths)
    assert one.ledger.policy_decode_tokens == written
    assert one.ledger.policy_prefill_tokens == len(prompt)
    if unit == 1:
      assert one.ledger.peak_cache_tokens == 0


def test_known_searches_run_over_blocks():
  run = functools.partial(found, kind="cached blocks")
  assert tokens(run(Beam(copies=4, width=1))) == tokens(
    run(Independent(copies=4))
  )
  one = run(Beam(copies=4, width=4))
  assert tokens(run(DiverseTrees(copies=4, width=4))) == tokens(one)
  for prompt, samples in zip(
    PROMPTS, run(Beam(copies=4, width=2)), strict=True
  ):
    texts = [path.tokens for path in samples.paths]
    assert len(set(texts)) == len(texts) >= 2
    lengths = [len(x) for path in samples.paths for x in path.steps]
    assert max(lengths) in (K, K + 1)  # with a stop token that came alone
    for path in samples.paths:
      assert len(path.scores) == len(path.steps)
      room = NEW - len(prompt) % K
      assert path.stopped or len(path.tokens) == room


@pytest.mark.slow
def test_rows_at_different_blocks_have_their_own_cache():
  """A tree over a cache of blocks is that over whole rows, which have none."""
  tree = TreeSearch(simulations=3, width=COPIES)
  cached, whole = found(tree, "cached blocks"), found(tree, "blocks")
  assert tokens(cached) == tokens(whole)
  depths = {len(path.steps) for one in cached for path in one.paths}
  assert len(depths) > 1


# What a pass costs -----------------------------------------------------------


def traced(denoiser, at, rows=3, length=16):
  """Returns the FLOPs of a block's first pass and a later one, of all rows."""
  model, _ = network()
  config = dataclasses.replace(policy("full").config, end=())
  state = sampler.begin(
    np.zeros((rows, length), np.int32),
    np.ones((rows, length), bool),
    np.ones((rows, length), bool),
    KEY,
  )
  params = support.shapes(model)
  memory = None
  if denoiser.caches_finished:
    memory = jax.eval_shape(
      lambda p: sampler.cache_finished(denoiser, p, state, at, K, None), params
    )
  return flops.count_flops(
    lambda p, m: sampler.fill_block(
      denoiser, p, state, at, config, Sampling(), m
    )[0],
    params,
    memory,
  )


@pytest.mark.parametrize(
  ("kind", "fields", "at"),
  [
    (NoCache, {}, 4),
    (BlockCache, {}, 8),
    (BlockCache, dict(before=1, after=2), 8),
    (PrefixCache, {}, 0),
    (BlockCausal, dict(block=K), 12),
  ],
)
def test_a_block_costs_what_its_program_multiplies(kind, fields, at):
  model, _ = network()
  denoiser = kind(model=model, **fields)
  one = DenoiserCost(denoiser).block(Passes(16, at, K, count=2, read=0))
  assert traced(denoiser, jnp.int32(at)) == 3 * one
  more = DenoiserCost(denoiser).block(Passes(16, at, K, count=5, read=0))
  again = DenoiserCost(denoiser).block(Passes(16, at, K, count=4, read=0))
  last = DenoiserCost(denoiser).block(Passes(16, at, K, count=3, read=0))
  assert more - again == again - last == last - one


def test_a_cache_of_blocks_reads_each_once():
  model, params = network()[0], support.shapes(network()[0])
  denoiser, cost = BlockCausal(model=model, block=K), model_cost(model)
  state = sampler.begin(
    np.zeros((1, 16), np.int32),
    np.ones((1, 16), bool),
    np.ones((1, 16), bool),
    KEY,
  )

  def read(params, memory):
    return sampler.cache_finished(
      denoiser, params, state, jnp.int32(12), K, memory
    )

  # Padding and masked pairs are computed as well.
  prompt = flops.count_flops(read, params, None)
  assert prompt == cost.forward(16, Dense(16, 16), 0)
  memory = jax.eval_shape(read, params, None)
  block = flops.count_flops(read, params, memory)
  assert block == cost.forward(K, Dense(K, 16), 0)
  counted = DenoiserCost(denoiser)
  assert counted.prompt(16) == cost.forward(16, Blockwise(16, K), 0) < prompt
  read_too = counted.block(Passes(16, 12, K, 1, read=K))
  alone = counted.block(Passes(16, 12, K, 1, read=0))
  assert read_too - alone == cost.forward(K, Dense(K, 12), 0) < block


@pytest.mark.parametrize("n", [0, 3, 4, 9])
def test_pairs_of_blocks_are_counted_one_by_one(n):
  assert Blockwise(n, 4).pairs(None) == sum(
    min((i // 4 + 1) * 4, n) for i in range(n)
  )


# Masked again ----------------------------------------------------------------


class Table(NoCache):
  """Exact conditionals of a joint distribution of four places."""

  def prefill(self, params, tokens, valid, start, size):
    return joint.scores()(tokens[:, -size:]), ()


@functools.cache
def exact():
  """Returns a policy that samples the joint, place by place, in any order."""
  config = SamplerConfig(
    mask_id=joint.MASK, length=4, block=4, steps=4, select="random"
  )
  return DiffusionPolicy(
    denoiser=Table(model=support.model("llama", vocab=4)),
    params={},
    config=config,
    sampling=Sampling(temperature=1.0),
  )


def frequencies(texts):
  """Returns how often each of `joint.SEQUENCES` occurs."""
  counts = collections.Counter(map(tuple, texts))
  total = sum(counts.values())
  return np.array([counts[tuple(x)] / total for x in joint.SEQUENCES.tolist()])


def distance(p, q):
  """Returns the total variation."""
  return 0.5 * np.abs(p - q).sum()


def test_rejected_blocks_are_drawn_from_the_model_again():
  """A chain over all 81 blocks, worked out by its matrix."""
  value = np.array([score(x) for x in joint.SEQUENCES.tolist()])
  first = joint.table()
  better = value[None] > value[:, None]
  move = np.where(better & (value < 0.7)[:, None], first, 0.0)
  move += np.diag(1 - move.sum(1))
  expected = first @ np.linalg.matrix_power(move, 2)
  assert distance(first, expected) > 0.25
  strategy = Remasking(
    inner=Independent(copies=1200), rejects=BelowThreshold(0.7), rounds=2
  )
  engine = Engine(policy=exact(), verifier=Arbitrary())
  (one,) = strategy(engine, [[0]], Limits(tokens=4, key=KEY))
  # Its mean for 1200 draws of 81 is at most sqrt(81 / (2 pi 1200)) = 0.104.
  assert distance(frequencies([x.tokens for x in one.paths]), expected) < 0.115
  # Each round is a draw of its own: 5 standard errors.
  good = np.mean([path.scores[0] >= 0.7 for path in one.paths])
  chance = expected[value >= 0.7].sum()
  assert abs(good - chance) < 5 * (chance * (1 - chance) / 1200) ** 0.5
  # A pass fills one place: 4 of a block, for each time that it was drawn.
  rejected = (first[value < 0.7]).sum()
  stay = first @ move
  rounds = 1 + rejected + stay[value < 0.7].sum()
  each = exact().steps([one.paths[0]], drawn(4))[0].flops_policy
  spent = one.ledger.flops_policy / (1200 * each)
  assert spent == pytest.approx(rounds, rel=0.05)


def drawn(count):
  passes = [Passes(row=5, start=1, block=4, count=count, read=0)]
  return GeneratedBlocks(
    np.zeros((1, 4), np.int32), np.ones(1, bool), None, passes
  )


@pytest.mark.parametrize(
  ("percent", "size"), [(60, 25), (30, 50), (30, 100), (1, 32), (100, 32)]
)
def test_a_share_of_a_block_is_rounded_up(percent, size):
  ones = np.ones((1, size), bool)
  rows = sampler.begin(np.zeros((1, size), int), ones, ones, KEY)
  at, prompt = np.array([size]), np.array([0])
  blocks = BlockRows(rows, 0, at, ones[0, :1], None, prompt)
  made = blocks.masked_again(
    ones[0, :1], percent / 100, MASK, size, np.array([], np.int32), 0
  )
  count = int((made.rows.tokens == MASK).sum())
  assert count == -(-percent * size // 100)


def test_what_is_sure_stays_and_the_rest_is_conditioned_on_it():
  it, copies = exact(), 4000
  before, made = it.start([[0]], 4, KEY, copies)
  which = np.arange(copies) % 4 < 3
  masked = it.remask(before, which.tolist(), 0.5)
  again = np.asarray(masked.rows.masked)[:, -4:]
  confidence = np.asarray(before.rows.confidence)[:, -4:]
  assert (again.sum(1) == np.where(which, 2, 0)).all()
  most = np.where(again, confidence, -1).max(1)
  least = np.where(again, 2, confidence).min(1)
  assert (most <= least).all()
  after, more = it.advance(masked)
  assert ((more.tokens >= 0).any(1) == which).all()
  counts = np.asarray(after.rows.count) - np.asarray(before.rows.count)
  assert (counts == np.where(which, 2, 0)).all()
  stays = ~again & which[:, None]
  assert (more.tokens[stays] == made.tokens[stays]).all()
  # Of rows with the same tokens left, the others follow the conditional.
  shown = np.where(again, joint.MASK, made.tokens)[which]
  (most_frequent, n), *_ = collections.Counter(map(tuple, shown)).most_common(1)
  own = (shown == most_frequent).all(1)
  fits = np.array(most_frequent) != joint.MASK
  given = (joint.SEQUENCES[:, fits] == np.array(most_frequent)[fits]).all(1)
  expected = np.where(given, joint.table(), 0)
  got = frequencies(more.tokens[which][own])
  assert n > 200
  # Nine outcomes: sqrt(9 / (2 pi 200)) = 0.085 on average at most.
  assert distance(got, expected / expected.sum()) < 0.12


def test_blocks_are_never_worse_and_the_best_stay():
  kind = "cached blocks"
  before = found(Independent(copies=COPIES), kind)
  after = found(
    Remasking(
      inner=Independent(copies=COPIES),
      rejects=AllButBest(1),
      rounds=2,
      share=0.5,
    ),
    kind,
  )
  changed = 0
  for prompt, old, new in zip(PROMPTS, before, after, strict=True):

    def first_block(path, size=K - len(prompt) % K):
      # A stop token that came alone has joined it.
      return path.steps[0][:size]

    first = {path.root: path for path in old.paths}
    best = max(old.paths, key=lambda path: path.scores[0])
    for path in new.paths:
      same = first_block(path) == first_block(first[path.root])
      assert path.scores[0] == score(first_block(path))
      assert same or path.scores[0] > first[path.root].scores[0]
      changed += not same
      assert path.root != best.root or same
    assert new.ledger.flops_policy > old.ledger.flops_policy
    written = sum(len(path.tokens) for path in new.paths)
    assert new.ledger.policy_decode_tokens > written
  assert changed
  # A search goes on from what was masked again.
  beam = Remasking(
    inner=Beam(copies=COPIES, width=2), rejects=BelowThreshold(0.6)
  )
  for one in found(beam, kind):
    assert all(path.done for path in one.paths)
    assert len({path.tokens for path in one.paths}) == len(one.paths)
  none = Remasking(inner=Independent(copies=COPIES), rounds=0)
  assert tokens(found(none, kind)) == tokens(before)


class Rows:
  """A policy whose rows have no state."""

  stop_tokens = ()
  begin = start = advance = select = append = done = end = lambda *_: None
  remask = store = lambda self, state, *_: state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scripted(Engine):
  """One row whose blocks, and their scores, are known.

  Attributes:
    blocks: in their order; the score of an end alone is None.
  """

  blocks: list

  def advance(self, frontier):
    (path,) = frontier.paths
    block, score = self.blocks.pop(0)
    steps, scores = (*path.steps, block), (*path.scores, score)
    if score is None:
      steps = (*path.steps[:-1], path.steps[-1] + block)
      scores = path.scores
    path = dataclasses.replace(path, steps=steps, scores=scores)
    return dataclasses.replace(frontier, paths=(path,), advanced=(True,))

  def end(self, frontier, idle):
    return frontier


@pytest.mark.parametrize(
  ("blocks", "kept"),
  [
    ([((1,), 0.3), ((2,), 0.4)], 2),
    # An end is no better block for the score of the step before it.
    ([((1,), 0.3), ((9,), None)], 1),
    ([((9,), None), ((1,), 0.75)], 9),
  ],
)
def test_an_end_alone_has_no_score_to_be_kept_or_rejected_by(blocks, kept):
  search = Remasking(rejects=BelowThreshold(0.8), rounds=1)
  inner = Scripted(policy=Rows(), blocks=list(blocks))
  engine = remasking._Engine(
    policy=Rows(), verifier=Arbitrary(), inner=inner, search=search
  )
  path = Path(problem=0, root=0, prompt=1, steps=((5,),), scores=(0.7,))
  begin = Frontier(None, [0], (path,), (True,), (Ledger(),), 0.0)
  assert engine.advance(begin).paths[0].tokens == (5, kept)


# Mistakes --------------------------------------------------------------------


def changed(**fields):
  return dataclasses.replace(policy("full"), **fields)


def blocks_of(size):
  return dataclasses.replace(policy("full").config, length=size, block=size)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: policy("full").start([[1]], 6), "found 6, expected a multiple"),
    (lambda: policy("full").start([[1]], 4, copies=0), "copies: found 0"),
    (lambda: policy("full").start([[MASK]], 4), "holds the mask"),
    (lambda: policy("full").start([[V]], 4), "found token 24"),
    (
      lambda: changed(
        denoiser=DelayedKVCache(model=network()[0], mask_id=MASK)
      ),
      "found DelayedKVCache",
    ),
    (
      lambda: changed(
        denoiser=BlockCausal(model=network()[0], block=K), config=blocks_of(8)
      ),
      "expected the model's blocks of 4",
    ),
    (lambda: changed(config=SamplerConfig()), "mask_id is None"),
    (
      lambda: changed(sampling=Sampling(repetition_penalty=1.2)),
      "repetition_penalty is 1.2, expected None",
    ),
    (lambda: policy("full").append(None, [[1]], [False]), "autoregressive one"),
    (
      lambda: exact().remask(exact().begin([[0]], 4), [True]),
      "no finished block in row 0",
    ),
    (
      lambda: exact().remask(exact().begin([[0]], 4), [False], 0.0),
      "share is 0.0",
    ),
    (
      lambda: Remasking()(
        Engine(policy=autoregressive()), PROMPTS, Limits(tokens=4)
      ),
      "found the policy Stepwise",
    ),
    (
      lambda: Remasking()(Engine(policy=exact()), [[0]], Limits(tokens=4)),
      "found no verifier",
    ),
  ],
)
def test_mistakes(make, message):
  with pytest.raises(UserError, match=message):
    make()
