"""Reward models as verifiers, against reading every text from its beginning."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.generation import decoding
from research.generation.sampling import GREEDY
from research.nn import flops
from research.nn.flops import Cached, Causal, Dense, model_cost
from research.prm.heads import LinearHead, MlpHead
from research.prm.model import GenerativeReward, RewardModel, log_odds
from research.search import cached_verifier, reward_verifiers
from research.search.engine import Engine
from research.search.reward_verifiers import (
  PolicyProbe,
  StepScore,
  verifier_of,
)
from research.search.step_search import Limits
from research.search.strategies.beam import Beam
from research.typing import UserError
from tests import support
from tests.research.search import test_search as shared


@functools.cache
def reward(head=LinearHead()):
  """Returns a reward model on the policy's own weights, and its parameters."""
  backbone = support.model("llama", tied=False)
  model = RewardModel(backbone=backbone, head=head)
  params = model.with_new_head(support.params(backbone), jax.random.key(3))
  # A head of zeros would call everything even.
  own = jax.tree.map(
    lambda x: x + 0.3 * jnp.cos(jnp.arange(x.size)).reshape(x.shape),
    params["score"],
  )
  return model, params | {"score": own}


def searched(verifier):
  engine = Engine(policy=shared.policy(), verifier=verifier)
  limits = Limits(tokens=shared.NEW, key=jax.random.key(2))
  return Beam(copies=4, width=2)(engine, shared.PROMPTS, limits)


def whole(model, params, paths):
  """Returns the scores of paths that are read from their beginnings, alone."""
  tokens = np.zeros((len(paths), 20), np.int32)
  steps = np.full((len(paths), shared.NEW), -1, np.int32)
  for row, ends, path in zip(tokens, steps, paths, strict=True):
    prompt = shared.PROMPTS[path.problem]
    text = [*prompt, *path.tokens]
    row[: len(text)] = text
    own = len(prompt) + np.cumsum([len(step) for step in path.steps])
    # Training has texts, of which a stop token is no part.
    own[-1] -= shared.unread(path)
    ends[: len(own)] = own - 1
  found = np.asarray(model.scores(params, tokens, steps))
  return [
    row[: len(path.steps)] for row, path in zip(found, paths, strict=True)
  ]


def test_scores_are_the_reward_models():
  model, params = reward()
  paths = [
    path for one in searched(verifier_of(model, params)) for path in one.paths
  ]
  expected = whole(model, params, paths)
  for path, scores in zip(paths, expected, strict=True):
    np.testing.assert_allclose(path.scores, scores, rtol=2e-4)
  every = np.concatenate(expected)
  assert every.std() > 0.05


def test_a_probe_scores_as_its_whole_model_does():
  """On the policy's weights both are one model; a step costs one token."""
  model, params = reward()
  probe = PolicyProbe(
    policy=shared.policy(),
    head=StepScore(model),
    params=params,
    outputs=model.outputs,
  )
  samples, read = searched(probe), searched(verifier_of(model, params))
  for one, other in zip(samples, read, strict=True):
    assert [x.tokens for x in one.paths] == [x.tokens for x in other.paths]
    for path, same in zip(one.paths, other.paths, strict=True):
      np.testing.assert_allclose(path.scores, same.scores, rtol=2e-4)
    assert one.ledger.verifier_prefill_tokens == 0
    assert one.ledger.verifier_new_tokens < other.ledger.verifier_new_tokens
    assert one.ledger.flops_verifier < other.ledger.flops_verifier / 2


def test_a_probe_has_no_pages():
  model, params = reward()
  probe = PolicyProbe(
    policy=shared.policy(), head=StepScore(model), params=params
  )
  with pytest.raises(UserError, match="pages cannot be read"):
    probe.score({"pages": 3}, np.ones(2, np.int32))


def test_equal_heads_share_programs():
  model, params = reward()
  searched(verifier_of(model, params))
  before = cached_verifier._read._cache_size()
  again = dataclasses.replace(model)
  assert StepScore(again) == StepScore(model)
  searched(verifier_of(again, params))
  assert cached_verifier._read._cache_size() == before


@pytest.mark.parametrize(
  "made",
  [
    functools.partial(RewardModel, head=LinearHead()),
    functools.partial(RewardModel, head=MlpHead()),
    functools.partial(GenerativeReward, right=3, wrong=4),
  ],
  ids=["linear", "mlp", "generative"],
)
def test_the_ledger_is_what_the_programs_multiply(made):
  """Of a step of several tokens with a cache, and of a probe's one token."""
  rows, prompt, step, capacity = 3, 7, 16, 32
  backbone = support.model("llama", tied=False)
  model = made(backbone=backbone)
  params = jax.eval_shape(model.init, jax.random.key(0))
  head = StepScore(model)
  cost = model_cost(backbone, model.outputs)
  tokens = jax.ShapeDtypeStruct((rows, step), jnp.int32)
  counts = jax.ShapeDtypeStruct((rows,), jnp.int32)
  start = functools.partial(
    cached_verifier._start, backbone, capacity=capacity, copies=1
  )
  state = jax.eval_shape(start, params, tokens, counts)
  first = flops.count_flops(start, params, tokens, counts)
  assert first == rows * cost.forward(step, Dense(step, step), 0)

  def read(params, state, tokens, counts):
    return cached_verifier._read(
      backbone, params, state, counts, tokens, counts, head
    )

  found = flops.count_flops(read, params, state, tokens, counts)
  assert found == rows * cost.forward(step, Cached(step, capacity), 1)
  # What is needed is that without masked pairs: what the ledger says.
  verifier = verifier_of(model, params)
  masked = sum(
    4
    * x.heads_width
    * (
      Cached(step, capacity).pairs(x.window)
      - Causal(prompt, step).pairs(x.window)
    )
    for x in cost.layers
  )
  ledger = verifier.step_cost(prompt, step)
  assert ledger.flops_verifier == found / rows - masked

  policy = jax.eval_shape(
    lambda p, t, n: decoding.prefill(
      backbone,
      p,
      t,
      n,
      GREEDY,
      jax.random.key(0),
      jnp.arange(rows),
      n,
      jnp.zeros(8, jnp.int32),
      capacity,
    )[0],
    params,
    tokens,
    counts,
  )

  def probe(params, state, fresh):
    return reward_verifiers._probe(backbone, params, params, state, fresh, head)

  fresh = jax.ShapeDtypeStruct((rows,), jnp.int32)
  found = flops.count_flops(probe, params, policy, fresh)
  assert found == rows * cost.forward(1, Cached(1, capacity), 1)
  it = PolicyProbe(
    policy=dataclasses.replace(shared.policy(), model=backbone),
    head=head,
    params=params,
    outputs=model.outputs,
  )
  masked = sum(
    4
    * x.heads_width
    * (
      Cached(1, capacity).pairs(x.window)
      - Causal(prompt + step - 1, 1).pairs(x.window)
    )
    for x in cost.layers
  )
  assert it.step_cost(prompt, step).flops_verifier == found / rows - masked


def test_searches_take_probabilities_whatever_the_readout():
  model, params = reward()
  raw = dataclasses.replace(model, readout=lambda x: log_odds(x))
  hidden = jnp.ones((2, model.backbone.width))
  score = StepScore(raw)(params, hidden)
  assert ((score > 0) & (score < 1)).all()
