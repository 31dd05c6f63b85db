"""Stages: what a run file says of them, and a run that they make together."""

import dataclasses
import json
import pathlib

import chex
import jax
import pytest

from experiments import evaluate, train
from experiments.core import cli, config, train_eval
from experiments.core.experiment import Experiment
from experiments.stages import running
from experiments.stages.staged import Staged, StageResult, final
from research import tree
from research.interop import load
from research.training import loop, preemption, state
from research.training.checkpoints.workdir import (
  LENGTH_AND_MESH_LINES,
  claim_workdir,
)
from research.training.objectives.objective import with_model
from research.typing import UserError

TINY = str(pathlib.Path(__file__).with_name("tiny.gin"))
TINY_VISION = str(pathlib.Path(__file__).with_name("tiny_vision.gin"))
FIRST, SECOND = "embedding", "adapters"


def run(workdir, *bindings, file=TINY):
  read = config.read(file, bindings)
  folder = running.claim(
    read.experiment, read.text, workdir, LENGTH_AND_MESH_LINES
  )
  return running.train(read.experiment, folder)


class Asking:
  """Requests a stop at the n-th stop point."""

  def __init__(self, left):
    self.left = left

  def reached(self):
    self.left -= 1
    return self.left <= 0

  def unsaved(self, whether):
    pass


LIVES = [  # stop points of each stage that is trained; what is said of it
  ([2], FIRST, "step 1 is saved"),
  ([99, 4], SECOND, "step 2 is saved, but for its evaluation"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that was stopped in each stage, as by SIGTERM, and its result."""
  workdir, stages = tmp_path_factory.mktemp("stages") / "run", []
  for points, stage, words in LIVES:
    points = iter(points)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(preemption, "StopPoints", lambda p=points: Asking(next(p)))
      with pytest.raises(preemption.Preempted, match=words) as error:
        run(workdir)
    assert str(workdir / stage) in str(error.value)
    assert not (workdir / "result.json").exists()
    stages.append(contents(workdir / FIRST))
  result = run(workdir)
  assert stages[1] == contents(workdir / FIRST)  # once trained, left alone
  return workdir, result


def contents(folder):
  files = (path for path in folder.rglob("*") if path.is_file())
  return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def saved(workdir, number=4):
  """Returns the state of a stage's checkpoint."""
  experiment = config.read_workdir(str(workdir)).experiment
  built = experiment.build()
  return train_eval.restore_checkpoint(experiment, built, workdir, number)[1]


# --- configuration ---


def test_a_stage_s_bindings_hold_in_it_alone():
  read = config.read(TINY, ["adapters/SEED=3"])
  one, two = read.experiment.stages.values()
  assert list(read.experiment.stages) == [FIRST, SECOND]
  assert (one.trainable, two.trainable) == ("^embed", "/trained/|^embed")
  assert (one.seed, two.seed) == (0, 3)
  assert (one.plan.seed, two.plan.seed) == (0, 3)
  assert two.data.seed == 3 and one.data.seed == 0
  assert one.transforms == () and len(two.transforms) == 1
  assert two.model == StageResult(stage=FIRST)
  assert final(read.experiment) is two and final(one) is one


def test_each_stage_has_a_configuration_of_its_own():
  """Which names no other, and rebuilds it; as that of all rebuilds all."""
  read = config.read(TINY, ["embedding/LEARNING_RATE=0.5"])
  again = config.parse(read.text)
  assert again.text == read.text
  assert again.experiment.texts == read.experiment.texts
  for name, text in read.experiment.texts.items():
    assert f"{FIRST}/" not in text and f"{SECOND}/" not in text
    alone = config.parse(text)
    assert isinstance(alone.experiment, Experiment) and alone.text == text
    assert ("LEARNING_RATE = 0.5\n" in text) == (name == FIRST)


def test_a_model_of_a_stage_s_own_wins():
  lines = ["adapters/staged.StageResult.checkpoint='best'"]
  stages = config.read(TINY, lines).experiment.stages
  assert stages[SECOND].model == StageResult(stage=FIRST, checkpoint="best")
  lines = ["adapters/experiment.Experiment.model=@from_scratch.FromScratch()"]
  stages = config.read(TINY, lines).experiment.stages
  assert stages[SECOND].model == stages[FIRST].model


@dataclasses.dataclass(frozen=True)
class Built:
  """A source of other sources, such as an `Assembled` of an `Interleaved`."""

  language: object
  encoder: object = None

  def load(self, shardings=None):
    raise NotImplementedError


def test_results_within_parts_of_a_model_know_their_stage(tmp_path):
  stages = config.read(TINY).experiment.stages
  result = StageResult(stage=FIRST)
  model = Built(language=Built(language=result), encoder=result)
  two = dataclasses.replace(stages[SECOND], model=model)
  run = Staged(stages={FIRST: stages[FIRST], SECOND: two}).in_workdir(tmp_path)
  found = run.stages[SECOND].model
  assert found.encoder == found.language.language
  assert found.encoder.workdir == tmp_path / FIRST
  assert found.encoder.experiment == stages[FIRST]
  with pytest.raises(UserError, match="its model is the result of 'embedding'"):
    Staged(stages={SECOND: two, FIRST: stages[FIRST]})


def test_groups_share_an_optimizer_s_bindings():
  lines = [
    "adapters/by_path.by_path.clip=1.0",
    "adapters/by_path.by_path.optimizer=@optim.adamw",
    "adapters/optim.adamw.clip=None",
  ]
  texts = config.read(TINY, lines).experiment.texts
  assert "optim.adamw.clip = None\n" in texts[SECOND]
  assert "by_path" not in texts[FIRST].replace("import by_path", "")


@pytest.mark.parametrize(
  ("binding", "error"),
  [
    ("STEPS=9", "--set=STEPS=9: nothing in this run uses it"),
    ("adapters/STPES=9", "stage 'adapters': --set=STPES=9: nothing .* STEPS?"),
    ("embedding/lora.LoRA.rank=9", "stage 'embedding': .*nothing in this run"),
    ("embeding/STEPS=9", "--set=embeding/STEPS=9: nothing in this run uses"),
    ("embedding/LEARNING_RATE=-1", "stage 'embedding': schedule.peak: found"),
    ("staged.Stages.names=()", "stages: found \\[\\], expected different"),
    ("staged.Stages.names=('a','a')", "found \\['a', 'a'\\], expected"),
    ("staged.Stages.names=('validation',)", "none of .*validation"),
    ("staged.Stages.names=('../a',)", "found \\['../a'\\], expected"),
    (
      "adapters/staged.StageResult.stage='adapters'",
      "result of 'adapters', expected a stage before it, of \\['embedding'\\]",
    ),
  ],
)
def test_mistakes_are_the_users(binding, error):
  with pytest.raises(UserError, match=error):
    config.read(TINY, [binding])


@pytest.mark.parametrize(
  ("run_file", "binding", "own"),
  [
    ("recipe_llada_v_8b", "LENGTH=99", "several/LENGTH"),
    ("recipe_llada_v_8b", "LEARNING_RATE=3e-5", "align/LEARNING_RATE"),
    (
      "recipe_llava_onevision15_4b",
      "optim.cosine.final=0.1",
      "align/optim.cosine.final",
    ),
    (
      "shapes",
      "train/data.ImageQuestions.samples=@heldout/shapes.Shapes()",
      "pretrain/train/data.ImageQuestions.samples",
    ),
  ],
)
def test_a_stage_that_keeps_its_own_value_is_warned_of(
  run_file, binding, own, capsys
):
  path = f"runs/vlm/{run_file}.gin"
  config.read(path, [binding])
  assert f"{own} has a value of its own" in capsys.readouterr().err
  config.read(path, [binding, f"{own}={binding.partition('=')[2]}"])
  config.read(path, ["SEED=3"])
  assert capsys.readouterr().err == ""


def test_a_result_is_that_of_a_run():
  stage = config.read(TINY).experiment.stages[SECOND]
  with pytest.raises(UserError, match="stage 'embedding' belongs to no run"):
    stage.build()


# --- a run ---


def fit(experiment, loaded, params, folder):
  """Returns the state after training from weights in memory."""
  objective = with_model(experiment.objective, loaded.model)
  start = state.create(params, experiment.trainable, experiment.optimizer)
  return loop.fit(
    objective,
    experiment.optimizer,
    start,
    experiment.data.training(loaded.tokenizer),
    experiment.plan,
    workdir=folder,
  ).state


@pytest.mark.slow
def test_it_is_two_undisturbed_trainings_with_no_file_between(whole, tmp_path):
  """Weights that were never saved, handed over in memory: the same bits."""
  workdir, _ = whole
  one, two = config.read(TINY).experiment.stages.values()
  loaded = one.model.load()
  first = fit(one, loaded, loaded.params, tmp_path / "one")
  key = jax.random.fold_in(jax.random.key(two.seed), 0)
  params = two.transforms[0](first.params, key)
  second = fit(two, loaded, params, tmp_path / "two")
  found = saved(workdir / SECOND)
  chex.assert_trees_all_equal(found.params, second.params)
  chex.assert_trees_all_equal(found.opt_state, second.opt_state)


@pytest.mark.slow
def test_a_model_with_images_stopped_within_a_stage_ends_bitwise(tmp_path):
  """Stopped in the second stage, and reloaded twice; or neither, in memory."""
  points = iter([99, 3])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(preemption, "StopPoints", lambda: Asking(next(points)))
    with pytest.raises(preemption.Preempted, match="step 2 is saved"):
      run(tmp_path / "run", file=TINY_VISION)
  run(tmp_path / "run", file=TINY_VISION)
  one, two = config.read(TINY_VISION).experiment.stages.values()
  loaded = one.model.load()
  first = fit(one, loaded, loaded.params, tmp_path / "one")
  chex.assert_trees_all_equal(
    first.params["language"], loaded.params["language"]
  )
  found = saved(tmp_path / "run" / "align", 2)
  chex.assert_trees_all_equal(found.params, first.params)
  second = fit(two, loaded, first.params, tmp_path / "two")
  found = saved(tmp_path / "run" / "tune")
  chex.assert_trees_all_equal(found.params, second.params)
  chex.assert_trees_all_equal(found.opt_state, second.opt_state)
  for tower in ("vision", "connector", "language"):
    moved = tree.flatten_paths(second.params[tower])
    before = dict(tree.flatten_paths(first.params[tower]))
    assert any((x != before[path]).any() for path, x in moved)


def test_what_is_frozen_stays_and_has_no_moments(whole):
  workdir, _ = whole
  start = config.read(TINY).experiment.stages[FIRST].model.load().params
  one, two = (saved(workdir / name) for name in (FIRST, SECOND))
  chex.assert_trees_all_equal(
    tree.partition(one.params, "^embed")[1], tree.partition(start, "^embed")[1]
  )
  base, _ = tree.partition(two.params, "^run.*/w$|head|norm")
  kept, _ = tree.partition(one.params, "^run.*/(q|k|v|out|gate|up|down)$")
  assert tree.count(base) and tree.count(kept)
  merged = dict(tree.flatten_paths(base))
  for path, x in tree.flatten_paths(kept):
    chex.assert_trees_all_equal(merged[f"{path}/w"], x)
  for stage in (one, two):
    moments = [x.size for x in jax.tree.leaves(stage.opt_state) if x.ndim]
    assert sum(moments) == 2 * tree.count(stage.trainable)
  embed = [x.params["embed"] for x in (one, two)]
  assert (start["embed"] != embed[0]).any() and (embed[0] != embed[1]).any()


def test_rates_and_schedules_differ_by_path(whole):
  workdir, _ = whole
  lines = (workdir / SECOND / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  steps = [r for r in records if "train/loss" in r]
  rates = {
    name: [r[f"train/learning_rate/{name}"] for r in steps]
    for name in ("trained", "rest")
  }
  assert rates["rest"] == pytest.approx([1e-5] * 4)
  assert rates["trained"][0] == pytest.approx(1e-3)
  assert rates["trained"][3] < 0.5e-3


def test_its_result_is_that_of_its_stages(whole, capsys):
  workdir, result = whole
  plain = json.loads(json.dumps(result))
  assert json.loads((workdir / "result.json").read_text()) == plain
  assert list(result["stages"]) == [FIRST, SECOND]
  own = [
    json.loads((workdir / name / "result.json").read_text())
    for name in (FIRST, SECOND)
  ]
  assert list(plain["stages"].values()) == own
  assert result["seconds"] == own[0]["seconds"] + own[1]["seconds"]
  assert result["validation/loss"] == own[1]["validation/loss"]
  assert cli.call(evaluate.main, ["evaluate", f"--workdir={workdir}"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert found["validation/loss"] == pytest.approx(result["best"][1], rel=1e-6)


def test_the_model_of_a_run_is_the_last_stage_s(whole):
  """With all that any stage has trained, adapters beside the embedding."""
  workdir, _ = whole
  found = load.load_model(workdir)
  chex.assert_trees_all_equal(found.params, saved(workdir / SECOND).params)


def test_shapes_alone_are_those_of_the_weights(whole):
  workdir, _ = whole
  stage = config.read_workdir(str(workdir / SECOND)).experiment
  shapes = stage.load_abstract().params
  chex.assert_trees_all_equal_shapes_and_dtypes(shapes, stage.build().params)


def test_a_finished_run_is_left_as_it_is(whole, capsys):
  workdir, _ = whole

  before = contents(workdir)
  for more in ([], [f"--config={TINY}"], [f"--config={TINY}", "--set=FSDP=2"]):
    assert cli.call(train.main, ["train", f"--workdir={workdir}", *more]) == 0
    out = capsys.readouterr()
    assert "loading" not in out.err
    assert json.loads(out.out)["stages"].keys() == {FIRST, SECOND}
  assert contents(workdir) == before


@pytest.mark.parametrize(
  ("lines", "error"),
  [
    (["embedding/LEARNING_RATE=1"], "embedding/config.gin: .* another experi"),
    (["adapters/lora.LoRA.alpha=1.0"], "adapters/config.gin: .* another exp"),
    (["embedding/STEPS=6"], "'embedding' is at step 4 of 6, but stage 'ad"),
    (["staged.Stages.names=('adapters',)"], "adapters/config.gin: .* another"),
  ],
)
def test_other_settings_are_refused_by_their_stage(whole, lines, error):
  with pytest.raises(UserError, match=error):
    run(whole[0], *lines)


def test_a_workdir_has_stages_or_has_none(whole, tmp_path):
  workdir, _ = whole
  text = config.read(TINY).experiment.texts[FIRST]
  with pytest.raises(UserError, match="holds a run of the stages embedding, "):
    claim_workdir(workdir, text)
  (tmp_path / "checkpoints" / "4").mkdir(parents=True)
  with pytest.raises(UserError, match="holds a run without stages, expected"):
    run(tmp_path)


def test_a_stage_waits_for_the_one_before_it(whole, tmp_path):
  read = config.read(TINY)
  running.claim(read.experiment, read.text, tmp_path)
  stage = config.read_workdir(str(tmp_path / SECOND)).experiment
  with pytest.raises(UserError, match="is at step 0 of 4, expected a stage"):
    stage.build()


def test_a_stage_does_not_start_from_one_that_trained_for_longer(tmp_path):
  """A finished one is left alone: its result is not that of fewer steps."""
  place = tmp_path / FIRST
  (place / "checkpoints" / "6").mkdir(parents=True)
  (place / "result.json").write_text('{"steps": 6, "seconds": 1.0}')
  read = config.read(TINY)
  with pytest.raises(UserError, match="has finished at step 6, expected 4"):
    running.claim(read.experiment, read.text, tmp_path)
  assert not (tmp_path / "config.gin").exists()
  longer = config.read(TINY, ["embedding/STEPS=6"])
  running.claim(longer.experiment, longer.text, tmp_path)
  assert (tmp_path / "config.gin").exists()


def test_python_names_stages_in_order():
  one, two = config.read(TINY).experiment.stages.values()
  with pytest.raises(UserError, match="expected a stage before it, of \\[\\]"):
    Staged(stages={SECOND: two, FIRST: one})
