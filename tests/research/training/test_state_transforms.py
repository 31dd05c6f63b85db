"""Router bias updates during training, and resumption with them."""

import chex
import numpy as np
import optax
import pytest

from research import tree
from research.data import pipeline
from research.data.sources import synthetic
from research.nn import presets
from research.nn.moe.routing import Routing
from research.training import loop, state
from research.training.objectives import experts
from research.training.objectives.objective import NextToken
from research.training.reports.metrics import read_jsonl
from tests import support

RATE = 0.05
MODEL = support.model(
  "qwen3_moe",
  depth=1,
  sparse=presets.Sparse(
    routing=Routing(experts=4, active=2, score="sigmoid", biased=True),
    hidden=12,
  ),
)
OBJECTIVE = NextToken(
  model=MODEL, experts=experts.Balance(loss=0.0, z=0.0, counts=True)
)
BIAS = "run0/layer0/mlp/router_bias"
DATA = pipeline.Pipeline(
  source=synthetic.Markov(vocab=32, length=12, count=16),
  length=12,
  batch_size=4,
)


def run(workdir, steps):
  tx = optax.adam(1e-2)
  start = state.create(support.params(MODEL), ".", tx)
  return loop.fit(
    OBJECTIVE,
    tx,
    start,
    DATA.training(None),
    loop.TrainConfig(steps=steps),
    workdir=workdir,
    state_transforms=(experts.rebalance(RATE),),
  ).state


@pytest.mark.slow
def test_biases_move_and_resume_bitwise(tmp_path):
  whole = run(tmp_path / "whole", 6)
  run(tmp_path / "parts", 3)
  parts = run(tmp_path / "parts", 6)
  chex.assert_trees_all_equal(parts, whole)
  before = dict(tree.flatten_paths(support.params(MODEL)))[BIAS]
  moved = np.asarray(dict(tree.flatten_paths(whole.trainable))[BIAS] - before)
  # Up or down by the rate in each of six steps: an even number of rates, but
  # for steps in which an expert had just the mean. Float32: 6 roundings of 1.
  assert np.abs(moved).max() > RATE / 2
  np.testing.assert_allclose(
    moved / RATE, np.round(moved / RATE), atol=6 * 2**-24 / RATE
  )
  records = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
  steps = [r for r in records if "train/loss" in r]
  assert len(steps) == 6 and all("train/violation" in r for r in steps)
  assert not any("counts" in name for r in records for name in r)
