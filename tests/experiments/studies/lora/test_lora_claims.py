"""Studies: what a row is, what verdicts need, and the command."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.core import cli, config
from experiments.studies import population, study
from experiments.studies.lora import bandit, lora_claims
from experiments.studies.lora import lora_arms as arms
from experiments.studies.lora import lora_verdicts as verdicts
from research import tree
from research.training import state, step
from research.typing import UserError
from tests import support

RUNS = sorted(
  str(p.relative_to(config.CONFIGS))
  for p in config.CONFIGS.glob("runs/lora/claims_*.gin")
)
TINY = (
  *("presets.Sizes.width=32", "presets.Sizes.depth=1"),
  "presets.Sizes.head_dim=8",
  *("presets.Sizes.hidden=32", "study.Study.base_steps=30"),
  *("study.Study.steps=4", "study.Study.seeds=2", "study.Study.batch=4"),
)


@pytest.mark.parametrize("run", RUNS)
def test_every_study_parses_and_its_text_rebuilds_it(run):
  first = config.read(run, root=study.Study)
  again = config.parse(first.text, root=study.Study)
  assert again.text == first.text
  assert [a.name for a in again.experiment.arms] == [
    a.name for a in first.experiment.arms
  ]


def test_arms_have_names_of_their_own():
  made = config.read(RUNS[0], root=study.Study).experiment
  with pytest.raises(UserError, match="two are called 'full'"):
    dataclasses.replace(made, arms=(arms.FULL, arms.FULL))


@pytest.fixture(scope="module", name="trial")
def _trial(tmp_path_factory):
  """The command on a tiny study: its folder, its rows, how to run it again."""
  folder = tmp_path_factory.mktemp("study")

  def run(*more):
    bindings = (*TINY, "lora_arms.policy.ranks=(1,)", *more)
    return cli.call(
      lora_claims.main,
      [
        "lora_claims",
        "--config=runs/lora/claims_policy.gin",
        f"--workdir={folder}",
        *(f"--set={b}" for b in bindings),
      ],
    )

  assert run() == 0
  rows = [json.loads(p.read_text()) for p in (folder / "arms").iterdir()]
  return folder, {row["arm"]: row for row in rows}, run


def test_the_command_leaves_what_it_says(trial, capsys):
  folder, rows, run = trial
  for name in ("sweep.png", "tradeoff.png"):
    assert (folder / name).read_bytes()[:4] == b"\x89PNG"
  assert list(rows) and set(rows) == {"full", "LoRA r=1"}
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
  capsys.readouterr()
  assert run() == 0  # nothing is run twice
  out = capsys.readouterr().out
  assert "to run" not in out
  assert json.loads(out.splitlines()[-1]) == json.loads(
    (folder / "result.json").read_text()
  )


def test_without_all_arms_there_is_no_verdict(trial, tmp_path, capsys):
  folder, _, _ = trial
  (tmp_path / "arms").mkdir()
  (kept,) = (folder / "arms").glob("LoRA*")
  (tmp_path / "arms" / kept.name).write_text(kept.read_text())
  argv = [
    "lora_claims",
    "--config=runs/lora/claims_policy.gin",
    *(f"--set={b}" for b in (*TINY, "lora_arms.policy.ranks=(1,)")),
  ]

  def run(folder, only):
    more = [f"--workdir={folder}", f"--only={only}"]
    code = cli.call(lora_claims.main, [*argv, *more])
    return code, capsys.readouterr()

  code, said = run(tmp_path, "^LoRA")  # of which none is missing
  result = json.loads(said.out.splitlines()[-1])
  assert code == 0 and result["missing"] == ["full"]
  assert [line["arm"] for line in result["arms"]] == ["LoRA r=1"]
  assert not (tmp_path / "result.json").exists()
  for text, wrong in (("(", "no regular expression"), ("none", "no arm")):
    code, said = run(tmp_path / wrong, text)
    assert code == 1 and f"--only={text}: " in said.err and wrong in said.err


def test_another_configuration_is_refused(trial, capsys):
  _, _, run = trial
  assert run("study.Study.base_steps=31") == 1
  assert "differs from this configuration" in capsys.readouterr().err


def test_a_row_is_the_plain_training_loop(trial):
  """One rate, one seed, step by step."""
  folder, rows, _ = trial
  made = config.read(str(folder / "config.gin"), root=study.Study).experiment
  arm = next(a for a in made.arms if a.name == "LoRA r=1")
  on = population.ground(made, lora_claims._base(made, folder))
  row = rows[arm.name]
  seed, k = 1, 2
  params = arm.transform(on.bases[0], jax.random.key(seed))
  tx = arm.optimizer(lambda count: 10 ** (row["ks"][k] / 2))
  now = state.create(params, arm.trainable, tx)
  update = jax.jit(step.make_train_step(on.objective, tx))
  key = jax.random.fold_in(jax.random.key(17), seed)
  order = jax.random.randint(
    jax.random.fold_in(key, 1), (4, 4), 0, on.pool.shape[0]
  )
  for i, places in enumerate(order):
    now, metrics = update(now, population._batch(on.pool[places]), key)
    want = row["curve"][k][seed][i]
    assert float(metrics["loss"]) == pytest.approx(want, abs=2e-5)
  found = population._loss(on.objective, now.params, on.evaluations["heldout"])
  assert float(found) == pytest.approx(row["heldout"][k][seed], abs=2e-5)


def test_the_grid_grows_until_the_best_is_inside(monkeypatch):
  """A valley at k = -10, three half-decades below the first grid."""

  def found(rates):
    k = 2 * jnp.log10(rates)[:, None]
    losses = jnp.abs(k + 10) * jnp.ones((1, 2))
    return {"validation": losses, "heldout": losses}

  monkeypatch.setattr(population, "_population", lambda *_: found)
  model = support.model(width=32, head_dim=8)
  rows = jnp.zeros((1, 3), jnp.int32)
  on = population.Ground(None, [support.params(model)], rows, {})
  made = config.read(RUNS[0], root=study.Study).experiment
  row = population.sweep(made, arms.FULL, on)
  assert row["ks"] == list(range(-11, -3)) and row["inside"]
  assert row["ks"][row["best"]] == -10
  assert verdicts.optimum(row) == pytest.approx(1e-5)
  assert population.best_of(np.array([[np.nan], [2.0], [1.0]])) == 2


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
  assert not better[2].holds


def test_an_interval_is_students():
  """Of 1, 2, 3: standard error 1 / sqrt 3, t of two degrees 4.303."""
  found = verdicts.mean([1.0, 2.0, 3.0])
  assert found.value == 2 and found.half == pytest.approx(2.4843, abs=1e-3)
  assert verdicts.mean([1.0]).half == np.inf
