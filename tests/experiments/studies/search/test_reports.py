"""Tables of pools, against rows whose truth is known."""

import numpy as np
import pytest

from experiments.core import config
from experiments.studies import protocol
from experiments.studies.search import reports, scores
from experiments.studies.search.systems import System
from research.typing import UserError

POOL, FIRST, SECOND = (System(step=x) for x in ("pool", "first", "second"))


def row(**fields):
  return {"samples": [], "right": [], "each": []} | fields


def test_reward_models_have_an_interval_where_there_are_seeds():
  rows = {FIRST: [{"f1": 0.5, "auc": 0.8}, {"f1": 0.7, "auc": 0.8}]}
  rows |= {SECOND: [{"f1": 0.25, "auc": 0.5}], POOL: []}
  table = scores.RewardModels(systems=(FIRST, SECOND, POOL))
  first, second = table.lines(rows.get)
  assert first["F1 of first errors, %"].value == pytest.approx(60)
  assert first["AUC, %"].half == pytest.approx(0, abs=1e-6)
  assert second["F1 of first errors, %"] == 25 and second["seeds"] == 1
  # Newer rows say what random scores reach on the same solutions.
  rows[FIRST] = [x | {"f1_random": 0.2} for x in rows[FIRST]]
  chance = table.lines(rows.get)[-1]
  assert chance["learned"] == "nothing: random scores"
  assert chance["F1 of first errors, %"].value == pytest.approx(20)
  assert chance["AUC, %"].value == 50 and chance["seeds"] == 2


def test_budgets_are_a_pool_s_own_estimates():
  def estimates(shift):
    return {
      "k": [1, 2],
      "pass": [[0.2 + shift, 0.1, 0.3], [0.4 + shift, 0.3, 0.6]],
      "majority": [[0.2, 0.1, 0.3], [0.3, 0.1, 0.4]],
      "flops": [2e6, 5e6],
    }

  cost = {"n": 2, "prompt_flops_policy": 1e6, "flops_policy": 3e6}
  cost |= {"flops_verifier": 2e6}
  rows = {
    POOL: [row(estimates=estimates(x), **cost) for x in (0.0, 0.1)],
    FIRST: [],
  }
  one, two = reports.Budgets(pools=(FIRST, POOL)).lines(rows.get)
  assert one["samples"] == 1 and two["samples"] == 2
  assert two["any is right (pass@k), %"] == pytest.approx((45, 15))
  # An interval that is not symmetric is shown by its larger half.
  assert two["vote (maj@k), %"] == pytest.approx((30, 20))
  # The verifier's are not among them: neither a vote nor a check asks it.
  assert one["MFLOP a problem"] == 2 and two["MFLOP a problem"] == 3


def test_each_part_s_line_is_what_is_left_without_it():
  # Seed by seed, the whole is right on what the rest misses.
  whole = [[1.0] * 8, [1.0] * 8]
  rest = [[1.0, 0.0] * 4, [0.0, 1.0] * 4]
  cost = {"n": 2, "flops_policy": 2e6, "flops_verifier": 2e6}
  rows = {
    FIRST: [row(each=x, samples=[2], **cost) for x in whole],
    SECOND: [row(each=x, samples=[2], **cost) for x in rest],
    POOL: [{"parameter_bytes": 1500}, {"parameter_bytes": 1500}],
  }
  none = System(step="none")
  parts = [
    reports.Removed(part=part, system=system, models=(POOL, POOL))
    for part, system in (("", FIRST), ("search", SECOND), ("more", none))
  ]
  table = reports.Ablation(whole=parts[0], without=tuple(parts[1:]))
  every, less = table.lines(lambda x: rows.get(x, []))
  assert every["without"] == "(nothing)" and every["points"] == ""
  assert every["right, %"].value == 100 and less["right, %"].value == 50
  assert less["points"] == -50 and less["from"] <= -50 <= less["to"]
  assert less["MFLOP a problem"] == 4 and less["KB of weights"] == 3
  assert not table.lines(lambda x: [])


def test_levels_are_those_of_a_pool_that_no_system_shares():
  """One system is good at easy problems only, the other at hard ones only."""
  n = 20
  easy = np.arange(n) < n // 2
  rows = {
    POOL: [row(samples=[4] * n, right=np.where(easy, 3, 0).tolist())],
    FIRST: [row(each=easy.astype(float).tolist())],
    SECOND: [row(each=(~easy).astype(float).tolist())],
  }
  lines = reports.ByDifficulty(pool=POOL, compared=(FIRST, SECOND)).lines(
    rows.get
  )
  found = {line["problems"]: line for line in lines}
  assert "medium (from 10%)" not in found
  assert found["easy (from 50%)"]["n"] == found["hard"]["n"] == n // 2
  assert found["easy (from 50%)"]["first"] == found["hard"]["second"] == 100
  assert found["all"]["first"] == found["all"]["second"] == 50
  assert found["the best for each level, cross-validated"]["first"] == 100
  assert found["the best for all, cross-validated"]["first"] == 50
  # The second one is paired with the first, problem by problem.
  ahead = "second: points ahead of the first"
  # Ten of ten are not all: (n / (n + 2)) - z sqrt(4 (n + 1) / (n + 2)^3).
  low = 10 / 12 - 1.959964 * (44 / 12**3) ** 0.5
  all_of_ten = pytest.approx((100, 100 * (1 - low)))
  assert found["hard"][ahead] == all_of_ten
  assert found["easy (from 50%)"][ahead].times(-1) == all_of_ten
  assert found["all"][ahead].value == pytest.approx(0, abs=1e-9)
  assert found["all"][ahead].half > 20
  gained = found["points between these two"]["first"]
  assert gained.value == 50 and 0 < gained.half < 50
  # One of medium difficulty cannot choose and be reported: it joins a level.
  rows[POOL] = [row(samples=[4] * n, right=[3] * (n // 2) + [1] + [0] * 9)]
  table = reports.ByDifficulty(pool=POOL, compared=(FIRST, SECOND))
  alone = {line["problems"]: line for line in table.lines(rows.get)}
  assert alone["medium (from 10%)"]["n"] == 1
  assert alone["the best for each level, cross-validated"]["first"] == 95
  rows[SECOND] = []
  assert not reports.ByDifficulty(pool=POOL, compared=(SECOND,)).lines(rows.get)


def test_each_kind_of_wrong_solution_has_its_line():
  few = {"share": 0.01, "below": 0.5}
  first = {"cut": few, "false": {"share": 0.6, "below": 0.75}}
  other = {"false": {"share": 0.6, "below": None}}
  rows = {FIRST: [row(wrong=first)], SECOND: [row(wrong=other)], POOL: [row()]}
  report = scores.WrongSolutions(systems=(FIRST, SECOND))
  assert report.lines(rows.get) == [
    {
      "what is wrong": "false",
      "of all samples, %": 60,
      "first": 75,
      "second": None,
    }
  ]


def test_coverage_is_predicted_from_few_samples():
  """Chances of success are Beta(0.3, 2), whose coverage is known."""
  rng = np.random.default_rng(0)
  chances, n = rng.beta(0.3, 2.0, 2000), 160
  rows = [row(samples=[n] * 2000, right=rng.binomial(n, chances).tolist())]
  lines = reports.Extrapolated(pool=POOL).lines(lambda _: rows)
  last = lines[-1]
  exact = 100 * np.mean(1 - (1 - chances) ** 160)
  # Of 2,000 problems, half of a point is a standard error of the fit's.
  assert last["samples"] == 160
  assert last["measured, %"] == pytest.approx(exact, abs=0.5)
  assert last["Beta of 16"] == pytest.approx(exact, abs=2)
  assert lines[0]["measured, %"] < lines[1]["measured, %"] < exact
  with pytest.raises(UserError, match="found 320 samples, expected at most"):
    reports.Extrapolated(pool=POOL, budgets=(320,)).lines(lambda _: rows)


@pytest.mark.parametrize("right, wrong", [(0.9, 0.1), (1.0, 0.0), (0.5, 0.5)])
def test_a_verifier_that_errs_is_as_good_as_predicted(right, wrong):
  """Simulated by its definition: a random one of the accepted samples."""
  rng = np.random.default_rng(1)
  problems, n = 4000, 8
  correct = rng.random((problems, n)) < rng.beta(1.0, 2.0, problems)[:, None]
  accepted = rng.random((problems, n)) < np.where(correct, right, wrong)
  each = [
    correct[i][accepted[i]].mean() if accepted[i].any() else correct[i].mean()
    for i in range(problems)
  ]
  rows = [
    row(
      n=n,
      each=each,
      samples=[n] * problems,
      right=correct.sum(axis=1).tolist(),
    )
  ]
  noisy = reports.Noisy(system=POOL, right=right, wrong=wrong)
  (line,) = reports.NoisePlateau(verifiers=(noisy,)).lines(lambda _: rows)
  assert line["samples"] == n
  error = 100 * np.std(each) / np.sqrt(problems)
  assert line["measured, %"] == pytest.approx(
    line["predicted, %"], abs=4 * error
  )
  assert line["plateau, %"] >= line["predicted, %"] - 1e-6


def test_the_experiment_on_labels_can_be_configured():
  """Each command stands after those that it needs, and reports have systems."""
  study = config.read(
    "runs/search/claims_countdown_labels.gin", root=protocol.Run
  ).experiment.study
  settings = [study.settings(arm) for arm in study.arms]
  assert len(set(settings)) == len(settings)
  for noisy in study.reports[3].verifiers:
    (step,) = (x for x in study.steps if x.name == noisy.system.step)
    assert f"free_verifiers.ExactSteps.right={noisy.right}" in step.set
    assert f"free_verifiers.ExactSteps.wrong={noisy.wrong}" in step.set
  assert [len(x) for x in study.tables({})] == [0] * 8


def test_the_experiment_on_rewards_can_be_configured():
  """Policies are optimized against reward models of the other experiment."""
  study, labels = (
    config.read(
      f"runs/search/claims_countdown_{name}.gin", root=protocol.Run
    ).experiment.study
    for name in ("attacks", "labels")
  )
  arms = [study.settings(arm) for arm in study.arms]
  assert len(set(arms)) == len(arms) == 11
  shared = set(study.arms) & set(labels.arms)
  assert len(shared) == 5
  assert all(study.settings(x) == labels.settings(x) for x in shared)
  # No system is shown by itself: the report is the only table.
  assert study.tables({}) == [[]]


def test_the_study_of_sums_can_be_configured():
  """What GRPO teaches is searched, and does not practise what is asked."""
  study = config.read(
    "runs/search/claims_grpo_smollm2.gin", ["SEEDS=1"], root=protocol.Run
  ).experiment.study
  before, grpo, after = (study.settings(arm) for arm in study.arms)
  assert "VerifiedTask.excluding = @heldout/gym.Gym()" in grpo
  assert "heldout/gym.Gym.split = 'heldout'" in grpo
  assert "POLICY = @experiment.Pretrained()" in before
  assert "Trained.workdir = 'grpo'" in after and grpo in after
