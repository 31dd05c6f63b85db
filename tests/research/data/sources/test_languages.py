"""Synthetic languages: the stated optimal loss against measurements."""

import dataclasses

import numpy as np
import pytest

from research.data.sources import languages
from research.typing import UserError

SMALL = languages.LogLinear(vocab=6, length=40, count=1500, sharpness=1.0)


def test_entropy_is_what_its_own_predictor_pays():
  p = SMALL.transitions
  t = np.stack([e.tokens for e in SMALL.examples(None)])
  losses = -np.log(p[t[:, :-2], t[:, 1:-1], t[:, 2:]]).mean(1)
  error = losses.std() / len(losses) ** 0.5
  assert abs(losses.mean() - SMALL.optimal_loss) < 4 * error
  assert 4 * error < 0.03  # or the line above says nothing
  assert 0 < SMALL.optimal_loss < np.log(6)


def test_pairs_and_what_follows_by_counting():
  t = np.stack([e.tokens for e in SMALL.examples(None)])
  want = SMALL.stationary[..., None] * SMALL.transitions
  for part in (t[:, :3], t[:, -3:]):
    counts = np.zeros((6, 6, 6))
    np.add.at(counts, tuple(part.T), 1)
    error = np.sqrt(want * (1 - want) / len(part)) + 1e-4
    assert (np.abs(counts / len(part) - want) < 5 * error).all()


def test_a_mixture_is_the_weighted_sum_of_tables():
  def logits(mix):
    p = np.log(dataclasses.replace(SMALL, mix=mix).transitions)
    return p - p.mean(-1, keepdims=True)

  np.testing.assert_allclose(
    logits({0: 0.5, 1: 0.7}),
    0.5 * logits({0: 1.0}) + 0.7 * logits({1: 1.0}),
    atol=1e-12,
  )


def test_splits_differ_and_repeat():
  def tokens(**changes):
    made = dataclasses.replace(SMALL, count=20, **changes).examples(None)
    return np.stack([e.tokens for e in made])

  assert (tokens() == tokens()).all()
  assert not (tokens() == tokens(split="heldout")).all()


def test_a_mixture_of_nothing_is_refused():
  with pytest.raises(UserError, match="mix"):
    languages.LogLinear(mix={})
