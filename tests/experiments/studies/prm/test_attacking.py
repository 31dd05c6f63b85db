"""Attacks on scorers: readers whose reaction is known, enumerated AUCs."""

import dataclasses

import numpy as np
import pytest

from experiments.core import config
from experiments.studies import protocol
from experiments.studies.prm import (
  attacking,
  human_labels,
  judging,
  scorers,
  states,
)
from research.prm import attacks, rows
from research.prm.labelled import LabelledSolution, labels_until
from research.prm.scores import calibration
from research.typing import UserError
from tests.experiments.studies.prm.test_human_labels import Tiny

WORDS = (*attacks.MARKERS, *attacks.FILLERS)


@dataclasses.dataclass(frozen=True)
class Sums:
  """Two solutions of each problem, sums that need nothing of each other.

  Three in four have a wrong one; the last step ends without a separator.
  """

  problems: int = 24
  result: str = "="

  def solutions(self):
    rng = np.random.default_rng(0)
    found = []
    for i in range(2 * self.problems):
      n = int(rng.integers(2, 6))
      first = -1 if i % 4 == 0 else int(rng.integers(n))
      steps = []
      for k in range(n):
        a, b = rng.integers(9, size=2) + [1000 * (k + 1), 100 * k]
        steps.append(f"{a} + {b} {self.result} {a + b + (k == first)}")
      found.append(
        LabelledSolution(
          prompt=f"the problem {i // 2}",
          steps=(*(f"{x}\n\n" for x in steps[:-1]), steps[-1]),
          labels=labels_until(first, n),
          problem_id=f"P{i // 2}",
          policy_id="ab"[i % 2],
          label_source="human_first_error",
        )
      )
    return found


class Reader(states.FrozenStates):
  """Reads no model, but labels; words of attacks hide that a step is wrong."""

  calls = []

  def compute(self, solutions, folder):
    del folder
    self.calls.append(len(solutions))
    found = []
    for one in solutions:
      right = np.array([float(x != 0) for x in one.labels])
      wordy = np.array([any(w in x for w in WORDS) for x in one.steps], float)
      found.append(np.stack([right * (1 - wordy) + wordy, 0 * right], axis=1))
    return found


class Deaf(Reader):
  """Reads the labels, whatever the words are."""

  def compute(self, solutions, folder):
    del folder
    right = [np.array([float(x != 0) for x in one.labels]) for one in solutions]
    return [np.stack([x, 0 * x], axis=1) for x in right]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watched:
  """Checks what it learns from; says how much that is, and nothing else."""

  name: str = "watched"
  strengths: tuple[float, ...] = (0.5, 0.25)

  def scores(self, train, test, strength):
    known = {x.prompt for x in train.solutions}
    assert not known & {x.prompt for x in test.solutions}
    text = "".join("".join(x.steps) for x in train.solutions)
    assert not any(word in text for word in WORDS)
    for data in (train, test):
      pairs = zip(data.solutions, data.states, strict=True)
      assert all(len(one.steps) == len(x) for one, x in pairs)
    return [np.full(len(x.steps), strength) for x in test.solutions]


def study(reader=Deaf, **changes):
  fields = dict(
    data=Sums(),
    states=reader(model=Tiny()),
    scorers=(
      scorers.Probe(name="steps", labels=rows.truncated, strengths=(0.01,)),
      scorers.Chance(),
    ),
    folds=4,
    inner=2,
    attacks=("inflated", "reordered", "confident", "corrupted"),
  )
  return human_labels.HumanLabels(**fields | changes)


def run(made, folder):
  shared, found = made.prepare(folder), {}
  for arm in made.arms:
    found[arm] = made.run(arm, found, shared)
    assert made.summary(found[arm])
  return found


def of(lines, attack, scorer="steps"):
  (line,) = (x for x in lines if (x["attack"], x["scorer"]) == (attack, scorer))
  return line


def test_a_reader_of_labels_is_deaf_to_style_and_notices_errors(tmp_path):
  made = study()
  found = run(made, tmp_path)
  _, authors, told, traces = made.tables(found)
  assert [x["solutions"] for x in authors] == [24, 24]
  assert sum("AUC" in title for title in authors[0]) == 2  # of scorers alone
  assert len(told) == len(traces) == 4 * 2
  for attack in ("inflated", "reordered", "confident"):
    line = of(told, attack)
    assert line["AUC before, %"] == line["AUC after, %"] == 100
    assert line["AUC change, own steps, points"].value == 0
    assert line["change of new errors, points"] is None
    # The same states have the same scores.
    assert line["change of right steps, points"] == 0
    assert of(traces, attack)["worst step: change, points"] == 0
    assert of(traces, attack)["worst step: rises, wrong ones, %"] == 0
  assert of(told, "corrupted")["change of new errors, points"].value < -50
  verdicts = {x.claim: x.holds for x in made.verdicts(found)}
  assert len(verdicts) == 2 + 4  # F1 and AUC, and attacks of the first scorer
  holds = [x for claim, x in verdicts.items() if "lowers" in claim]
  assert holds == [None, None, None, True]


def test_words_that_hide_errors_lower_the_auc_and_raise_wrong_ones(tmp_path):
  made = study(Reader, attacks=("inflated", "confident"))
  made = dataclasses.replace(made, scorers=made.scorers[:1])
  found = run(made, tmp_path)
  _, _, told, traces = made.tables(found)
  # Each step has such words, so that a fold's model gives all one score.
  fold = judging.folds_of(made.data.solutions(), 4, made.seed)
  after = found["confident: steps"]["after"]
  for k in range(4):
    assert len({x for i in np.flatnonzero(fold == k) for x in after[i]}) == 1
  line = of(told, "confident")
  assert line["AUC before, %"] == 100
  assert line["AUC after, %"] == pytest.approx(50, abs=10)
  assert line["AUC change, own steps, points"].value < -40
  assert of(traces, "confident")["worst step: rises, wrong ones, %"] == 100
  # Fillers are as good as right steps: a mean rises with them, the worst one
  # does not, and the solution's own steps are told apart as before.
  line, trace = of(told, "inflated"), of(traces, "inflated")
  assert line["AUC change, own steps, points"].value == 0
  assert trace["worst step: rises, wrong ones, %"] == 0
  assert trace["geometric mean: rises, wrong ones, %"] == 100
  arms = {x: f"{x}: steps" for x in ("confident", "inflated")}
  holds = [
    attacking.verdict(k, "steps", found[x]).holds for k, x in arms.items()
  ]
  assert holds == [True, None]


def test_attacked_solutions_are_scored_by_models_of_other_problems(tmp_path):
  """And by the strength that their fold chose."""
  made = study(scorers=(Watched(),))
  shared = made.prepare(tmp_path)
  base = made.run("watched", {}, shared)
  base["strengths"] = [0.1, 0.2, 0.3, 0.4]
  found = made.run("confident: watched", {"watched": base}, shared)
  fold = judging.folds_of(shared.data.solutions, 4, made.seed)
  assert found["indices"] == list(range(48))
  expected = [base["strengths"][k] for k in fold]
  assert [x[0] for x in found["after"]] == expected
  with pytest.raises(UserError, match="found no row of 'watched'"):
    made.run("confident: watched", {}, shared)


def test_changes_are_those_of_labelled_steps():
  """The AUC is an enumeration's, with weights as repeated solutions."""
  rng = np.random.default_rng(1)
  given = Sums(8).solutions()
  changed = [attacks.Inflated()(x) for x in given]
  # Of few values, so that there are ties.
  before = [rng.integers(0, 4, len(x.steps)) / 4 for x in given]
  after = [rng.integers(0, 4, len(x.solution.steps)) / 4 for x in changed]
  row = {
    "before": [x.tolist() for x in before],
    "after": [x.tolist() for x in after],
    "labels_before": [x.labels for x in given],
    "labels_after": [x.solution.labels for x in changed],
    "origins": [x.origin for x in changed],
  }
  weights = rng.integers(0, 3, len(given))
  repeated = np.repeat(np.arange(len(given)), weights)

  def auc(scores):
    pairs = [
      (score, label)
      for i in repeated
      for score, label in zip(scores[i], given[i].labels, strict=True)
      if label is not None
    ]
    return calibration.auc(*np.array(pairs, float).T)

  # A filler stands behind each step.
  expected = auc([x[::2] for x in after]) - auc(before)
  found = attacking.auc_change(row)(weights.astype(float))
  assert found == pytest.approx(expected)
  assert np.isnan(attacking.new_errors(row)(weights.astype(float)))
  row |= {
    "before": [[0.5, 0.5], [0.8]],
    "after": [[0.75, 0.25], [0.2]],
    "labels_before": [[1, 1], [1]],
    "labels_after": [[1, 0], [0]],
    "origins": [[0, 1], [0]],
  }
  change = attacking.new_errors(row)
  assert change(np.array([1.0, 3.0])) == pytest.approx((-0.25 - 3 * 0.6) / 4)


def test_some_problems_are_attacked_with_all_their_solutions():
  given = Sums().solutions()
  every, changed = attacking.change("corrupted", given, None, 0)
  some, fewer = attacking.change("corrupted", given, 5, 0)
  problems = judging.problems_of(given)
  drawn = {problems[i] for i in some}
  assert len(drawn) == 5
  assert some == [i for i in every if problems[i] in drawn]
  assert all(
    changed[every.index(i)] == x for i, x in zip(some, fewer, strict=True)
  )
  # What an attack leaves alone is not attacked.
  assert every == [i for i, x in enumerate(given) if 1 in x.labels]
  assert attacking.change("corrupted", given, 5, 1)[0] != some


def test_attacks_leave_settings_and_results_of_scorers_alone(tmp_path):
  made = study(attacks=("confident", "corrupted"))
  plain = dataclasses.replace(made, attacks=())
  assert plain.arms == ["steps", "random"] == made.arms[:2]
  for arm in plain.arms:
    assert plain.settings(arm) == made.settings(arm)
    assert "attack" not in plain.settings(arm)
  assert made.settings(made.arms[2]) != made.settings(made.arms[4])
  fewer = dataclasses.replace(made, attacked_problems=4)
  assert fewer.settings("steps") == made.settings("steps")
  assert fewer.settings(made.arms[2]) != made.settings(made.arms[2])
  both, alone = run(made, tmp_path), run(plain, tmp_path)
  assert {x: both[x] for x in plain.arms} == alone


def test_attacks_that_change_nothing_or_are_none_are_refused(tmp_path):
  Reader.calls.clear()
  made = study(Reader, data=Sums(result="makes"))
  with pytest.raises(UserError, match="'corrupted', which changes none of 48"):
    made.prepare(tmp_path)
  assert Reader.calls == [48]  # no attacked one
  with pytest.raises(
    UserError, match="found 'loud', expected one of confident"
  ):
    study(attacks=("loud",))
  with pytest.raises(UserError, match="two are called 'inflated'"):
    study(attacks=("inflated", "inflated"))
  with pytest.raises(UserError, match="attacked_problems: found 1"):
    study(attacked_problems=1)


def test_the_run_file_reads():
  read = config.read("runs/prm/claims_champ_attacks.gin", [], root=protocol.Run)
  made = read.experiment.study
  alone = config.read("runs/prm/claims_champ.gin", [], root=protocol.Run)
  plain = alone.experiment.study
  assert len(made.arms) == 5 + 4 * 5 and made.arms[:5] == plain.arms
  # Rows of the study without attacks are used again.
  for arm in plain.arms:
    assert made.settings(arm) == plain.settings(arm)
