"""Studies of masked diffusion: run files, the command, and what arms return."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import study as command
from experiments.core import cli
from experiments.studies.diffusion import (
  bounds,
  ladder,
  policies,
  reversal,
  tasks,
  truth,
)
from experiments.studies.diffusion import policy_verdicts as judged
from experiments.studies.diffusion import (
  study as diffusion_study,
)
from experiments.studies.diffusion.study import Tiny
from research.data.batches import batch_of
from research.data.sources.synthetic import Markov
from research.diffusion.block import BlockDiffusion
from research.diffusion.objective import MaskedDiffusion
from research.optim import optim
from research.training import state, step
from research.training.objectives.objective import NextToken
from research.typing import UserError

SMALL = Tiny(width=16, depth=1, heads=2, batch=2, every=2, warmup=1)


@pytest.fixture(scope="module", name="trial")
def _trial(tmp_path_factory):
  """The command on a tiny study, and how to run it again."""
  folder = tmp_path_factory.mktemp("study")

  def run():
    bindings = (
      *("study.Tiny.width=16", "study.Tiny.depth=1"),
      "study.Tiny.every=4",
      "reversal.Reversal.steps=6",
      "reversal.Pairs.count=4",
      "reversal.Reversal.seeds=1",
    )
    flags = ["--config=runs/llada/claims_reversal.gin", f"--workdir={folder}"]
    flags += [f"--set={b}" for b in bindings]
    return cli.call(command.main, ["study", *flags])

  assert run() == 0
  return folder, run


@pytest.mark.slow
def test_the_command_stores_arms_and_says_what_it_found(trial, capsys):
  folder, run = trial
  files = {
    k: folder / "arms" / f"{k}_seed_0.json" for k in ("next_token", "diffusion")
  }
  rows = {k: json.loads(path.read_text()) for k, path in files.items()}
  assert set(rows["next_token"]["row"]["right"]) >= {"fact", "scored"}
  assert set(rows["diffusion"]["row"]["right"]) >= {"fact", "gap"}
  assert (folder / "reversal.png").read_bytes()[:4] == b"\x89PNG"
  rows["diffusion"]["row"]["right"]["gap"] = 0.75
  files["diffusion"].write_text(json.dumps(rows["diffusion"]))
  capsys.readouterr()
  assert run() == 0  # what is there is not run again
  out = capsys.readouterr().out
  result = json.loads(out.splitlines()[-1])
  gap = next(v for v in result["verdicts"] if v["claim"].startswith("a gap"))
  assert gap["found"] == "0.750 (one value)"
  assert gap["verdict"] == "undecided"
  assert [line[2] for line in result["tables"][0]["rows"]][1] == [75, None]


def test_more_seeds_leave_the_others_as_they_are():
  few, more = (reversal.Reversal(seeds=n) for n in (3, 5))
  for arm in few.arms:
    assert few.settings(arm) == more.settings(arm)
  assert few.settings(few.arms[0]) != reversal.Reversal(steps=9).settings(
    few.arms[0]
  )
  few, more = (ladder.Ladder(source=Markov(), seeds=n) for n in (3, 5))
  for arm in few.arms:
    same = few.settings(arm) == more.settings(arm)
    assert same == (not arm.startswith("rates of "))


def test_a_kind_needs_its_rate():
  rows = {"rates of a": {"rate": 3e-3}}
  assert diffusion_study.swept(["a"], 1) == ["rates of a", "a, seed 0"]
  assert diffusion_study.swept_before("a, seed 4", rows) == ("a", 4, 3e-3)
  with pytest.raises(UserError, match="needs the arm 'rates of b'"):
    diffusion_study.swept_before("b, seed 0", rows)


@pytest.mark.slow
def test_training_is_the_plain_loop_and_its_average():
  model, params = SMALL.load(6, 0)
  objective = NextToken(model=model)
  pool = batch_of(np.arange(24).reshape(6, 4) % 5, begin=5)
  seen = dict(SMALL.train(objective, params, pool, 4, seed=4, rate=0.1))
  assert sorted(seen) == [2, 4]
  shape = optim.constant(1.0, SMALL.warmup)
  tx = optim.adamw(lambda count: 0.1 * shape(count))
  now = state.create(params, ".", tx, average=True)
  update = jax.jit(step.make_train_step(objective, tx, average=SMALL.average))
  key = jax.random.key(4)
  for i in range(4):
    at = jax.random.fold_in(jax.random.fold_in(key, 1), i)
    rows = jax.random.randint(at, (SMALL.batch,), 0, 6)
    now, _ = update(now, {k: v[rows] for k, v in pool.items()}, key)
  for got, want in zip(
    jax.tree.leaves(seen[4]), jax.tree.leaves(now.ema), strict=True
  ):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_rows_become_batches():
  rows = np.array([[3, 1, 2]])
  learned = np.array([False, False, True])
  plain, begun = batch_of(rows, learned), batch_of(rows, begin=7)
  assert plain["tokens"].tolist() == [[3, 1, 2]]
  # What is learned is a target of the place before it.
  assert plain["weights"].tolist() == [[0, 1, 0]]
  assert plain["targets"][0, 1] == 2
  assert begun["tokens"].tolist() == [[7, 3, 1]]
  assert begun["targets"].tolist() == [[3, 1, 2]]
  assert begun["weights"].tolist() == [[1, 1, 1]]


@pytest.mark.slow
def test_the_bound_is_the_mean_over_numbers_of_masks():
  """Of blocks of one it is the loss itself; masks are n of each block."""
  model, params = SMALL.load(6, 1)
  rows = np.arange(32).reshape(4, 8) % 5
  single = BlockDiffusion(model=model, mask_id=5, block=1)
  batch = batch_of(rows)
  want = bounds.loss(single, params, batch)
  got = float(bounds.bound(single, params, batch, 1))
  assert got == pytest.approx(want, rel=1e-5)
  key = jax.random.key(0)
  for n in (1, 3, 4):
    masked, counts = bounds.masks(key, jnp.asarray(rows), n, 4)
    assert (np.asarray(masked).reshape(4, 2, 4).sum(-1) == n).all()
    np.testing.assert_allclose(np.asarray(counts).sum(), 32)
  # Untrained, with a zero head: a uniform guess, for every number of masks.
  flat = dict(params) | {"head": jnp.zeros_like(params["head"])}
  whole = MaskedDiffusion(model=model, mask_id=5)
  got = float(bounds.bound(whole, flat, batch, 8))
  assert got == pytest.approx(np.log(5), rel=1e-5)


CHAIN = Markov(vocab=4, length=8, concentration=0.3, seed=2)
STUDY = policies.Policies(
  chain=CHAIN,
  rows=512,
  speeds=(1, 8),
  thresholds=(),
  factors=(),
  lows=(),
  longer=(),
)


@pytest.mark.slow
def test_of_the_chain_itself_samples_are_as_good_as_the_sampler(monkeypatch):
  few = {"low confidence": "candidate", "random": "random"}
  monkeypatch.setattr(policies, "SELECTS", few)
  points = {
    (p["policy"], p["knob"]): p
    for p in STUDY.run(f"{judged.EXACT}, seed 0", {}, None)["points"]
  }
  entropy = truth.entropy(CHAIN, 8)
  slow, fast = points["random", 1], points["random", 8]
  assert slow["calls"] == 8 and fast["calls"] == 1
  # Four standard errors of a row's surprise, a token.
  rows = np.stack([e.tokens for e in CHAIN.examples(None)])
  error = 4 * truth.surprise(CHAIN, rows).std() / 512**0.5 / 8
  for name in ("random", "first hitting"):
    assert points[name, 1]["nats"] == pytest.approx(entropy, abs=error)
    assert points[name, 1]["off"] < 0.06
  # All at once: each token by itself.
  assert fast["off"] > 0.3 and fast["nats"] > entropy + error
  biased = points["low confidence", 1]
  assert biased["nats"] < entropy - error and biased["off"] > 0.1


@pytest.mark.slow
def test_what_answers_cost_is_what_ran(monkeypatch):
  """FLOPs of a batch's calls; a row has as many as its own."""
  few = {"low confidence": "candidate"}
  monkeypatch.setattr(policies, "SELECTS", few)
  sums = tasks.Sums(length=4, given=4)
  study = dataclasses.replace(
    STUDY, sums=sums, tiny=SMALL, steps=2, rows=8, thresholds=(0.5,)
  )
  points = study.run("sums, seed 0", {}, None)["points"]
  slow, fast, threshold = (
    p for p in points if p["policy"] in ("low confidence", "threshold")
  )
  assert {"editing", "credit", "cosine", "Dream, entropy"} < {
    p["policy"] for p in points
  }
  assert (slow["calls"], fast["calls"]) == (3, 1)
  assert slow["GFLOP"] == pytest.approx(3 * fast["GFLOP"])
  assert threshold["GFLOP"] >= threshold["calls"] * fast["GFLOP"] * (1 - 1e-9)
  # A layer's matrices and the head, of eight tokens, and attention to all.
  model, params = SMALL.load(sums.mask_id + 1, 0)
  matrices = (
    sum(x.size for x in jax.tree.leaves(params) if x.ndim > 1 and x.size > 16)
    - params["embed"].size
  )
  want = 2 * 8 * matrices + 4 * 8 * 8 * SMALL.width
  assert fast["GFLOP"] == pytest.approx(want / 1e9, rel=0.01)
  # Guidance reads a row twice, at each of 3 steps and of 1.
  guided = [p for p in points if p["policy"] == "guidance"]
  assert [p["calls"] for p in guided] == [6, 2]
  assert guided[1]["GFLOP"] == pytest.approx(2 * fast["GFLOP"], rel=1e-3)
  assert all(p["ms"] > 0 for p in (slow, fast, threshold))
