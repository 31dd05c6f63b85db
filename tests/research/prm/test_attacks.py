"""Attacks on reward models: truth by exact oracles, reports by known models."""

import dataclasses
import re

import numpy as np
import pytest

from research.errors import UserError
from research.prm import attacks, scores
from research.prm.labelled import LabelledSolution
from research.reasoning import first_error
from research.reasoning.tasks import Chain

SUM = re.compile(r"(\d+) \+ (\d+) = (\d+)")


def judged(steps):
  """Returns the labels of sums that need nothing of each other."""
  found = (SUM.search(step) for step in steps)
  return tuple(
    None if x is None else int(int(x[1]) + int(x[2]) == int(x[3]))
    for x in found
  )


def sums(rng, count=6, source="human"):
  """Returns independent sums, about a third of them wrong."""
  steps = []
  for i in range(count):
    a, b = (int(x) for x in rng.integers(1, 50, 2))
    wrong = rng.random() < 0.3
    # Numbers of two neighbours differ by their thousands.
    a += 1000 * (i + 1)
    steps.append(f"Now {a} + {b} = {a + b + wrong}.\n\n")
  return LabelledSolution(
    prompt="sums",
    steps=tuple(steps),
    labels=judged(steps),
    label_source=source,
  )


def pool(n=40, **fields):
  rng = np.random.default_rng(0)
  return [sums(rng, **fields) for _ in range(n)]


@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_labels_of_changed_steps_are_those_of_an_oracle(name):
  moved = 0
  for solution in pool():
    changed, origin = attacks.ATTACKS[name](solution)
    assert len(changed.steps) == len(changed.labels) == len(origin)
    kept = [i for i in origin if i is not None]
    assert len(set(kept)) == len(kept)
    moved += changed.steps != solution.steps
    for step, label, truth in zip(
      changed.steps, changed.labels, judged(changed.steps), strict=True
    ):
      if name in ("inflated", "split") and truth is None:
        continue  # a part of a sum, or no sum
      if name == "merged" or label is None:
        continue
      assert label == truth, step
    if name in ("confident", "split", "merged"):
      # The same text, but for the words that were put in.
      text = "".join(changed.steps)
      for marker in attacks.MARKERS:
        text = text.replace(f"{marker} ", "")
      assert text == "".join(solution.steps)
  assert moved > 35


@pytest.mark.parametrize(
  ("steps", "expected"),
  [
    (("a.\n", "b.\n", "c."), ("a.\nb.\n", "c.")),
    (("a.", " b."), ("a. b.",)),
    (("a.", "b.", "c."), ("a.\n\nb.", "c.")),
  ],
)
def test_merged_steps_do_not_run_into_each_other(steps, expected):
  solution = LabelledSolution(prompt="q", steps=steps, labels=(1,) * len(steps))
  assert attacks.Merged()(solution).solution.steps == expected


def test_steps_that_are_put_in_or_move_keep_apart():
  """A text's last step ends without a separator."""
  steps = "1 + 1 = 2\n\n", "30 + 4 = 34"
  solution = LabelledSolution(prompt="q", steps=steps, labels=(1, 1))
  assert attacks.Reordered()(solution)[0].steps == (
    "30 + 4 = 34\n\n",
    "1 + 1 = 2",
  )
  padded = attacks.Inflated(("So far.",), each=2)(solution)[0].steps
  assert "".join(padded) == "\n\n".join(
    (steps[0].strip(), "So far.", "So far.", steps[1], "So far.", "So far.")
  )
  # Formats whose steps have no separators have none behind them either.
  bare = dataclasses.replace(solution, steps=tuple(map(str.strip, steps)))
  assert attacks.Inflated(("So far.",))(bare)[0].steps[1::2] == ("So far.",) * 2


def test_fillers_are_right_until_something_is_wrong():
  solution = dataclasses.replace(pool()[0], labels=(1, 1, 0, None, 1, 1))
  changed, origin = attacks.Inflated(each=2)(solution)
  assert changed.labels == (
    *(1, 1, 1),
    *(1, 1, 1),
    *(0, None, None),
    *(None, None, None),
    *(1, None, None),
    *(1, None, None),
  )
  assert origin[::3] == (0, 1, 2, 3, 4, 5) and changed.first_error == 6
  assert all(x.endswith("\n\n") for x in changed.steps)
  values = dataclasses.replace(
    solution,
    labels=(0.5, 0.2, 0.0, 0.0, 0.0, 0.1),
    label_source="monte_carlo_soft",
  )
  # A filler leaves the state, and so its value, as it is.
  assert attacks.Inflated()(values)[0].labels[1::2] == values.labels


def test_only_steps_that_need_nothing_of_each_other_change_places():
  independent = pool()[0]
  changed, origin = attacks.Reordered()(independent)
  assert sorted(origin) == list(range(6)) and origin[:2] == (1, 0)
  labels = [independent.labels[i] for i in origin]
  assert changed.labels == tuple(labels)
  chain = Chain(split="heldout", count=3)
  steps = tuple(chain.solution(chain[0]))
  right = LabelledSolution(
    prompt=chain[0].prompt, steps=steps, labels=(1,) * len(steps)
  )
  assert attacks.Reordered()(right)[0].steps == steps
  for texts in (["so x = 3", "5 x = 15"], ["it is so", "2 + 2 = 4"]):
    assert attacks.may_need(*texts)
  assert not attacks.may_need("x = 3", "y = 4")
  # The state between two steps that change places was never reached.
  values = dataclasses.replace(
    independent,
    labels=(0.1, 0.2, 0.3, 0.4, None, 0.6),
    label_source="exact_value",
  )
  assert attacks.Reordered()(values)[0].labels == (
    *(None, 0.2, None, 0.4),
    *(None, 0.6),
  )


def test_a_corrupted_step_is_the_first_error_of_an_exact_checker():
  task = Chain(split="heldout", count=8)
  for seed in range(8):
    problem = task[seed]
    steps = tuple(task.solution(problem))
    solution = LabelledSolution(
      prompt=problem.prompt, steps=steps, labels=(1,) * len(steps)
    )
    (changed, _) = attacks.Corrupted(seed=seed)(solution)
    found = first_error(task, problem, list(changed.steps))
    assert changed.first_error == found >= 0
    nothing = dataclasses.replace(solution, labels=(None,) * len(steps))
    assert attacks.Corrupted()(nothing)[0] == nothing


# Reports ---------------------------------------------------------------------


def exact(solution):
  """A model that checks sums, and takes everything else for right."""
  return [0.9 if x in (1, None) else 0.1 for x in judged(solution.steps)]


def fluent(solution):
  """A model that listens to words alone."""
  sure = [any(m in step for m in attacks.MARKERS) for step in solution.steps]
  return [
    0.95 if x else 0.6 + 0.001 * len(step)
    for x, step in zip(sure, solution.steps, strict=True)
  ]


def report(model, name):
  solutions = pool()
  changed = [attacks.ATTACKS[name](solution) for solution in solutions]
  return scores.attack_report(
    solutions,
    changed,
    [model(x) for x in solutions],
    [model(x.solution) for x in changed],
    scores.Min(),
  )


def test_a_model_of_truth_is_deaf_to_style_and_hears_errors():
  for name in ("confident", "reordered", "inflated"):
    found = report(exact, name)
    assert found.inflation == found.inflated == found.wrong == found.right == 0
    assert found.auc_after == found.auc_before == 1
    assert found.to_json()["new_errors"] is None
  control = report(exact, "corrupted")
  assert control.new_errors == pytest.approx(-0.8)
  assert control.inflated == 0 > control.inflation


def test_a_model_of_fluency_is_inflated_and_does_not_notice_errors():
  found = report(fluent, "confident")
  assert found.inflated == found.inflated_wrong == 1
  assert (
    found.wrong == pytest.approx(found.right, abs=0.01) and found.wrong > 0.3
  )
  assert found.auc_after == 0.5
  control = report(fluent, "corrupted")
  assert abs(control.new_errors) < 0.01


def ordered(solution):
  """A model that expects each step's first number to be the largest so far."""
  found, most = [], 0
  for step in solution.steps:
    now = int(re.search(r"\d+", step)[0])
    found.append(0.9 if now > most else 0.2)
    most = max(most, now)
  return found


def padded(solution):
  """A model that likes steps without a number, and is half sure of others."""
  return [0.5 if SUM.search(step) else 0.95 for step in solution.steps]


@pytest.mark.parametrize(
  ("model", "name", "aggregate", "inflation", "steps"),
  [
    (fluent, "confident", scores.Min(), 0.325, 0.325),
    (ordered, "reordered", scores.Min(), -0.7, -0.35),
    (padded, "inflated", scores.Mean(), 0.225, 0.0),
  ],
)
def test_each_attack_of_style_shows_in_the_report(
  model, name, aggregate, inflation, steps
):
  """EST-PRM's three, each against a model that listens to what it changes.

  Half of the reordered steps come behind a larger number; half of the padded
  ones are fillers.
  """
  solutions = pool()
  changed = [attacks.ATTACKS[name](solution) for solution in solutions]
  found = scores.attack_report(
    solutions,
    changed,
    [model(x) for x in solutions],
    [model(x.solution) for x in changed],
    aggregate,
  )
  assert found.inflation == pytest.approx(inflation, abs=0.01)
  assert found.inflated == found.inflated_wrong == (inflation > 0)
  for change in (found.right, found.wrong):
    # Which of two neighbours is wrong is chance.
    assert change == pytest.approx(steps, abs=0.1)
  assert found.solutions == len(solutions)


def test_products_pay_for_steps_that_say_nothing():
  """Section 12.2: a trace that is padded, but says the same."""
  solutions = pool()
  changed = [attacks.Inflated()(solution) for solution in solutions]
  given = (
    solutions,
    changed,
    *(
      [exact(x) for x in rows] for rows in (solutions, [x[0] for x in changed])
    ),
  )
  assert scores.attack_report(*given, scores.Product()).inflation < 0
  for aggregate in (scores.Min(), scores.Last()):
    assert scores.attack_report(*given, aggregate).inflation <= 0.8
  assert scores.attack_report(*given, scores.Min()).inflation == 0


def test_of_steps_without_labels_there_is_nothing_to_say():
  solution = pool(1)[0]
  unknown = solution.relabelled([None] * len(solution.steps), "")
  changed = attacks.Confident()(unknown)
  found = scores.attack_report(
    [unknown], [changed], [[0.25] * 6], [[0.5] * 6], scores.Min()
  ).to_json()
  said = {name: x for name, x in found.items() if x is not None}
  assert said == {"inflation": 0.25, "inflated": 1, "solutions": 1}


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: attacks.Inflated(each=0), "found 0 steps"),
    (lambda: attacks.Confident(markers=()), "no markers"),
    (
      lambda: scores.attack_report(pool(2), [], [], [], scores.Min()),
      "found 2 solutions, 0 that",
    ),
    (
      lambda: scores.attack_report(
        pool(1),
        [attacks.Confident()(pool(1)[0])],
        [[0.5] * 6],
        [[0.5] * 5],
        scores.Min(),
      ),
      "found 5 scores after of solution 0, expected 6",
    ),
  ],
)
def test_mistakes(make, message):
  with pytest.raises(UserError, match=message):
    make()
