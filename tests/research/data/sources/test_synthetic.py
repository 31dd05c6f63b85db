"""Synthetic sources: the stated optimal loss against measurements."""

import collections
import dataclasses

import numpy as np
import pytest

from research.data import pipeline
from research.data.sources import synthetic
from research.typing import UserError

SOURCES = [synthetic.Markov(), synthetic.Copy(), synthetic.Recall()]


@pytest.mark.parametrize("concentration", [0.05, 0.5, 100.0])
def test_markov_entropy_is_what_its_own_predictor_pays(concentration):
  """Mean surprise under the true conditional, within 4 standard errors."""
  source = synthetic.Markov(
    vocab=7, length=64, count=400, concentration=concentration, seed=3
  )
  p = source.transitions
  losses = [
    -np.log(p[e.tokens[:-1], e.tokens[1:]]) for e in source.examples(None)
  ]
  documents = np.array([loss.mean() for loss in losses])
  error = documents.std() / len(documents) ** 0.5
  assert abs(documents.mean() - source.optimal_loss) < 4 * error
  assert 4 * error < 0.1  # or the line above says nothing
  assert 0 < source.optimal_loss <= np.log(7)


def test_markov_by_counting():
  """Model-free: pair frequencies are pi_i P_ij from the first token on."""
  source = synthetic.Markov(vocab=4, length=50, count=2000, concentration=1)
  tokens = np.stack([e.tokens for e in source.examples(None)])
  want = source.stationary[:, None] * source.transitions
  for part in (tokens[:, :2], tokens[:, -2:]):
    counts = np.zeros((4, 4))
    np.add.at(counts, (part[:, 0], part[:, 1]), 1)
    error = np.sqrt(want * (1 - want) / len(part))
    assert (np.abs(counts / len(part) - want) < 5 * error).all()
  np.testing.assert_allclose(
    source.stationary @ source.transitions, source.stationary, atol=1e-12
  )
  np.testing.assert_allclose(source.transitions.sum(-1), 1, atol=1e-12)


def test_a_fair_coin_costs_log_two():
  source = synthetic.Markov(vocab=2, concentration=1e6)
  assert source.optimal_loss == pytest.approx(np.log(2), abs=1e-5)


def test_copy_repeats():
  source = synthetic.Copy(vocab=5, length=6, count=30)
  for e in source.examples(None):
    np.testing.assert_array_equal(e.tokens[:6], e.tokens[7:])
    assert e.tokens[6] == 5 and set(e.tokens[:6]) <= set(range(5))
    assert np.flatnonzero(e.loss_mask).tolist() == [7, 8, 9, 10, 11, 12]


def test_recall_can_be_answered_by_looking_back():
  source = synthetic.Recall(keys=12, values=9, pairs=5, count=50)
  orders = collections.Counter()
  for e in source.examples(None):
    told = dict(e.tokens[:10].reshape(5, 2).tolist())
    assert len(told) == 5 and max(told) < 12 <= min(told.values()) < 21
    asked = e.tokens[10:].reshape(5, 2).tolist()
    assert {k: told[k] for k, _ in asked} == dict(asked) == told
    assert np.flatnonzero(e.loss_mask).tolist() == [11, 13, 15, 17, 19]
    orders[list(told) == [k for k, _ in asked]] += 1
  assert orders[False] > orders[True]


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: type(s).__name__)
def test_documents_are_functions_of_seed_split_and_number(source):
  source = dataclasses.replace(source, count=20)

  def tokens(**changes):
    made = dataclasses.replace(source, **changes).examples(None)
    return np.stack([e.tokens for e in made])

  first = tokens()
  np.testing.assert_array_equal(first, tokens())
  np.testing.assert_array_equal(first, tokens(count=33)[:20])
  others = (tokens(seed=1), tokens(split="heldout"), tokens(split="validation"))
  assert not any(np.array_equal(first, other) for other in others)


def test_the_matrix_is_the_same_in_every_split():
  a, b = (synthetic.Markov(split=s) for s in ("train", "heldout"))
  np.testing.assert_array_equal(a.transitions, b.transitions)
  assert a.optimal_loss == b.optimal_loss


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: type(s).__name__)
def test_rows_need_no_tokenizer(source):
  source = dataclasses.replace(source, count=8)
  data = pipeline.Pipeline(source=source, length=300, batch_size=2)
  batch = next(iter(data.training(None)))
  assert batch["tokens"].shape == (2, 300) and batch["weights"].sum() > 0
  learned = sum(e.loss_mask[1:].sum() for e in source.examples(None))
  assert sum(b["weights"].sum() for b in data.evaluation(None)) == learned


def test_fewer_keys_than_pairs_are_refused():
  with pytest.raises(UserError, match="Recall.keys: found 7, .* at least 8"):
    synthetic.Recall(keys=7)
