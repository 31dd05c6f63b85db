"""A verifier with a cache scores steps as one that reads everything again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.search.cached_verifier import CachedVerifier
from research.search.engine import Engine
from research.search.step_search import Limits
from research.search.strategies.beam import Beam
from research.search.strategies.tree import TreeSearch
from research.typing import UserError
from tests import support
from tests.research.search import test_search as shared


def head(params, hidden):
  """A fixed direction of the hidden state."""
  del params
  return jax.nn.sigmoid(hidden @ jnp.cos(jnp.arange(hidden.shape[-1])))


@functools.cache
def verifier(separator=()):
  model = support.model("llama", tied=False)
  params = support.params(model)
  return CachedVerifier(
    model=model, params=params, head=head, separator=separator
  )


def again(tokens, separator=()):
  """Returns the score of a text that is read from its beginning."""
  it = verifier(separator)
  row = jnp.array([[*tokens, *separator]])
  hidden, _ = it.model.apply({"params": it.params}, row)
  return float(head(None, hidden[0, -1]))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("strategy", "separator"),
  [
    (Beam(copies=4, width=2), ()),
    pytest.param(Beam(copies=4, width=2), (9, 4), marks=pytest.mark.slow),
    pytest.param(
      TreeSearch(simulations=3, width=2), (), marks=pytest.mark.slow
    ),
  ],
)
def test_scores_are_those_of_whole_texts(strategy, separator):
  policy = shared.policy(log_probs=isinstance(strategy, TreeSearch))
  engine = Engine(policy=policy, verifier=verifier(separator))
  limits = Limits(tokens=shared.NEW, key=jax.random.key(2))
  samples = strategy(engine, shared.PROMPTS, limits)
  for prompt, one in zip(shared.PROMPTS, samples, strict=True):
    # Stop tokens that come alone have no score, and are not read.
    alone = sum(map(shared.joined, one.paths))
    for path in one.paths[:2]:
      text = list(prompt)
      for step, score in zip(path.steps, path.scores, strict=True):
        text += step[: shared.STEP]
        np.testing.assert_allclose(score, again(text, separator), rtol=1e-4)
    new = one.ledger.verifier_new_tokens
    if separator:
      assert new > one.ledger.policy_decode_tokens
    else:
      assert new == one.ledger.policy_decode_tokens - alone
    assert one.ledger.flops_verifier > 0


def test_a_context_that_is_too_short_is_refused():
  model = support.model("llama").clone(max_positions=8)
  it = CachedVerifier(model=model, params={}, head=head)
  with pytest.raises(UserError, match="up to 5 tokens and 9 new ones"):
    it.start([[1] * 5], 1, 9)


def test_tokens_past_its_room_are_refused():
  it = verifier()
  state = it.start([[1] * 5], 1, 3)
  new = np.full((1, state.capacity - 5), 2, np.int32)
  state, _ = it.read(state, [], new)
  with pytest.raises(ValueError, match=r"found 17 tokens, expected at most 16"):
    it.read(state, [], new[:, :1])
