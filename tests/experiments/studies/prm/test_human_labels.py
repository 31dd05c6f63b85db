"""Scorers against people's labels: planted scores, sklearn, enumerations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from experiments.core import config
from experiments.searching.prompts import IdWords
from experiments.studies import protocol
from experiments.studies.prm import human_labels, judging, scorers, states
from research.interop.loaded import Loaded
from research.nn import presets, rope
from research.prm import rows
from research.prm.labelled import LabelledSolution, labels_until
from research.prm.scores import calibration, processbench
from research.typing import UserError


def solutions(problems=30, seed=0):
  """Two solutions a problem, of which three in four have a wrong step."""
  rng = np.random.default_rng(seed)
  found = []
  for i in range(2 * problems):
    n = int(rng.integers(2, 7))
    first = -1 if i % 4 == 0 else int(rng.integers(n))
    steps = tuple(str(int(x)) + "\n\n" for x in rng.integers(0, 9, n))
    found.append(
      LabelledSolution(
        prompt=f"the problem {i // 2}",
        steps=steps,
        labels=labels_until(first, n),
        problem_id=f"P{i // 2}",
        policy_id="ab"[i % 2],
        label_source="human_first_error",
      )
    )
  return found


def planted(given, noise, seed=1):
  """States of which one number knows whether a step is the first wrong one."""
  rng = np.random.default_rng(seed)
  found = []
  for one in given:
    x = rng.standard_normal((len(one.steps), 3))
    right = [i != one.first_error for i in range(len(one.steps))]
    x[:, 1] = 2 * np.array(right) - 1 + noise * x[:, 1]
    found.append(x)
  return scorers.Labelled(given, found)


# --- probes ---


@pytest.mark.parametrize("constant", [7.0, 0.1])
def test_a_probe_is_that_of_sklearn(constant):
  """Its C of a sum of losses is 1 / (N strength) of a mean."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((60, 4)) * [1, 3, 0.1, 1] + [0, 5, 0, 0]
  x[:, 3] = constant  # which no scale divides
  y = (x[:, 0] + rng.standard_normal(60) > 0.2).astype(float)
  strength = 0.05
  other = make_pipeline(
    StandardScaler(),
    LogisticRegression(C=1 / (60 * strength), tol=1e-10, max_iter=1000),
  ).fit(x, y)
  fitted = scorers.fit(x, y, strength)
  for last in (constant, constant + 1):  # which nothing was learned of
    x[:, 3] = last
    expected = other.predict_proba(x)[:, 1]
    # Both stop at gradients of about 1e-5 of a loss whose curvature is 0.05.
    np.testing.assert_allclose(fitted(x), expected, atol=1e-3)


def test_what_is_learned_of_a_solution():
  right, wrong = (
    LabelledSolution(
      prompt="p", steps=("ab", "c", "def"), labels=labels_until(first, 3)
    )
    for first in (-1, 1)
  )
  assert scorers.verdict(right) == [1, 1, 1]
  assert scorers.verdict(wrong) == [0, 0, 0]
  assert scorers.last_verdict(wrong) == [None, None, 0]
  (found,) = scorers.lengths(scorers.Labelled([right], []))
  expected = [[0, 2, 0], [1, 1, 2], [2, 3, 3]]
  np.testing.assert_allclose(found[:, 0], [x[0] for x in expected])
  np.testing.assert_allclose(np.expm1(found[:, 1:]), np.array(expected)[:, 1:])


# --- judging ---


def test_statistics_of_resampled_problems_are_those_of_repeated_ones():
  given = solutions(6)
  truth = [x.first_error for x in given]
  rng = np.random.default_rng(3)
  # Of few values, so that there are ties.
  scores = [rng.integers(0, 4, len(x.steps)) / 4 for x in given]
  predicted = [int(rng.integers(-1, 3)) for _ in given]
  weights = rng.integers(0, 3, len(given))
  repeated = np.repeat(np.arange(len(given)), weights)
  pairs = [
    (score, label)
    for i in repeated
    for score, label in zip(scores[i], given[i].labels, strict=True)
    if label is not None
  ]
  auc = judging.auc_of(scores, truth)(weights.astype(float))
  assert auc == pytest.approx(calibration.auc(*np.array(pairs, float).T))
  f1 = judging.f1_of(predicted, truth)(weights.astype(float))
  other = processbench(
    [predicted[i] for i in repeated], [truth[i] for i in repeated]
  )
  assert f1 == pytest.approx(other.f1)


def test_intervals_are_over_problems():
  """One number a problem: its mean's standard error is known."""
  n = 50
  values = np.repeat(np.random.default_rng(0).standard_normal(n), 2)
  found = judging.estimate(
    lambda w: float(np.average(values, weights=w)),
    [f"P{i // 2}" for i in range(2 * n)],
  )
  half = 1.96 * values.std() / np.sqrt(n)
  assert found.value == pytest.approx(values.mean())
  # 2,000 resamples know their quantiles to about 5%.
  assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.12)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remembers:
  """Knows the solutions that it learned from, and guesses others."""

  name: str = "remembers"
  strengths: tuple[float, ...] = (0.0,)
  everything: bool = False

  def scores(self, train, test, strength):
    rng = np.random.default_rng(len(train.solutions))
    known = {one.problem_id for one in train.solutions}
    found = []
    for one in test.solutions:
      right = np.arange(len(one.steps)) != one.first_error
      knows = self.everything or one.problem_id in known
      found.append(right.astype(float) if knows else rng.random(len(right)))
    return found


def test_nothing_is_scored_by_what_learned_from_its_problem():
  data = planted(solutions(40), 0.0)
  truth = [x.first_error for x in data.solutions]
  ones = np.ones(len(truth))

  def f1(scorer):
    found = judging.cross_validated(scorer, data, 4, 3, 0)
    assert judging.f1_of(found.predicted, truth)(ones) == pytest.approx(
      processbench(found.predicted, truth).f1
    )
    return judging.f1_of(found.predicted, truth)(ones)

  assert f1(Remembers(everything=True)) == 1
  assert f1(Remembers()) < 0.6
  folds = judging.folds_of(data.solutions, 4, 0)
  assert np.bincount(folds).tolist() == [20, 20, 20, 20]
  assert (folds[::2] == folds[1::2]).all()
  # ProcessBench names samples; those of one text are of one problem.
  samples = [
    dataclasses.replace(x, problem_id=f"S{i}")
    for i, x in enumerate(data.solutions)
  ]
  folds = judging.folds_of(samples, 4, 0)
  assert np.bincount(folds).tolist() == [20, 20, 20, 20]
  assert (folds[::2] == folds[1::2]).all()
  assert len(set(judging.problems_of(samples))) == 40


# --- states ---


SEEDS = {"tiny": 0}
"""Of the weights that a name stands for."""


@dataclasses.dataclass(frozen=True)
class Tiny:
  """A model of ids."""

  context: int | None = None
  scaling: rope.Scaling | None = None

  def load(self, shardings=None):
    sizes = presets.Sizes(
      **dict(vocab=10, width=8, depth=1, heads=2, kv_heads=1, hidden=16),
      head_dim=4,
    )
    model = presets.transformer(presets.FAMILIES["llama"], sizes)
    (block,) = model.stack.blocks
    turned = dataclasses.replace(block.attention.rope, scaling=self.scaling)
    block = block.clone(attention=block.attention.clone(rope=turned))
    stack = dataclasses.replace(model.stack, blocks=(block,))
    model = model.clone(max_positions=self.context, stack=stack)
    tokens = jnp.zeros((1, 1), jnp.int32)
    key = jax.random.key(SEEDS["tiny"])
    params = model.init(key, tokens)["params"]
    return Loaded(model, params, IdWords(), {})


@pytest.mark.slow
@pytest.mark.parametrize(
  "scaling", [None, rope.Dynamic(factor=4.0, original=2)]
)
def test_states_are_those_of_solutions_read_alone(
  scaling, tmp_path, monkeypatch
):
  # Of 82 tokens and of 3 and 4, which are a batch.
  texts = ("1 2 " * 40, "3"), ("4\n\n", "5"), ("4\n\n", "6 7")
  given = [
    LabelledSolution(prompt="5", steps=x, labels=(1, 1), problem_id="P")
    for x in texts
  ]
  reader = states.FrozenStates(model=Tiny(scaling=scaling), tokens=128)
  found = reader.compute(given, tmp_path)
  loaded = reader.model.load()
  read = jax.jit(lambda ids: loaded.model.apply({"params": loaded.params}, ids))
  for one, own in zip(given, found, strict=True):
    ids = IdWords().encode(" ".join((one.prompt, *one.steps)))
    hidden, _ = read(jnp.array([ids], jnp.int32))
    ends = np.cumsum([len(step.split()) for step in one.steps])
    np.testing.assert_allclose(own, hidden[0, ends], atol=1e-5)
  short = dataclasses.replace(reader, model=Tiny(context=20))
  with pytest.raises(UserError, match="P with 82 tokens, expected at most 20"):
    short.compute(given, tmp_path)
  # What is stored is not computed again; other texts are.
  monkeypatch.setattr(states, "_hidden", None)
  again = dataclasses.replace(reader).compute(given, tmp_path)
  np.testing.assert_array_equal(again[-1], found[-1])
  with pytest.raises(TypeError):
    reader.compute(given[:2], tmp_path)
  monkeypatch.setitem(SEEDS, "tiny", 1)  # other weights of the same name
  with pytest.raises(TypeError):
    reader.compute(given, tmp_path)


# --- the study ---


@dataclasses.dataclass(frozen=True)
class Fake:
  """Solutions, and states in which the first wrong step shows."""

  problems: int = 30
  first: int = 0

  def solutions(self):
    return solutions(self.problems)[self.first :]


class Planted(states.FrozenStates):
  """Reads no model."""

  def compute(self, solutions, folder):
    return planted(solutions, 0.4).states


def study(**changes):
  fields = dict(
    data=Fake(),
    states=Planted(model=Tiny()),
    scorers=(
      scorers.Probe(name="steps", labels=rows.truncated, strengths=(0.01,)),
      scorers.Chance(),
    ),
    folds=4,
    inner=2,
  )
  return human_labels.HumanLabels(**fields | changes)


def test_a_probe_finds_what_is_planted_and_chance_does_not(tmp_path):
  made = study()
  shared = made.prepare(tmp_path)
  found = {arm: made.run(arm, {}, shared) for arm in made.arms}
  probe, chance = made.table(found)
  assert probe["AUC, %"].value > 90 and probe["F1, %"].value > 70
  low = chance["AUC, %"].value - 2 * chance["AUC, %"].half
  assert low < 50 < low + 4 * chance["AUC, %"].half
  assert [x.holds for x in made.verdicts(found)] == [True, True]
  back = dataclasses.replace(made, scorers=made.scorers[::-1])
  assert [x.holds for x in back.verdicts(found)] == [False, False]
  authors = made.tables(found)[1]
  assert [x["solutions"] for x in authors] == [30, 30]
  assert sum(x["wrong"] for x in authors) == 45
  assert authors[0]["AUC, steps, %"] > 85


def test_settings_of_an_arm_are_its_own():
  made = study()
  alone = dataclasses.replace(made, scorers=made.scorers[:1])
  assert alone.settings("steps") == made.settings("steps")
  other = dataclasses.replace(made, seed=1)
  assert other.settings("steps") != made.settings("steps")


def test_data_that_do_not_fit_are_refused(tmp_path):
  with pytest.raises(UserError, match="found 5 problems, expected at least 8"):
    study(data=Fake(5)).prepare(tmp_path)
  with pytest.raises(UserError, match=r"HumanLabels.inner: found 1"):
    study(inner=1)


def test_the_run_file_reads():
  read = config.read("runs/prm/claims_champ.gin", [], root=protocol.Run)
  made = read.experiment.study
  assert made.arms[0] == "step labels" and len(made.arms) == 5
  assert made.settings("random") != made.settings("step labels")
