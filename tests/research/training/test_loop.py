"""Runs: resumption is exact, and invalid runs stop with an error."""

import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.data import pipeline
from research.optim import optim
from research.training import evaluating, loop, preemption, state
from research.training.checkpoints.checkpoint import Checkpoints
from research.training.objectives.objective import NextToken
from research.training.step import make_eval_step
from research.typing import UserError
from tests.research.training.conftest import Positioned


@dataclasses.dataclass(frozen=True)
class Sentences:
  """Twenty short documents of letters."""

  def __len__(self):
    return 20

  def __getitem__(self, index):
    rng = np.random.default_rng(index)
    return "".join(map(chr, rng.integers(0, 60, 5 + index)))


class Letters:
  def encode(self, text):
    return [ord(c) for c in text]


LETTERS = Letters()


DATA = pipeline.Pipeline(source=Sentences(), length=16, batch_size=4, seed=1)


def records(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def losses(workdir):
  return [
    (r["step"], r["train/loss"]) for r in records(workdir) if "train/loss" in r
  ]


def test_ten_steps_are_five_and_five(model, params, adapt, tmp_path):
  """Bitwise, with dropout, a schedule, shuffled data and evaluation."""
  tx = optim.adamw(optim.cosine(1e-2, 10, 2), weight_decay=0.1)
  objective = NextToken(model, rows=16)

  def run(workdir, steps):
    start = state.create(adapt(params, 0.1), r"/trained/", tx, average=True)
    plan = loop.TrainConfig(steps=steps, seed=5, eval_every=5)
    return loop.fit(
      objective,
      tx,
      start,
      DATA.training(LETTERS),
      plan,
      workdir=workdir,
      evaluations={"validation": DATA.evaluation(LETTERS, 1)},
    )

  whole = run(tmp_path / "whole", 10)
  run(tmp_path / "parts", 5)
  parts = run(tmp_path / "parts", 10)
  chex.assert_trees_all_equal(whole.state, parts.state)
  assert whole.evaluation == parts.evaluation
  assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
  assert [s for s, _ in losses(tmp_path / "parts")] == list(range(1, 11))
  assert whole.best[0] in (5, 10) and whole.tokens_per_s > 0
  assert losses(tmp_path / "whole")[-1][1] < losses(tmp_path / "whole")[0][1]
  again = run(tmp_path / "parts", 10)  # nothing is left to do
  chex.assert_trees_all_equal(again.state, whole.state)
  assert again.tokens_per_s is None


def line_run(line, workdir, plan, *, bad_from=None, **more):
  objective, params, numbers = line
  tx = optax.sgd(0.05)
  start = state.create(params, "w", tx)
  return loop.fit(
    objective, tx, start, numbers(bad_from), plan, workdir=workdir, **more
  )


def test_a_decay_without_a_moving_average_raises(line, tmp_path):
  plan = loop.TrainConfig(steps=1, average=0.9)
  with pytest.raises(UserError, match=r"TrainConfig.average: found 0.9"):
    line_run(line, tmp_path / "none", plan)
  assert not (tmp_path / "none").exists()
  objective, params, numbers = line
  tx = optax.sgd(0.05)
  start = state.create(params, "w", tx, average=True)
  out = loop.fit(objective, tx, start, numbers(None), plan, workdir=tmp_path)
  np.testing.assert_allclose(
    out.state.ema["w"],
    0.9 * np.asarray(params["w"]) + 0.1 * np.asarray(out.state.params["w"]),
    rtol=1e-5,
  )


def test_a_run_learns_and_reports(line, tmp_path):
  _, _, numbers = line
  held = [next(iter(numbers()))]
  out = line_run(
    line,
    tmp_path,
    loop.TrainConfig(steps=40, eval_every=10, save_every=7, keep=1),
    evaluations={"validation": held, "heldout": held * 2},
  )
  assert int(out.state.step) == 40
  np.testing.assert_allclose(out.state.params["w"], [1, -2, 3], atol=0.1)
  assert out.evaluation["validation/loss"] == pytest.approx(
    out.evaluation["heldout/loss"]
  )
  assert out.seconds["step"] > 0 and out.seconds["compile"] > 0
  assert out.best == (40, pytest.approx(out.evaluation["validation/loss"]))
  found = records(tmp_path)
  assert found[0]["step"] == 0 and found[0]["goodput/lives"] == 1
  assert found[1]["step"] == 0 and found[1]["compile/seconds"] > 0
  assert [r["step"] for r in found if "validation/loss" in r] == [
    10,
    20,
    30,
    40,
  ]
  assert [r["step"] for r in found if "train/loss" in r] == list(range(1, 41))


def test_a_metric_that_is_not_measured_is_warned_of(line, tmp_path, capsys):
  """No checkpoint would be the best one, without a word."""
  _, _, numbers = line
  held = {"validation": [next(iter(numbers()))]}
  for best, said in (("validation/los", True), ("validation/loss", False)):
    plan = loop.TrainConfig(steps=2, eval_every=1, best=best)
    out = line_run(line, tmp_path / best, plan, evaluations=held)
    assert (out.best is None) == said
    text = "TrainConfig.best: found 'validation/los', which is not measured"
    assert capsys.readouterr().err.count(text) == said  # once, not twice


def test_best_checkpoint_survives_what_comes_after(line, tmp_path):
  """The evaluation is best at w = 0: the first checkpoint is the best one."""
  _, _, numbers = line
  held = next(iter(numbers()))
  held["y"] = np.full_like(held["y"], 0.5)
  out = line_run(
    line,
    tmp_path,
    loop.TrainConfig(steps=12, eval_every=2, keep=2),
    evaluations={"validation": [held]},
  )
  assert out.best[0] == 2
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    assert checkpoints.steps == [2, 10, 12]


def test_a_nan_stops_the_run_before_it_is_saved(line, tmp_path):
  plan = loop.TrainConfig(steps=9, save_every=2)
  with pytest.raises(UserError) as caught:
    line_run(line, tmp_path, plan, bad_from=6)
  assert "train/loss is nan at step 6" in str(caught.value)
  assert "\nthe last good checkpoint, of step 4, copy" in str(caught.value)
  assert str(caught.value).count("\n") < 3
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    assert checkpoints.steps == [2, 4]
  assert records(tmp_path)[-1]["train/loss"] is None
  # A new workdir with a copy of its checkpoints goes on from the last one.
  new = tmp_path / "new"
  shutil.copytree(tmp_path / "checkpoints", new / "checkpoints")
  assert line_run(line, new, plan).start == 4
  # The same workdir, with good data, goes on from the last checkpoint.
  out = line_run(line, tmp_path, plan)
  assert int(out.state.step) == 9
  assert [s for s, _ in losses(tmp_path)] == list(range(1, 10))


def test_a_run_that_is_past_its_last_step_is_an_error(line, tmp_path):
  """Its state would be taken for that of the last step."""
  line_run(line, tmp_path, loop.TrainConfig(steps=3))
  before = (tmp_path / "metrics.jsonl").read_text()
  with pytest.raises(UserError, match="is at step 3, expected at most .* 2"):
    line_run(line, tmp_path, loop.TrainConfig(steps=2))
  assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_a_run_says_that_its_saves_take_too_long(
  line, tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv("HEPTAD_GRACE_SECONDS", "0")
  line_run(line, tmp_path, loop.TrainConfig(steps=3, save_every=1))
  said = capsys.readouterr().err
  assert said.count("saving takes about 0 s, by its size") == 1
  assert f"warning: {tmp_path}: saving" in said


def test_another_shape_is_an_error_not_a_compilation(line, tmp_path):
  objective, params, numbers = line

  def batches():
    yield from (x for x, _ in zip(numbers(), range(2), strict=False))
    yield next(iter(numbers(size=5)))

  class Uneven:
    def __iter__(self):
      return batches()

  tx = optax.sgd(0.1)
  with pytest.raises(UserError, match=r"found .*float32\[5, 3\]") as caught:
    loop.fit(
      objective,
      tx,
      state.create(params, "w", tx),
      Uneven(),
      loop.TrainConfig(steps=5),
      workdir=tmp_path,
    )
  assert "\nexpected {'weights': 'float32[8]'" in str(caught.value)


def test_one_trace_a_run(line, tmp_path):
  objective, params, numbers = line
  tx = optax.sgd(0.1)
  # Two traces of the objective: the update and the evaluation.
  counted = chex.assert_max_traces(
    lambda params, batch, key: objective(params, batch, key), n=2
  )
  out = loop.fit(
    counted,
    tx,
    state.create(params, "w", tx),
    numbers(),
    loop.TrainConfig(steps=8, eval_every=2),
    workdir=tmp_path,
    evaluations={"validation": [next(iter(numbers()))] * 3},
  )
  assert int(out.state.step) == 8


def test_data_that_start_over_are_said_to(line, tmp_path, capsys):
  """They have no position; nor has their checkpoint, for data that have one."""
  objective, params, numbers = line
  tx = optax.sgd(0.1)

  def run(data, steps):
    start = state.create(params, "w", tx)
    plan = loop.TrainConfig(steps=steps)
    return loop.fit(objective, tx, start, data, plan, workdir=tmp_path)

  run(numbers(), 1)
  words = "resumes at step 1, but its data has no position"
  assert words not in capsys.readouterr().err
  run(numbers(), 2)
  assert words in capsys.readouterr().err
  with pytest.raises(UserError, match="without a position of the data"):
    run(Positioned(), 3)
  assert (tmp_path / "checkpoints" / "2").is_dir()


class Stops:
  """Asks a run to stop at its first stop point."""

  def reached(self):
    return True

  def unsaved(self, whether):
    pass


def test_a_run_that_saved_nothing_may_have_another_base(
  line, tmp_path, monkeypatch
):
  """One that has, may not."""
  objective, params, numbers = line
  tx = optax.sgd(0.1)

  def run(base, steps):
    start = state.create(params | {"base": jnp.float32(base)}, "w", tx)
    plan = loop.TrainConfig(steps=steps)
    return loop.fit(objective, tx, start, numbers(), plan, workdir=tmp_path)

  with monkeypatch.context() as patch:
    patch.setattr(preemption, "StopPoints", Stops)
    with pytest.raises(preemption.Preempted, match="no step was taken"):
      run(0.5, 1)
  assert run(0.7, 1).state.frozen["base"] == np.float32(0.7)
  with pytest.raises(UserError, match="not the same as now"):
    run(0.5, 2)


def test_frozen_is_never_donated(line, tmp_path):
  objective, params, numbers = line
  tx = optax.sgd(0.1)
  start = state.create(params, "w", tx)
  out = loop.fit(
    objective, tx, start, numbers(), loop.TrainConfig(steps=3), workdir=tmp_path
  )
  assert out.state.frozen["base"] is params["base"]
  assert not params["w"].is_deleted() and start.trainable["w"].is_deleted()


def test_evaluate_weighs_by_targets(line):
  objective, params, numbers = line
  start = state.create(params, "w", optax.sgd(0.1))
  batches = [b for b, _ in zip(numbers(), range(3), strict=False)]
  found = evaluating.evaluate(
    jax.jit(make_eval_step(objective)), start, batches
  )
  weight = np.concatenate([b["weights"] for b in batches])
  error = np.concatenate([(b["y"] - 0.5) ** 2 for b in batches])
  assert found["weight"] == weight.sum()
  want = (error * weight).sum() / weight.sum()
  np.testing.assert_allclose(found["loss"], want, rtol=1e-5)
  with pytest.raises(UserError, match="no targets"):
    evaluating.evaluate(make_eval_step(objective), start, [])


@pytest.mark.slow
def test_profile_of_early_steps(line, tmp_path):
  line_run(line, tmp_path, loop.TrainConfig(steps=3, profile=(2, 5)))
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_writers_get_everything(line, tmp_path):
  seen = []

  class Listener:
    def __init__(self, workdir, resumed):
      seen.append((workdir, resumed))

    def scalars(self, step, values):
      seen.append(step)

    def close(self):
      seen.append("closed")

  line_run(line, tmp_path, loop.TrainConfig(steps=2), writers=(Listener,))
  # Account of time, cost of the program; two steps; the account once more.
  assert seen == [(tmp_path, None), 0, 0, 1, 2, 2, "closed"]


@pytest.mark.parametrize("field", ["steps", "accumulate", "keep"])
def test_plans_that_do_nothing(field):
  with pytest.raises(
    UserError, match=f"TrainConfig.{field}: found 0, expected at"
  ):
    loop.TrainConfig(**{"steps": 1, field: 0})
