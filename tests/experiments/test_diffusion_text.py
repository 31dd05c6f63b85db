"""Bits per byte of real text, by two kinds of models."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import diffusion_text
from experiments.diffusion_study import Tiny
from experiments.diffusion_text import AR, DIFFUSION, MARK, Text
from research.data.stdlib import Stdlib
from research.typing import UserError

SMALL = Text(
  tiny=Tiny(width=16, depth=1, heads=2, batch=2, every=2, warmup=1),
  hidden=16,
  vocab=300,
  length=32,
  documents=3,
  steps=4,
  rates=(1e-3, 1e-2),
  trial=2,
  heldout=6,
  passes=2,
)


def test_rows_are_all_of_the_text():
  rows = diffusion_text.pieces(300, 3, "train", 32)
  assert (rows[:, 0] == MARK).all() and rows.shape[1] == 32
  source = Stdlib("train", limit=3)
  text = sum(len(source[i].encode()) for i in range(3))
  assert diffusion_text.text_bytes(300, 3)[rows].sum() == text
  # Padding is behind what is real.
  real = rows[:, 1:] != MARK
  assert (real[:, :-1] >= real[:, 1:]).all()


@functools.cache
def trained():
  before = {arm: SMALL.row(arm, {}) for arm in SMALL.arms[:2]}
  return before | {arm: SMALL.row(arm, before) for arm in SMALL.arms[2:]}


def test_both_are_measured_on_the_same_bytes():
  rows = trained()
  assert rows[AR]["bytes"] == rows[DIFFUSION]["bytes"] > 0
  assert rows[AR]["tokens"] == rows[DIFFUSION]["tokens"]
  assert rows[AR]["parameters"] == rows[DIFFUSION]["parameters"]
  assert rows[AR]["error"] == 0 < rows[DIFFUSION]["error"]
  # Hardly trained: about a uniform guess of one of 301 ids.
  uniform = math.log2(301) * rows[AR]["tokens"] / rows[AR]["bytes"]
  for kind in (AR, DIFFUSION):
    assert rows[kind]["bits"] == pytest.approx(uniform, rel=0.1)
    best = np.argmin(rows[f"rates of {kind}"]["bits"])
    assert rows[kind]["rate"] == SMALL.rates[best]
  assert len(SMALL.table(rows)) == 3


def test_next_tokens_are_those_of_the_rows():
  """Against every token's own cross-entropy."""
  model, params = SMALL._load()
  got = SMALL._worth(AR, model, params, "heldout")
  rows, real = SMALL._rows("heldout", 6)

  @jax.jit
  def logp(tokens):
    hidden, _ = model.apply({"params": params}, tokens)
    logits = model.apply({"params": params}, hidden, method="logits")
    return jax.nn.log_softmax(logits)

  found = np.asarray(logp(jnp.asarray(rows)))
  each = np.take_along_axis(found[:, :-1], rows[:, 1:, None], -1)[..., 0]
  nats = -each[real[:, 1:]].sum()
  size = diffusion_text.text_bytes(300, 3)[rows[real]].sum()
  assert got["bits"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def found(ar, bound, error=0.01):
  common = {"rate": 1e-3, "bytes": 10.0, "tokens": 5, "parameters": 7}
  return {
    AR: common | {"bits": ar, "error": 0.0},
    DIFFUSION: common | {"bits": bound, "error": error},
  }


@pytest.mark.parametrize(
  ("ar", "bound", "error", "wanted"),
  [
    (2.0, 2.03, 0.001, [True, True, True]),
    (2.0, 2.5, 0.001, [True, True, False]),
    (2.0, 2.5, 0.1, [False, True, False]),
    (2.0, 9.0, 0.001, [True, False, False]),
  ],
)
def test_verdicts(ar, bound, error, wanted):
  said = SMALL.verdicts(found(ar, bound, error))
  assert [v.holds for v in said] == wanted
  assert 3 < SMALL.unigram() < 8


def test_mistakes():
  with pytest.raises(UserError, match="passes is 1"):
    Text(passes=1)
  with pytest.raises(UserError, match="needs the arm 'rates of diffusion'"):
    SMALL.row(DIFFUSION, {})
