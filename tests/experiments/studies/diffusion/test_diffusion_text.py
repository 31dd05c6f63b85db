"""Bits per byte of real text, by two kinds of models."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies.diffusion import text as diffusion_text
from experiments.studies.diffusion.study import Tiny
from experiments.studies.diffusion.text import (
  AR,
  DIFFUSION,
  MARK,
  Text,
)
from research.data.sources.stdlib import Stdlib
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
  steps_factor=2,
  seeds=2,
  points=2,
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
  before = {arm: SMALL.run(arm, {}, None) for arm in SMALL.arms[:2]}
  return before | {arm: SMALL.run(arm, before, None) for arm in SMALL.arms[2:]}


@pytest.mark.slow
def test_both_are_measured_on_the_same_bytes():
  rows = trained()
  ar, diffusion = (rows[f"{kind}, seed 1"] for kind in (AR, DIFFUSION))
  assert ar["bytes"] == diffusion["bytes"] > 0
  assert ar["tokens"] == diffusion["tokens"]
  assert ar["parameters"] == diffusion["parameters"]
  # 2 rows of 32 tokens a step; diffusion takes twice as many steps.
  assert ar["read"] == [128, 256] and diffusion["read"] == [256, 512]
  assert ar["error"] == [0, 0] and min(diffusion["error"]) > 0
  # Hardly trained: about a uniform guess of one of 301 ids.
  uniform = math.log2(301) * ar["tokens"] / ar["bytes"]
  for kind in (AR, DIFFUSION):
    found = SMALL.bits(rows, kind)
    assert found == pytest.approx([uniform] * 2, rel=0.1)
    assert found[0] != found[1]  # seeds differ
    best = np.argmin(rows[f"rates of {kind}"]["bits"])
    assert rows[f"{kind}, seed 0"]["rate"] == SMALL.rates[best]


@pytest.mark.slow
def test_table_and_picture(tmp_path):
  rows = trained()
  lines = SMALL.table(rows)
  read = [line.get("tokens read") for line in lines]
  assert read == [256, 256, 512, None]
  equal = [rows[f"{DIFFUSION}, seed {s}"]["bits"][0] for s in range(2)]
  assert lines[1]["bits a byte"].value == pytest.approx(np.mean(equal))
  SMALL.plot(rows, tmp_path, "text")
  assert (tmp_path / "text.png").stat().st_size > 1000


@pytest.mark.slow
def test_next_tokens_are_those_of_the_rows():
  """Against every token's own cross-entropy."""
  model, params = SMALL._load(0)
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


def found(ar, equal, last, error=0.01):
  common = {"rate": 1e-3, "bytes": 10.0, "tokens": 5, "parameters": 7}
  out = {}
  for s in range(2):
    off = 0.001 * s
    mine = {"read": [128, 256], "bits": [9.0, ar + off], "error": [0.0, 0.0]}
    out[f"{AR}, seed {s}"] = common | mine
    mine = {"read": [256, 512], "bits": [equal + off, last + off]}
    out[f"{DIFFUSION}, seed {s}"] = common | mine | {"error": [error] * 2}
  return out


@pytest.mark.parametrize(
  ("ar", "equal", "last", "error", "wanted"),
  [
    (2.0, 2.03, 2.02, 0.001, [True, True, True, True]),
    (2.0, 2.5, 2.03, 0.001, [True, True, False, True]),
    (2.0, 2.5, 2.5, 0.1, [False, True, False, False]),
    (2.0, 9.0, 8.0, 0.001, [True, False, False, False]),
  ],
)
def test_verdicts(ar, equal, last, error, wanted):
  said = SMALL.verdicts(found(ar, equal, last, error))
  assert [v.holds for v in said] == wanted
  assert 3 < SMALL.unigram() < 8


def test_mistakes():
  with pytest.raises(UserError, match="passes is 1"):
    Text(passes=1)
  with pytest.raises(UserError, match="needs the arm 'rates of diffusion'"):
    SMALL.run(f"{DIFFUSION}, seed 0", {}, None)
