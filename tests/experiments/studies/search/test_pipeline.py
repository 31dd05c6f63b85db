"""A study whose arms are commands."""

import pathlib
import re

import pytest

from experiments.core import config
from experiments.searching import running
from experiments.studies import protocol
from experiments.studies.search.pipeline import Pipeline, Step
from experiments.studies.search.systems import Comparison, System
from research.typing import UserError
from tests.experiments.searching import parity

TINY = str(pathlib.Path(parity.__file__).with_name("tiny.gin"))
SCORED = (
  "VERIFIER=@verifiers.NewReward()",
  "CHOICE=@choose.BestOf()",
  "search_run.SearchRun.seed={seed}",
)
EVERY = Step(name="every", command="search", path=TINY, set=SCORED)
PAIRS = Step(
  name="pairs", command="search", path=TINY, set=(*SCORED, "N=2"), pool="every"
)
ALONE = Step(name="alone", command="search", path=TINY, seeds=1)
STUDY = Pipeline(
  steps=(EVERY, PAIRS, ALONE),
  shown=(System(step="every"), System(step="pairs"), System(step="alone")),
  comparisons=(
    Comparison(
      claim="c", first=System(step="every"), second=System(step="alone")
    ),
  ),
  curves=(System(step="every"),),
  seeds=2,
)


@pytest.mark.slow
def test_searches_run_and_choose_again_and_are_compared(tmp_path, monkeypatch):
  rows = {"every, seed 0": STUDY.run("every, seed 0", {}, tmp_path)}
  with monkeypatch.context() as patch:
    patch.setattr(
      running.sampling, "Search", lambda *_: pytest.fail("it samples")
    )
    rows["pairs, seed 0"] = STUDY.run("pairs, seed 0", {}, tmp_path)
  for arm in STUDY.arms[2:]:
    rows[arm] = STUDY.run(arm, {}, tmp_path)
  assert list(rows) == STUDY.arms
  every, pairs = rows["every, seed 0"], rows["pairs, seed 0"]
  assert every["n"] == 4 and pairs["n"] == 2 and every["flops_verifier"] > 0
  assert pairs["flops_per_problem"] < every["flops_per_problem"]
  assert every["accuracy"] == pytest.approx(
    sum(every["each"]) / len(every["each"]), abs=1e-6
  )
  wrong = sum(x["share"] for x in every["wrong"].values())
  right = sum(every["right"]) / sum(every["samples"])
  assert wrong == pytest.approx(1 - right)
  assert [line["samples"] for line in STUDY.table(rows)] == [4, 2, 4]
  (found,) = STUDY.verdicts(rows)
  assert re.search(
    "5 problems, 2 and 1 seeds, at 2.*times the FLOPs", found.found
  )
  STUDY.plot(rows, tmp_path, "title")
  assert (tmp_path / "title.png").stat().st_size > 10_000


def test_settings_are_those_of_all_that_an_arm_needs():
  longer = Step(name="policy", command="search", path=TINY, set=("COPIES=2",))
  user = Step(
    name="user",
    command="search",
    path=TINY,
    set=(
      "verifiers.TrainedReward.workdir={policy}",
      "VERIFIER=@verifiers.TrainedReward()",
    ),
  )
  one = Pipeline(steps=(longer, user), seeds=1)
  other = Pipeline(
    steps=(Step(name="policy", command="search", path=TINY), user), seeds=1
  )
  assert one.settings("user, seed 0") != other.settings("user, seed 0")
  again = Step(name="again", command="search", path=TINY, pool="user")
  three = Pipeline(steps=(longer, user, again), seeds=1)
  needed = [list(three.needs(arm)) for arm in three.arms]
  assert needed == [[], ["policy, seed 0"], ["user, seed 0"]]
  alone = Pipeline(steps=(longer, ALONE), seeds=1)
  again = Pipeline(steps=(Step(name="x", command="search", path=TINY), ALONE))
  assert alone.settings("alone, seed 0") == again.settings("alone, seed 0")


@pytest.mark.parametrize(
  "path, arm, setting",
  [
    ("runs/search/claims_countdown.gin", "large_pool", "WIDTH = 96"),
    (
      "runs/tour/tour.gin",
      "vision_frozen",
      "TRAINABLE = '^(vision|connector)/'",
    ),
  ],
)
def test_an_experiment_has_what_its_claims_name(path, arm, setting):
  """Its arms can be configured, each after those that it needs."""
  study = config.read(path, root=protocol.Run).experiment.study
  before = set()
  for step in study.steps:
    used = {x for line in step.set for x in re.findall(r"\{(\w+)\}", line)}
    assert used <= before | {"seed"}, step.name
    assert step.pool is None or step.pool in before
    before.add(step.name)
  settings = {
    step.name: study.settings(f"{step.name}, seed 0") for step in study.steps
  }
  assert len(set(settings.values())) == len(settings)
  assert setting in settings[arm]


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: Step(name="a b", command="train", path=TINY), "expected one word"),
    (lambda: Pipeline(steps=(EVERY, EVERY)), "two are called 'every'"),
    (
      lambda: Pipeline(steps=(EVERY,), shown=(System(step="none"),)),
      "found a system of the step 'none'",
    ),
  ],
)
def test_what_does_not_fit_is_refused(make, message):
  with pytest.raises(UserError, match=message):
    make()
