"""In-context learning: what a model is asked, and what its answers say."""

import copy
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies.diffusion import incontext, kinds
from experiments.studies.diffusion.incontext import (
  LAST,
  MIDDLE,
  SCORED,
  STRANGE,
)
from experiments.studies.diffusion.kinds import (
  AR,
  CONVERTED,
  DIFFUSION,
)
from experiments.studies.diffusion.study import Tiny
from research.data.sources.shots import Shots
from research.typing import UserError

TASK = Shots(keys=5, values=4, used=3, pairs=6)
TINY = Tiny(width=16, depth=1, heads=2, batch=2, every=2, warmup=1)
SMALL = incontext.InContext(
  source=TASK, tiny=TINY, steps=4, steps_factor=2, rates=(0.01,), shots=(1, 3),
  pool=16, heldout=64, seeds=1,
)  # fmt: skip


@pytest.fixture(scope="module", name="rows")
def _rows():
  rows = {}
  for arm in SMALL.arms:
    rows[arm] = SMALL.run(arm, rows, None)
  return rows


@pytest.mark.slow
def test_arms_know_what_was_read(rows, tmp_path):
  read = {kind: rows[f"{kind}, seed 0"]["read"] for kind in kinds.KINDS}
  size = 2 * 12  # rows and tokens of a batch
  assert read[AR] == [2 * size, 4 * size]
  assert read[DIFFUSION] == [2 * size, 4 * size, 6 * size, 8 * size]
  # A converted model has read what it was converted from, too.
  assert read[CONVERTED] == [6 * size, 8 * size]
  for kind in kinds.KINDS:
    found = rows[f"{kind}, seed 0"]
    assert (SCORED in found["right"]) == (kind == AR)
    # The last point of a curve is the same question as the last number.
    for way in (LAST, MIDDLE):
      assert found[way][-1] == found["right"][way][-1]
      assert 0 <= found[way][0] <= 1
  SMALL.plot(rows, tmp_path, "context")
  assert (tmp_path / "incontext.png").read_bytes()[:4] == b"\x89PNG"
  assert len(SMALL.table(rows)) == 4 + 3 + 3 + 2


def test_an_arm_needs_its_rate():
  with pytest.raises(UserError, match="needs the arm 'rates of next token'"):
    SMALL.run("converted, seed 0", {}, None)


@pytest.mark.slow
def test_who_sees_what_comes_after():
  model, params = SMALL._load(0)
  assert np.asarray(params["embed"]).std() == pytest.approx(1, rel=1e-5)
  rows = TASK.rows("train", 64)
  other = rows.copy()
  other[:, 8:] = (other[:, 8:] + 1) % 9
  for kind in kinds.KINDS:
    place = jnp.int32(7)
    got = [
      np.asarray(kinds.answers(model, kind, params, jnp.asarray(x), place))
      for x in (rows, other)
    ]
    assert (got[0] == got[1]).all() == (kind == AR)
    assert max(got[0]) < TASK.mask_id
  # Nor does next-token prediction see what it is asked for.
  other[:, 7:] = TASK.mask_id
  hidden, shown = (
    kinds.answers(model, AR, params, jnp.asarray(x), jnp.int32(7))
    for x in (other, rows)
  )
  np.testing.assert_array_equal(hidden, shown)


@pytest.mark.slow
def test_scores_are_sums_of_log_probabilities():
  model, params = SMALL._load(1)
  rows = TASK.rows("train", 3)
  values, counts = np.array([5, 8]), np.arange(12) < 9
  got = kinds.scores(
    model, params, jnp.asarray(rows), jnp.asarray(values), jnp.int32(7),
    jnp.asarray(counts),
  )  # fmt: skip

  @jax.jit
  def step(begun, t):
    hidden, _ = model.apply({"params": params}, begun[None])
    logits = model.apply({"params": params}, hidden, method="logits")
    return jax.nn.log_softmax(logits[0, t])

  for j, value in enumerate(values):
    for i, row in enumerate(rows):
      row, want = row.copy(), 0.0
      row[7] = value
      for t in range(9):  # a token at a time, the rest unknown
        begun = np.full(12, TASK.mask_id, np.int32)
        begun[1 : t + 1] = row[:t]
        want += float(step(jnp.asarray(begun), t)[row[t]])
      assert float(got[j, i]) == pytest.approx(want, abs=1e-4)


def test_who_knows_no_keys_guesses_among_values():
  asked = TASK.questions("before", 1, "heldout", 64)
  assert SMALL.guess(LAST, 1) == 1  # there is but one
  right = []
  asked = TASK.questions("after", 3, "heldout", 64)
  for row in asked.rows:  # 2 pairs before the middle one, 3 after it
    told = [row[2 * n + 1] for n in (0, 1, 3, 4, 5)]
    best = max(range(5, 9), key=lambda v, told=told: (told.count(v), -v))
    right.append(best == row[asked.position])
  assert SMALL.guess(MIDDLE, 3) == np.mean(right)


# --- verdicts ---

STUDY = incontext.InContext()
CHANCE = 1 / 16


def found(**changes):
  right = {
    AR: {LAST: 0.99, STRANGE: CHANCE, MIDDLE: CHANCE, SCORED: CHANCE},
    DIFFUSION: {LAST: 0.98, STRANGE: CHANCE, MIDDLE: 0.98},
    CONVERTED: {LAST: 0.97, STRANGE: CHANCE, MIDDLE: 0.96},
  }
  rows = {}
  for kind, ways in right.items():
    ways = {way: changes.get(f"{kind}: {way}", x) for way, x in ways.items()}
    for seed, jitter in enumerate((-0.001, 0.0, 0.001)):
      rows[f"{kind}, seed {seed}"] = {
        "rate": 1e-3,
        "read": [1000, 2000, 3000],
        LAST: [0.1, 0.5 + 0.45 * seed / 2, 0.99],
        MIDDLE: [0.1, 0.1, 0.1],
        "right": {
          way: [0.5, 0.6, 0.7, x + jitter * (1 + i)]
          for i, (way, x) in enumerate(ways.items())
        },
      }
  return copy.deepcopy(rows)


@pytest.mark.parametrize(
  ("changes", "fallen"),
  [
    ({}, []),
    ({"diffusion: last, shots before it": 0.3}, [0, 1]),
    ({"diffusion: last, shots before it": 0.92}, [1]),
    ({"diffusion: middle, shots after it": 0.3}, [2]),
    ({"converted: last, shots before it": 0.4}, [3, 4]),
    ({"converted: middle, shots after it": 0.9}, [5]),
    ({"next token: middle, shots after it": 0.2}, [6]),
    ({"next token: middle, every value scored": 0.9}, [7]),
    ({"converted: last, key not in the row": 0.2}, [8]),
  ],
)
def test_verdicts_fall(changes, fallen):
  holds = [v.holds for v in STUDY.verdicts(found(**changes))]
  assert [i for i, x in enumerate(holds) if not x] == fallen


def test_little_is_sure_of_seeds_that_differ():
  rows = found()
  rows["diffusion, seed 0"]["right"][LAST][-1] = 0.3
  holds = [v.holds for v in STUDY.verdicts(rows)]
  assert not any(holds[:2]) and all(holds[3:])


def test_tokens_to_90_per_cent():
  rows = found()
  assert STUDY.read(rows, AR, LAST) == [3000, 3000, 2000]
  assert STUDY.read(rows, AR, MIDDLE) == [None] * 3
  lines = STUDY.table(rows)
  assert lines[0]["tokens to 90%"] == "3k, 3k, 2k"
  assert math.isclose(lines[0]["8 shots"].value, 99)
