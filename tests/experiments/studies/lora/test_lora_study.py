"""LoRA's studies: what a row is, how rates grow, and what verdicts need."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import study as command
from experiments.core import cli, config
from experiments.studies import protocol
from experiments.studies.lora import bandit, lr_grid
from experiments.studies.lora import lora_arms as arms
from experiments.studies.lora import lora_verdicts as verdicts
from research import tree
from research.training import state, step
from research.typing import UserError
from tests import support

RUN = "runs/lora/claims_policy.gin"
TINY = (
  *("presets.Sizes.width=32", "presets.Sizes.depth=1"),
  "presets.Sizes.head_dim=8",
  *("presets.Sizes.hidden=32", "study.Study.base_steps=30"),
  *("study.Study.steps=4", "study.Study.seeds=2", "study.Study.batch=4"),
  "lora_arms.policy.ranks=(1,)",
)


@pytest.fixture(scope="module", name="trial")
def _trial(tmp_path_factory):
  """The command on a tiny study: its folder, its rows, the study."""
  folder = tmp_path_factory.mktemp("study")
  flags = [f"--config={RUN}", f"--workdir={folder}"]
  flags += [f"--set={b}" for b in TINY]
  assert cli.call(command.main, ["study", *flags]) == 0
  files = (folder / "arms").iterdir()
  rows = {(r := json.loads(p.read_text()))["arm"]: r["row"] for p in files}
  return (
    folder,
    rows,
    config.read(RUN, TINY, root=protocol.Run).experiment.study,
  )


@pytest.mark.slow
def test_the_command_leaves_rows_and_pictures(trial):
  folder, rows, study = trial
  for name in ("sweep.png", "tradeoff.png"):
    assert (folder / name).read_bytes()[:4] == b"\x89PNG"
  assert set(rows) == set(study.arms) == {"full", "LoRA r=1"}
  row = rows["LoRA r=1"]
  n = len(row["ks"])
  assert np.shape(row["heldout"]) == np.shape(row["rank90"]) == (n, 2)
  assert np.shape(row["curve"]) == (n, 2, 4)
  assert row["ks"] == list(range(row["ks"][0], row["ks"][0] + n))
  # Rank 1 of matrices of side 32, or none where no sample was ever rewarded:
  # four steps of four draws, and which are drawn depends on the last bit.
  rank = np.asarray(row["rank"])
  np.testing.assert_allclose(rank[rank > 0], 1 / 32, atol=1e-6)
  assert np.any(rank > 0)


@pytest.mark.slow
def test_a_base_of_other_settings_is_refused(trial):
  folder, _, study = trial
  more = config.read(RUN, [*TINY, "study.Study.base_steps=31"], protocol.Run)
  with pytest.raises(UserError, match=r"base.npz: was made from other"):
    more.experiment.study.base(folder)
  # The arms of a study may change: what they share does not.
  assert study.settings("full") == config.read(
    RUN, [*TINY, "lora_arms.policy.ranks=(2,)"], protocol.Run
  ).experiment.study.settings("full")


@pytest.mark.slow
def test_a_row_is_the_plain_training_loop(trial):
  """One rate, one seed, step by step."""
  folder, rows, made = trial
  (arm,) = (a for a in made.variants if a.name == "LoRA r=1")
  data = lr_grid.study_data(made, made.base(folder))
  row = rows[arm.name]
  seed, k = 1, 2
  params = arm.transform(data.bases[0], jax.random.key(seed))
  tx = arm.optimizer(lambda count: 10 ** (row["ks"][k] / 2))
  now = state.create(params, arm.trainable, tx)
  update = jax.jit(step.make_train_step(data.objective, tx))
  key = jax.random.fold_in(jax.random.key(17), seed)
  order = jax.random.randint(
    jax.random.fold_in(key, 1), (4, 4), 0, data.pool.shape[0]
  )
  for i, places in enumerate(order):
    now, metrics = update(now, lr_grid._batch(data.pool[places]), key)
    want = row["curve"][k][seed][i]
    assert float(metrics["loss"]) == pytest.approx(want, abs=2e-5)
  found = lr_grid._loss(data.objective, now.params, data.evaluations["heldout"])
  assert float(found) == pytest.approx(row["heldout"][k][seed], abs=2e-5)


def test_the_grid_grows_until_the_best_is_inside(monkeypatch):
  """A valley at k = -10, three half-decades below the first grid."""

  def found(rates):
    k = 2 * jnp.log10(rates)[:, None]
    losses = jnp.abs(k + 10) * jnp.ones((1, 2))
    return {"validation": losses, "heldout": losses}

  monkeypatch.setattr(lr_grid, "_compiled", lambda *_: found)
  model = support.model(width=32, head_dim=8)
  rows = jnp.zeros((1, 3), jnp.int32)
  data = lr_grid.StudyData(None, [support.params(model)], rows, {})
  made = config.read(RUN, root=protocol.Run).experiment.study
  row = lr_grid.sweep(made, arms.FULL, data)
  assert row["ks"] == list(range(-11, -3)) and row["inside"]
  assert row["ks"][row["best"]] == -10
  assert verdicts.optimum(row) == pytest.approx(1e-5)
  assert lr_grid.best_of(np.array([[np.nan], [2.0], [1.0]])) == 2


@pytest.mark.slow
def test_the_policy_gradient_is_that_of_the_expected_reward():
  """The mean of the estimates over many draws against the exact gradient."""
  model = support.model(width=32, head_dim=8)
  objective = bandit.Bandit(model=model, actions=4)
  params = {**support.params(model)}
  head, rest = tree.partition(params, "^head")
  batch = {"tokens": support.tokens(batch=16, length=4)}

  def value(head, key):
    total, weight, _ = objective(tree.combine(head, rest), batch, key)
    return total / weight

  exact = jax.jit(jax.grad(value), static_argnums=1)(head, None)["head"]
  keys = jax.random.split(jax.random.key(0), 512)
  each = jax.jit(
    lambda head: jax.lax.map(lambda k: jax.grad(value)(head, k), keys)
  )(head)["head"]
  error = each.std(0) / 512**0.5
  # The baseline contains a prompt's own reward: 1 - 1 / B of the gradient.
  bias = 1 - 1 / 16
  assert (jnp.abs(each.mean(0) - bias * exact) < 5 * error + 1e-6).all()
  used = jnp.abs(exact[:, :4]).max()
  assert used > 10 * error.max() and not exact[:, 4:].any()
  chex.assert_tree_all_finite(exact)


def _row(loss, group="LoRA", k=-6, **more):
  """A row with a parabola around `loss` at rate 10^(k/2)."""
  noise = np.array([-1e-3, 0, 1e-3])
  table = np.array([loss + 0.05, loss, loss + 0.05])[:, None] + noise
  same = {name: np.full((3, 3), v).tolist() for name, v in more.items()}
  losses = table.tolist()
  return {
    "arm": group,
    "group": group,
    "trained": 10,
    "side": 64,
    "ks": [k - 1, k, k + 1],
    "best": 1,
    "inside": True,
    "validation": losses,
    "heldout": losses,
    "known": losses,
    "before": {"heldout": 4.0},
    **same,
  }


def _of_seeds(row, name, values):
  """A row whose seeds have other values at the best rate."""
  table = [list(x) for x in row[name]]
  table[row["best"]] = list(values)
  return row | {name: table}


@pytest.mark.parametrize(
  ("losses", "holds"),
  [
    ((2.05, 2.05, 2.05), True),
    ((2.30, 2.30, 2.30), False),
    ((2.00, 2.10, 2.15), None),  # 91% in the mean, and not surely 90%
  ],
)
def test_a_share_of_the_gain_is_recovered_over_seeds(losses, holds):
  rows = {
    "full": _row(1.90, "full"),
    "LoRA r=2": _of_seeds(_row(2.05, "rank", k=-4), "heldout", losses),
  }
  rate, gain = verdicts.width(rows)
  assert (rate.holds, gain.holds) == (True, holds)
  rewards = verdicts.policy(
    {
      "full": _row(0.1, "full"),
      "LoRA r=1": _of_seeds(_row(0.1, "rank", k=-4), "heldout", losses),
    }
  )
  assert rewards[0].holds is (False if holds is False else rewards[0].holds)


def _capacity(**changes):
  """Rows of which all is so that is claimed, but for some."""
  curve = np.ones((3, 3, 20)).tolist()

  def row(loss, group, known, k=-5):
    return _row(loss, group, k=k, known=known, rank90=20.0) | {"curve": curve}

  rows = {
    "full": row(1.90, "full", 3.2, k=-7),
    "LoRA r=1": row(1.96, "rank", 2.6),
    "LoRA r=16": row(1.94, "rank", 2.8),
    "LoRA r=64": row(1.91, "rank", 3.0),
    "attention": row(1.96, "place", 2.7) | {"trained": 20},
    "mlp": row(1.93, "place", 2.7),
    "rsLoRA": row(1.91, "scale", 3.0, k=-6),
  }
  return rows | changes


def test_verdicts_on_capacity_are_over_seeds():
  rows = _capacity()
  assert [v.holds for v in verdicts.capacity(rows)] == [True] * 10
  for name, values, number in (
    ("known", (2.7, 2.9, 3.4), 7),  # of rank 64: as much as 16 for one seed
    ("rank90", (10.0, 20.0, 60.0), 9),
  ):
    arm = "LoRA r=64" if name == "known" else "full"
    other = _capacity(**{arm: _of_seeds(rows[arm], name, values)})
    assert verdicts.capacity(other)[number].holds is None


def test_verdicts_on_pretraining_can_be_false():
  rows = {
    "full": _row(1.5, rank=1.0),
    "GaLore r=4": _row(1.6, rank=0.5),
    "LoRA r=4": _row(1.8, rank=4 / 64),
    "ReLoRA r=4": _row(1.7, rank=20 / 64),
    "ReLoRA r=4, no reset": _row(1.9, rank=20 / 64),
  }
  assert all(v.holds for v in verdicts.pretraining(rows))
  for name, row in {
    "GaLore r=4": _row(1.75, rank=0.5),
    "ReLoRA r=4": _row(1.95, rank=8 / 64),
  }.items():
    found = verdicts.pretraining({**rows, name: row})
    assert not all(v.holds for v in found)


def test_verdicts_on_methods_can_be_false():
  rows = {
    "full": _row(1.8, "full"),
    "LoRA": _row(1.90),
    "DoRA": _row(1.91),
    "C3A": _row(1.93, "high rank", k=-2),
  }
  assert all(v.holds for v in verdicts.methods(rows)[:4])
  worse = verdicts.methods(rows | {"DoRA": _row(2.1)})
  assert not worse[0].holds and not worse[1].holds
  # Of LoRA and DoRA one, LoRA itself; C3A is within 2%, too.
  assert worse[0].found.startswith("1 of 2; ")
  assert worse[1].found.startswith("2 of 3; ")
  better = verdicts.methods(rows | {"DoRA": _row(1.85)})
  assert better[2].holds is False


def test_many_comparisons_are_corrected():
  """One arm of many is ahead by its interval alone: that decides nothing."""
  rows = {"full": _row(1.8, "full"), "LoRA": _row(1.90), "C3A": _row(1.93)}
  lucky = _row(1.90)
  at = lucky["heldout"][lucky["best"]]
  lucky["heldout"][lucky["best"]] = [
    x - d for x, d in zip(at, (4e-3, 5e-3, 6e-3), strict=True)
  ]
  many = {f"{i}": lucky for i in range(20)}
  (alone,) = [
    v
    for v in verdicts.methods(rows | {"DoRA": lucky})
    if "no method" in v.claim
  ]
  (of_many,) = [
    v for v in verdicts.methods(rows | many) if "no method" in v.claim
  ]
  assert alone.holds is False and of_many.holds is None
  assert "0 by 0.005 ± 0.002" in of_many.found
  assert "Holm's correction for 21: none" in of_many.found
