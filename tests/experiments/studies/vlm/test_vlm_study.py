"""The study of vision language models: arms, what they train, verdicts."""

import json
import pathlib

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import study as command
from experiments.core import cli, config
from experiments.studies import protocol
from experiments.studies.vlm import arms, base, verdicts
from experiments.studies.vlm.arms import Stage
from experiments.studies.vlm.study import Shared
from research import tree
from research.vlm.objective import WithImages
from research.vlm.scenes.shapes import Shapes

TINY = base.Tiny(width=16, depth=1, heads=2, batch=4, every=2)
RUNS = "stages", "connectors", "features", "masks"
SMALL = (
  *("base.Tiny.width=16", "base.Tiny.depth=1", "base.Tiny.heads=2"),
  *("base.Tiny.batch=4", "base.Tiny.every=2"),
  *("study.Study.rows=12", "study.Study.heldout=32", "study.Study.seeds=1"),
  *("STEPS=2", "BASE_STEPS=2", "arms.masks.width=16"),
)


def study_of(name):
  run = f"runs/vlm/claims_{name}.gin"
  return config.read(run, root=protocol.Run).experiment.study


@pytest.mark.parametrize("name", RUNS)
def test_arms_take_as_many_steps_and_fit_the_model(name):
  study = study_of(name)
  for arm in study.variants:
    first = study.variants[0].stages
    assert sum(x.steps for x in arm.stages) == sum(x.steps for x in first)
    tokens = study.tiny.tokens(arm.connector)
    plan = study.tiny.preprocessor(arm.connector).plan(32, 32)
    assert plan.soft_tokens == tokens
  assert len({study.settings(x) for x in study.arms}) == len(study.variants)


def test_the_language_model_reads_questions_and_answers():
  task = Shapes(size=32, count=6, kinds=("count", "colour"))
  tokenizer = TINY.tokenizer(task)
  rows = base.text_rows(task, tokenizer, TINY.text)
  for sample, row in zip(task, rows, strict=True):
    learned = row["targets"][row["weights"] > 0].tolist()
    text = tokenizer.decode([int(row["tokens"][0]), *learned[:-1]])
    assert text == f"{sample.question} {sample.answer}"
    assert learned[-1] == tokenizer.stop[0]


@pytest.mark.slow
def test_the_command_stores_both_arms_and_says_what_they_found(tmp_path):
  flags = ["--config=runs/vlm/claims_masks.gin", f"--workdir={tmp_path}"]
  flags += [f"--set={x}" for x in SMALL]
  assert cli.call(command.main, ["study", *flags]) == 0
  row = json.loads((tmp_path / "arms" / "prefix_seed_0.json").read_text())
  row = row["row"]
  assert row["tokens"] == 16 and len(row["losses"]) == 1
  assert {"count", "exists/both", "relation"} <= set(row["answers"])
  result = json.loads((tmp_path / "result.json").read_text())
  assert {x["verdict"] for x in result["verdicts"]} == {"undecided"}
  assert (tmp_path / "scores.png").read_bytes()[:4] == b"\x89PNG"
  assert (tmp_path / "base_0.npz").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("trainable", "moved"),
  [
    (arms.CONNECTOR, {"connector"}),
    (arms.LANGUAGE, {"connector", "language"}),
    (arms.EVERYTHING, {"connector", "language", "vision"}),
  ],
)
@pytest.mark.sample(3)
def test_a_stage_trains_its_towers(trainable, moved):
  task = Shapes(size=32, count=8, kinds=("colour",))
  tokenizer = TINY.tokenizer(task)
  connector = arms.linear(2, TINY.width)
  loaded = TINY.load(connector, tokenizer, 0)
  rows = TINY.questions(connector, task).rows(tokenizer)
  pool = base.pool_of([rows[i] for i in range(8)])
  sees = WithImages(model=loaded.model)
  stage = Stage(trainable, 2)
  params, loss = TINY.trained(sees, loaded.params, pool, stage, 0)
  assert np.isfinite(loss)
  for name in ("vision", "connector", "language"):
    pairs = zip(
      tree.flatten_paths(params[name]),
      tree.flatten_paths(loaded.params[name]),
      strict=True,
    )
    same = [np.array_equal(x, y) for (_, x), (_, y) in pairs]
    assert all(same) != (name in moved), name


def rows_of(scores, **more):
  """Returns rows of arms with these scores, one a seed."""
  return {
    f"{arm}, seed {s}": {"score": x, "margin": x - 0.5, **more}
    for arm, values in scores.items()
    for s, x in enumerate(values)
  }


HIGH, LOW, WIDE = (0.90, 0.91, 0.92), (0.50, 0.51, 0.505), (0.5, 0.9, 0.7)


def states(rule, scores, **more):
  return [x.holds for x in rule(rows_of(scores, **more), 3)]


def test_verdicts_of_stages_have_three_states():
  same = dict.fromkeys((arms.TWO, arms.SECOND, arms.ALL), HIGH)
  found = {**same, arms.FIRST: LOW, arms.BLIND: LOW}
  assert states(verdicts.stages, found) == [
    True,
    True,
    False,
    True,
    False,
    True,
  ]
  found = {**same, arms.SECOND: LOW, arms.FIRST: HIGH, arms.BLIND: HIGH}
  assert states(verdicts.stages, found) == [
    True,
    False,
    True,
    False,
    False,
    False,
  ]
  found = dict.fromkeys(found, WIDE) | {arms.TWO: (0.7, 0.7, 0.7)}
  assert states(verdicts.stages, found) == [False, *[None] * 5]


def test_verdicts_of_connectors_compare_at_equal_tokens():
  kinds = (arms.LINEAR, arms.MLP, arms.POOL)
  rows = {}
  for tokens, values in ((16, HIGH), (4, LOW)):
    scores = {arms.named(kind, tokens): values for kind in kinds}
    rows |= rows_of(scores, tokens=tokens)
  found = [x.holds for x in verdicts.connectors(rows, 3)]
  assert found == [True] * 5
  rows |= rows_of({arms.named(arms.MLP, 4): HIGH}, tokens=4)
  found = [x.holds for x in verdicts.connectors(rows, 3)]
  assert found == [False, True, True, False, True]


def test_verdicts_of_feature_layers_are_against_the_last_one():
  found = {
    arms.LAST: LOW,
    arms.UNNORMED: LOW,
    arms.BEFORE: HIGH,
    arms.CONCATENATED: HIGH,
  }
  assert states(verdicts.feature_layers, found) == [True] * 3
  found[arms.LAST], found[arms.CONCATENATED] = HIGH, (0.88, 0.89, 0.90)
  found[arms.BEFORE] = WIDE
  assert states(verdicts.feature_layers, found) == [None, False, False]


def test_the_connector_gets_the_features_of_its_arm():
  task = Shapes(size=32, count=4, kinds=("colour",))
  tokenizer = TINY.tokenizer(task)
  connector = arms.linear(1, TINY.width)
  pixels = jnp.asarray(np.stack([x.image for x in task]))
  found = {}
  for arm in arms.feature_layers(2, TINY.width):
    loaded = TINY.load(connector, tokenizer, 0, features=arm.features)
    found[arm.name] = loaded.model.view_features(loaded.params, pixels)
  last, plain = found[arms.LAST], found[arms.UNNORMED]
  both = np.concatenate([plain, found[arms.BEFORE]], axis=-1)
  np.testing.assert_allclose(found[arms.CONCATENATED], both, atol=1e-6)
  np.testing.assert_allclose(last.mean(-1), 0, atol=1e-5)
  assert np.abs(plain.mean(-1)).max() > 1e-3


def test_the_control_learns_from_black_images_and_others_do_not():
  study = study_of("stages")
  task = Shapes(size=32, count=4, kinds=("colour",))
  tokenizer = study.tiny.tokenizer(task)
  shared = Shared(pathlib.Path(), tokenizer, task[:])
  *others, control = study.variants
  assert control.name == arms.BLIND
  black = study.training_rows(control, shared)
  found = study.training_rows(others[0], shared)
  assert not np.asarray(black.pop("pixels")).any()
  expected = np.stack([x.image for x in shared.samples])
  np.testing.assert_array_equal(found.pop("pixels")[:, 0], expected)
  chex.assert_trees_all_equal(black, found)
