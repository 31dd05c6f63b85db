"""FlashAttention's claims: the study, its verdicts and its pictures."""

import numpy as np
import pytest

from experiments.core import config
from experiments.notebooks import attention_costs, attention_pictures
from experiments.studies import protocol
from experiments.studies.attention import study
from kernels_pallas.flash_attention import cpu
from kernels_pallas.masks import intervals
from research.planning import chips
from research.typing import UserError

RUN = "runs/flash_attention/claims_cost.gin"
SHORT = ["study.Study.lengths=(2048, 4096)", "study.Study.topologies=()"]


@pytest.fixture(scope="module", name="rows")
def _rows():
  made = config.read(RUN, SHORT, root=protocol.Run).experiment.study
  return {arm: made.run(arm, {}, None) for arm in made.arms}


@pytest.mark.slow
def test_the_claims_hold(rows):
  made = study.Study(lengths=(2048, 4096), topologies=())
  assert [v.holds for v in made.verdicts(rows)] == [True] * 3
  row = rows["memory cpu"]["rows"][-1]
  assert row["scores"] == 4 * 4096**2
  # Scores and probabilities, forward and backward, against some rows.
  assert row["naive"] > 3 * row["scores"] > 6 * row["flash"]
  assert {r["backend"] for r in rows["exactness"]["rows"]} == {
    "xla_blockwise",
    "mosaic_tpu",
    *(["cpu"] if cpu.available() else []),
  }


def test_memory_that_doubles_is_linear():
  rows = [
    {"length": n, "scores": 4 * n**2, "naive": 13 * n**2, "flash": 100 * n}
    for n in (1024, 2048)
  ]
  assert study.linear(rows)
  assert study.linear([rows[0], rows[1] | {"naive": None}])
  assert not study.linear([rows[0], rows[1] | {"flash": 400 * 1024}])
  assert not study.linear([rows[0], rows[1] | {"naive": 2 * 2048**2}])


def test_bytes_decide_what_bandwidth_limits():
  moved = attention_costs.moved(16384, (512, 2048))
  ridges = [{"chip": "a", "ridge": 150}, {"chip": "b", "ridge": 560}]
  assert study.bandwidth_bound(moved, ridges)
  wrong = [*moved[:-1], moved[-1] | {"bytes": moved[-1]["bytes"] + 1}]
  assert not study.bandwidth_bound(wrong, ridges)
  assert not study.bandwidth_bound(moved, [{"chip": "x", "ridge": 60}])
  assert not study.bandwidth_bound(moved, [{"chip": "x", "ridge": 6000}])


def test_a_compiler_that_is_not_here_is_a_row(monkeypatch):
  monkeypatch.setattr(chips, "has_tpu_compiler", lambda: False)
  made = study.Study()
  row = made.run("memory v5e:2x2", {}, None)
  assert "libtpu" in row["failed"]
  [line] = made.table({"memory v5e:2x2": row})
  assert "libtpu" in line["failed"]
  exact = {"backend": "cpu", "dtype": "float32", "error": 3.0, "naive": 1.0}
  moved = attention_costs.moved(16384, (512, 2048))
  bytes_moved = {"rows": moved, "ridges": attention_costs.ridges()}
  rows = {"memory v5e:2x2": row, "exactness": {"rows": [exact]}}
  rows["traffic"] = bytes_moved
  # Nothing is said of memory that no compiler counted.
  claims = {v.claim[:2]: v.holds for v in made.verdicts(rows)}
  assert claims.keys() == {"F2", "F3"} and claims["F2"] is False


@pytest.mark.parametrize("lengths", [(), (512,), (0, 128), (512, 512), (2, 1)])
def test_bad_lengths_are_refused(lengths):
  with pytest.raises(UserError, match="Study.lengths: found"):
    study.Study(lengths=lengths)


def test_the_online_softmax_ends_at_the_softmax():
  rng = np.random.default_rng(0)
  scores, values = rng.standard_normal((2, 100)) * 5
  *_, last = attention_pictures.online(scores, values, 8)
  p = np.exp(scores - scores.max())
  assert last["output"] == pytest.approx((p * values).sum() / p.sum())
  assert last["m"] == scores.max()


def test_tiles_of_masks_are_those_with_a_visible_pair():
  length, block = 256, 32
  for name, mask in attention_costs.masks(length).items():
    seen = np.asarray(mask.visible(length, length))[0]
    n = length // block
    seen = seen.reshape(n, block, n, block)
    found = attention_pictures.classes(mask, length, block)
    some, full = seen.any((1, 3)), seen.all((1, 3))
    assert ((found != intervals.EMPTY) == some).all(), name
    assert ((found == intervals.FULL) == full).all(), name


@pytest.mark.chips
def test_memory_on_a_tpu_is_linear():
  rows = attention_costs.memory((8192, 16384), "v5e:2x2")
  assert study.linear(rows)
