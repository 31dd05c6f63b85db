"""Samplers against NumPy, and samples against their distribution."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.generation import sampling as s
from research.typing import UserError

V = 23
LOGITS = np.random.default_rng(0).normal(size=(5, V)).astype(np.float32) * 3


def _softmax(x):
  e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def _oracle(logits, temperature, top_k=None, top_p=None, min_p=None):
  """Each rule by sorting one row, as defined in the papers."""
  out = np.full_like(logits, -np.inf)
  for row, kept in zip(logits / np.float32(temperature), out, strict=True):
    alive = list(np.argsort(-row, kind="stable"))[: top_k or V]
    if top_p is not None:
      p = _softmax(row[alive])
      before = np.cumsum(p) - p
      alive = [i for i, mass in zip(alive, before, strict=True) if mass < top_p]
    if min_p is not None:
      p = _softmax(row[alive])
      alive = [i for i, q in zip(alive, p, strict=True) if q >= min_p * p[0]]
    kept[alive] = row[alive]
  return out


@pytest.mark.parametrize(
  "rules",
  [
    dict(temperature=0.7),
    dict(temperature=1.0, top_k=1),
    dict(temperature=1.3, top_k=4),
    dict(temperature=1.0, top_k=V + 9),
    dict(temperature=1.0, top_p=0.5),
    dict(temperature=2.0, top_p=0.9),
    dict(temperature=1.0, top_p=1e-6),
    dict(temperature=1.0, top_p=1.0),
    dict(temperature=1.0, min_p=0.1),
    dict(temperature=1.0, min_p=1.0),
    dict(temperature=1.0, min_p=0.0),
    dict(temperature=3.0, top_k=9, top_p=0.8, min_p=0.2),
  ],
  ids=str,
)
def test_rules_keep_what_they_say(rules):
  found = jax.jit(s.process_logits)(jnp.asarray(LOGITS), s.Sampling(**rules))
  expected = _oracle(LOGITS, **rules)
  np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_equally_likely_tokens_stay_together():
  logits = jnp.asarray([[2.0, 1.0, 1.0, 1.0, -50.0]])
  kept = jnp.isfinite(s.keep_top_p(logits, 0.5))
  chex.assert_trees_all_equal(kept, jnp.array([[1, 1, 1, 1, 0]], bool))
  kept = jnp.isfinite(s.keep_top_k(logits, 2))
  chex.assert_trees_all_equal(kept, jnp.array([[1, 1, 1, 1, 0]], bool))


def test_impossible_tokens_stay_impossible():
  logits = jnp.asarray([[0.0, -jnp.inf, 1.0, -jnp.inf]])
  for f in (lambda x: s.keep_top_p(x, 0.99), lambda x: s.keep_min_p(x, 0.01)):
    np.testing.assert_array_equal(f(logits), logits)


def test_repetition_penalty():
  seen = np.random.default_rng(1).random((5, V)) < 0.4
  found = s.penalize(jnp.asarray(LOGITS), jnp.asarray(seen), 1.7)
  for i, j in np.ndindex(LOGITS.shape):
    x = LOGITS[i, j]
    if seen[i, j]:
      x = x / 1.7 if x > 0 else x * 1.7
    np.testing.assert_allclose(found[i, j], x, rtol=1e-6)


@pytest.mark.parametrize("rules", [{}, {"top_p": 0.8}, {"top_k": 5}], ids=str)
def test_samples_follow_their_distribution(rules):
  draws, temperature = 20_000, 1.5
  rules = s.Sampling(temperature=temperature, **rules)
  logits = jnp.broadcast_to(LOGITS[0], (draws, V))
  keys = s.row_keys(jax.random.key(7), jnp.arange(draws))
  tokens = jax.jit(s.sample)(logits, rules, keys, 3)
  found = np.bincount(tokens, minlength=V)
  named = {"top_p": rules.top_p, "top_k": rules.top_k}
  p = _softmax(_oracle(LOGITS[:1], temperature, **named))[0]
  assert not found[p == 0].any()
  expected = draws * p[p > 0]
  chi2 = np.sum((found[p > 0] - expected) ** 2 / expected)
  freedom = len(expected) - 1
  # Mean `freedom`, variance `2 freedom`: five sigma, for one fixed seed.
  assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


def test_greedy_is_the_argmax():
  keys = s.row_keys(jax.random.key(0), jnp.arange(5))
  found = s.sample(jnp.asarray(LOGITS), s.GREEDY, keys, 0)
  chex.assert_trees_all_equal(found, jnp.asarray(LOGITS.argmax(-1)))


def test_greedy_takes_the_first_of_equals_and_shows_what_is_no_number():
  rows = np.zeros((4, 9), np.float32)
  rows[1] = -np.inf
  rows[2, 3:] = 7
  rows[3, [2, 5]] = np.inf, np.nan
  keys = s.row_keys(jax.random.key(0), jnp.arange(4))
  found = s.sample(jnp.asarray(rows), s.GREEDY, keys, 0)
  chex.assert_trees_all_equal(found, jnp.asarray([0, 0, 3, 5]))


def test_a_draw_depends_on_example_and_step_only():
  rules = s.Sampling(temperature=5.0)
  examples = jnp.arange(5)
  choose = jax.jit(s.sample)
  keys = s.row_keys(jax.random.key(0), examples)
  whole = choose(jnp.asarray(LOGITS), rules, keys, 0)
  order = jnp.array([3, 0])
  keys = s.row_keys(jax.random.key(0), examples[order])
  part = choose(jnp.asarray(LOGITS)[order], rules, keys, 0)
  chex.assert_trees_all_equal(part, whole[order])
  flat = jnp.zeros((64, V))
  keys = s.row_keys(jax.random.key(0), jnp.arange(64))
  steps = [choose(flat, rules, keys, i) for i in range(2)]
  assert np.mean(np.asarray(steps[0]) != np.asarray(steps[1])) > 0.5
  assert len(set(np.asarray(steps[0]).tolist())) > V // 2


def test_numbers_do_not_recompile():
  choose = jax.jit(chex.assert_max_traces(s.sample, n=1))
  keys = s.row_keys(jax.random.key(0), jnp.arange(5))
  for t in (0.5, 0.9):
    rules = s.Sampling(temperature=t, top_p=t)
    choose(jnp.asarray(LOGITS), rules, keys, jnp.int32(0))


@pytest.mark.parametrize(
  "name, value",
  [
    ("temperature", 0.0),
    ("temperature", -1.0),
    ("temperature", float("nan")),
    ("temperature", "hot"),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("min_p", -0.1),
    ("repetition_penalty", 0.0),
    ("top_k", 0),
  ],
)
def test_numbers_out_of_range(name, value):
  with pytest.raises(UserError, match=f"{name}: found"):
    s.check(s.Sampling(**{name: value}))
