"""The claims of FlashAttention: the command, its verdicts and its pictures."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from experiments.notebooks import attention_pictures
from experiments.studies.attention import attention_claims, attention_cost
from kernels_pallas.flash_attention import cpu
from kernels_pallas.masks import intervals


@pytest.fixture(scope="module", name="result")
def _result(tmp_path_factory):
  folder = tmp_path_factory.mktemp("attention")
  done = subprocess.run(
    [
      *(sys.executable, "-m", "experiments.studies.attention.attention_cost"),
      *(f"--to={folder}", "--lengths=2048,4096"),
    ],
    env={**os.environ, "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    timeout=170,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  for name in ("memory.png", "traffic.png"):
    assert (folder / name).read_bytes().startswith(b"\x89PNG")
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_claims_hold(result):
  assert result["F1"] and result["F2"] and result["F3"]
  row = result["memory"]["cpu"][-1]
  assert row["scores"] == 4 * 4096**2
  # Scores and probabilities, forward and backward, against some rows.
  assert row["naive"] > 3 * row["scores"] > 6 * row["flash"]
  assert {r["backend"] for r in result["exactness"]} == {
    "xla_blockwise",
    "mosaic_tpu",
    *(["cpu"] if cpu.available() else []),
  }


@pytest.mark.slow
def test_verdicts_can_be_false(result):
  memory = [dict(row) for row in result["memory"]["cpu"]]
  memory[-1]["flash"] *= 2
  assert not attention_cost._linear({"cpu": memory})
  moved, ridges = result["traffic"], result["ridges"]
  assert attention_cost._bandwidth(moved, ridges)
  wrong = [*moved[:-1], moved[-1] | {"bytes": moved[-1]["bytes"] + 1}]
  assert not attention_cost._bandwidth(wrong, ridges)
  assert not attention_cost._bandwidth(moved, [{"chip": "x", "ridge": 60}])
  assert not attention_cost._bandwidth(moved, [{"chip": "x", "ridge": 6000}])


@pytest.mark.parametrize("text", ["", "512", "512,x", "0,128", "512,512"])
def test_bad_lengths_are_refused(text):
  with pytest.raises(ValueError, match="--lengths="):
    attention_cost._lengths(text.split(","))


def test_the_online_softmax_ends_at_the_softmax():
  rng = np.random.default_rng(0)
  scores, values = rng.standard_normal((2, 100)) * 5
  *_, last = attention_pictures.online(scores, values, 8)
  p = np.exp(scores - scores.max())
  assert last["output"] == pytest.approx((p * values).sum() / p.sum())
  assert last["m"] == scores.max()


def test_tiles_of_masks_are_those_with_a_visible_pair():
  length, block = 256, 32
  for name, mask in attention_claims.masks(length).items():
    seen = np.asarray(mask.visible(length, length))[0]
    n = length // block
    seen = seen.reshape(n, block, n, block)
    found = attention_pictures.classes(mask, length, block)
    some, full = seen.any((1, 3)), seen.all((1, 3))
    assert ((found != intervals.EMPTY) == some).all(), name
    assert ((found == intervals.FULL) == full).all(), name


@pytest.mark.chips
def test_memory_on_a_tpu_is_linear():
  rows = attention_claims.memory((8192, 16384), "v5e:2x2")
  assert attention_cost._linear({"v5e": rows})
