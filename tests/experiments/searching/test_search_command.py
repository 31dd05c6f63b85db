"""The command of searches: what it stores, resumes, refuses and says."""

import dataclasses
import json
import pathlib
import types

import numpy as np
import pytest

from experiments import search
from experiments.core import cli, config
from experiments.searching import pool as pools
from experiments.searching import running, search_run, trained
from research.prm import judge
from research.prm.labelled import LabelledSolution
from research.reasoning import sample_logs
from research.reasoning.trace import Trace
from research.search.strategies.adaptive import lead
from research.typing import UserError
from tests.experiments.searching import parity

TINY = str(pathlib.Path(__file__).with_name("tiny.gin"))
FIELDS = (
  *("task", "strategy", "n", "problems", "accuracy", "interval"),
  *("answered", "flops_per_problem", "flops_policy", "flops_verifier"),
  *("tokens_per_problem", "seconds"),
)
"""Of the last line on stdout."""

REWARD = "VERIFIER=@verifiers.NewReward()"


@pytest.fixture(name="run")
def _run(tmp_path, capsys):
  """Returns f(bindings) -> status, result, output, errors and the folder."""

  def run(*bindings, folder="work", flags=()):
    given = [f"--set={x}" for x in bindings]
    place = tmp_path / folder
    argv = ["search", f"--config={TINY}", f"--workdir={place}", *given, *flags]
    code = cli.call(search.main, argv)
    said = capsys.readouterr()
    lines = said.out.splitlines()
    return types.SimpleNamespace(
      code=code,
      result=json.loads(lines[-1]) if code == 0 else None,
      out=said.out,
      err=said.err,
      folder=place,
      pool=pools.read(place / pools.FILE) if code == 0 else [],
    )

  return run


def untimed(text):
  """Returns a pool's lines without their seconds."""
  found = [json.loads(line) for line in text.splitlines()]
  for one in found:
    one["ledger"].pop("seconds")
  return found


def test_a_pool_grows_resumes_and_is_chosen_from_again(run, monkeypatch):
  first = run("PROBLEMS=(0, 5)")
  assert first.code == 0, first.err
  assert tuple(first.result) == FIELDS
  assert first.result["task"] == "parity" and first.result["n"] == 4
  file = first.folder / pools.FILE
  text = file.read_text()
  for line in map(json.loads, text.splitlines()):
    assert len(line["samples"]) == 4
    for sample in line["samples"]:
      trace = Trace.from_json(sample["trace"])
      assert trace.to_json() == sample["trace"]
  stored = json.loads((first.folder / "result.json").read_text())
  assert {k: stored[k] for k in FIELDS} == first.result
  assert stored["estimates"]["k"] == [1, 2, 4]
  # Among all four samples there is one subset.
  assert stored["estimates"]["majority"][-1][0] == pytest.approx(
    first.result["accuracy"]
  )
  # Killed in the middle of a batch, and of a line.
  lines = text.splitlines(keepends=True)
  file.write_text("".join(lines[:3]) + lines[3][:100])
  again = run("PROBLEMS=(0, 5)")
  assert file.read_text().startswith("".join(lines[:3]))
  assert untimed(file.read_text()) == untimed(text)
  assert again.result["accuracy"] == first.result["accuracy"]
  # What is there is not searched again.
  monkeypatch.setattr(
    running.sampling, "Search", lambda *_: pytest.fail("it samples")
  )
  fewer = run("PROBLEMS=(0, 5)", "N=2")
  assert fewer.code == 0, fewer.err
  pair = stored["estimates"]["majority"][1][0]
  assert fewer.result["accuracy"] == pytest.approx(pair)
  assert fewer.result["flops_per_problem"] == pytest.approx(
    stored["estimates"]["flops"][1], rel=1e-6
  )
  logs = sample_logs.read_samples(str(first.folder / "samples.jsonl"))
  right = [log.metrics["mean_correct"] for log in logs]
  assert right == [
    np.mean([x.correct for x in one.samples]) for one in first.pool
  ]
  part = run("PROBLEMS=(1, 3)")
  assert part.result["problems"] == 2
  other = run("COPIES=2")
  assert other.code == 1
  assert "strategy was" in other.err and "--workdir" in other.err
  pool = [json.loads(line) for line in file.read_text().splitlines()]
  pool[1]["problem"]["prompt"] += "?"
  file.write_text("".join(json.dumps(line) + "\n" for line in pool))
  changed = run("PROBLEMS=(0, 5)")
  assert changed.code == 1
  assert "prompt was" in changed.err and "--workdir" in changed.err


def test_a_setting_that_is_left_out_is_another_one(tmp_path):
  """Blocks of a masked diffusion model are not gone on with by tokens."""
  read = config.read(TINY, root=search_run.SearchRun)
  settings = read.experiment.settings()
  assert "sampler" not in settings
  note = tmp_path / running.SETTINGS
  (tmp_path / pools.FILE).write_text("{}\n")
  for before, fits in ((None, True), ({"type": "SamplerConfig"}, False)):
    note.write_text(json.dumps(settings | {"sampler": before}))
    if fits:
      running._claim(read.experiment, tmp_path, read.text)
    else:
      with pytest.raises(UserError, match="sampler was .*\n.*found null"):
        running._claim(read.experiment, tmp_path, read.text)


def test_samples_of_a_changed_problem_or_model_are_not_mixed(tmp_path):
  """A pool's lines have a problem's id; the data behind it may change."""
  read = config.read(TINY, ["PROBLEMS=(0, 2)"], root=search_run.SearchRun)
  search, [problem, other] = read.experiment, list(read.experiment.task)[:2]
  saved = tmp_path / "run/checkpoints"
  (saved / "400").mkdir(parents=True)
  policy = trained.Trained(workdir=str(saved.parent))
  search = dataclasses.replace(search, policy=policy)
  running._claim(search, tmp_path, read.text)
  (tmp_path / pools.FILE).write_text("{}\n")
  running._claim(search, tmp_path, read.text)
  changed = dataclasses.replace(problem, prompt="2 + 2 =")
  pool = {problem.id: changed, other.id: other}
  running._check_problems(tmp_path, [other], pool)
  with pytest.raises(UserError, match=f"{problem.id}: prompt was"):
    running._check_problems(tmp_path, [problem, other], pool)
  (saved / "800").mkdir()
  with pytest.raises(UserError, match="at step 400, found step 800"):
    running._claim(search, tmp_path, read.text)
  saved.rename(tmp_path / "gone")  # a complete pool does not need the run
  running._claim(search, tmp_path, read.text)


SEARCHES = {
  "Independent": ("STRATEGY=@independent.Independent()",),
  "Beam": ("STRATEGY=@beam.Beam()",),
  "DiverseTrees": ("STRATEGY=@diverse_trees.DiverseTrees()",),
  "Rebase": ("STRATEGY=@rebase.Rebase()",),
  "StepRevision": ("STRATEGY=@step_revision.StepRevision()",),
  "TreeSearch": ("STRATEGY=@tree.TreeSearch()",),
  "Beam, lookahead": ("STRATEGY=@beam.Beam()", "LOOKAHEAD=1"),
}
SLOW = "Beam, lookahead", "Rebase", "StepRevision", "TreeSearch"
"""Those whose programs others compile as well."""


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x
    for x in SEARCHES
  ],
)
def test_searches_with_a_verifier(run, name):
  choice = "CHOICE=@choose.BestOf()"
  found = run(*SEARCHES[name], REWARD, choice, "PROBLEMS=(0, 2)")
  assert found.code == 0, found.err
  assert found.result["strategy"] == name.split(",")[0]
  assert found.result["flops_verifier"] > 0
  total = found.result["flops_policy"] + found.result["flops_verifier"]
  assert found.result["flops_per_problem"] == pytest.approx(total)
  for one in found.pool:
    for sample in one.samples:
      assert len(sample.scores) == len(sample.trace.steps)
      assert "".join(x.text for x in sample.trace.steps) == sample.trace.text


def test_a_public_reward_model_reads_texts_by_its_convention(run):
  """Scores are those of whole solutions, and each step reads all before it."""
  given = "VERIFIER=@verifiers.PublicReward()", "PROBLEMS=(0, 2)"
  found = run(*given, "CHOICE=@choose.BestOf()")
  assert found.code == 0, found.err
  verifier = config.read(
    TINY, given, root=search_run.SearchRun
  ).experiment.verifier
  loaded = verifier.model.load()
  for one in found.pool:
    solutions = [
      LabelledSolution(
        prompt=one.problem.prompt,
        steps=tuple(x.text for x in sample.trace.steps),
        labels=(None,) * len(sample.trace.steps),
      )
      for sample in one.samples
    ]
    want = judge.score_solutions(
      *(loaded.model, loaded.params, loaded.tokenizer, solutions),
      convention=verifier.convention,
    )
    read = 0
    for sample, own, solution in zip(one.samples, want, solutions, strict=True):
      np.testing.assert_allclose(sample.scores, own, rtol=1e-4)
      ends = verifier.convention.encode(
        loaded.tokenizer, solution.prompt, solution.steps
      ).ends
      read += sum(end + 1 for end in ends)
    assert one.ledger.verifier_new_tokens == read
    assert one.ledger.flops_verifier > 0


@pytest.mark.parametrize(
  ("name", "bindings"),
  [
    ("AllocatedSamples", ("STRATEGY=@strategies.AllocatedSamples()",)),
    ("AdaptiveVotes", ("STRATEGY=@strategies.AdaptiveVotes()",)),
    ("BudgetForcedText", ("STRATEGY=@strategies.BudgetForcedText()",)),
    ("RoundsOfText", ("STRATEGY=@strategies.RoundsOfText()",)),
    pytest.param(
      "RoundsOfText",
      (
        "STRATEGY=@strategies.RoundsOfText()",
        "strategies.RoundsOfText.shown=@rounds.Subsets()",
        "strategies.RoundsOfText.every=False",
      ),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_searches_of_texts(run, name, bindings):
  found = run(*bindings, "PROBLEMS=(0, 2)")
  assert found.code == 0, found.err
  assert found.result["strategy"] == name
  if name == "AllocatedSamples":
    counts = [len(one.samples) for one in found.pool]
    assert sum(counts) == 2 * 4 and min(counts) >= 2
    return
  for one in found.pool:
    answers = [x.answer for x in one.samples]
    if name == "AdaptiveVotes":
      assert len(answers) == 8 or lead(answers) >= 0.95
    elif name == "BudgetForcedText":
      for x in one.samples:
        assert x.trace.n_new >= 4 or x.trace.text.count("+") >= 2
    else:
      assert len(answers) == (4 if len(bindings) > 1 else 8)


def test_random_scores_cost_nothing_and_are_shown(run):
  found = run(
    "PROBLEMS=(0, 2)",
    "VERIFIER=@free_verifiers.RandomScores()",
    flags=["--show=1"],
  )
  assert found.code == 0, found.err
  assert found.result["flops_verifier"] == 0
  first = found.pool[0].samples[0]
  assert (
    f"{first.scores[0]:.2f} {first.trace.steps[0].text.strip()}" in found.out
  )
  assert "\x1b" not in found.out  # not a terminal
  page = (found.folder / "traces.html").read_text()
  assert page.count("<article") == 8


@pytest.mark.parametrize(
  ("bindings", "message"),
  [
    (("VERIFIER=@parity.Diverged()",), "the score nan for problem 0 after 1"),
    (("PROBLEMS=(0, 5000)",), "within the 1000 problems"),
    (("LOOKAHEAD=1",), "expected 0 or a verifier"),
    (
      ("STRATEGY=@strategies.AllocatedSamples()", "PROBLEMS=(0, 3)"),
      "expected multiples of it",
    ),
    (
      ("STRATEGY=@strategies.AllocatedSamples()", "PROBLEMS=(1, 5)"),
      "expected multiples of it",
    ),
    (("N=5",), "a problem has 4 samples"),
    (("search_run.SearchRun.stop_tokens=()",), "ids that end a solution"),
    (("VERIFIER=@verifiers.TrainedReward()",), "no config.gin there"),
  ],
)
def test_what_cannot_be_searched_is_an_error(run, bindings, message):
  found = run(
    *bindings, *("PROBLEMS=(0, 2)",) * ("PROBLEMS" not in bindings[-1])
  )
  assert found.code == 1
  assert message in found.err and found.err.count("\n") <= 5


SCORED = (
  *("STRATEGY=@beam.Beam()", "STRATEGY=@diverse_trees.DiverseTrees()"),
  *("STRATEGY=@rebase.Rebase()", "STRATEGY=@tree.TreeSearch()"),
  *("STRATEGY=@step_revision.StepRevision()", "CHOICE=@choose.BestOf()"),
  "CHOICE=@choose.Weighted()",
)


@pytest.mark.parametrize("binding", SCORED)
def test_what_goes_by_scores_is_refused_without_a_verifier(binding):
  """Also where a solution is one step, and nothing is ever pruned."""
  one_step = "search_run.SearchRun.steps=@step_ends.AtEnd()"
  with pytest.raises(UserError, match="--set=VERIFIER=@verifiers.TrainedRew"):
    config.read(TINY, [binding, one_step], root=search_run.SearchRun)


def test_a_judge_that_raises_or_hangs_gives_no_vote(run):
  # A folder that has no samples may be tried again with other settings.
  assert run("VERIFIER=@parity.Diverged()", "PROBLEMS=(0, 2)").code == 1
  found = run("PROBLEMS=(0, 2)", "parity.Parity.broken=True")
  assert found.code == 0, found.err
  assert found.result["accuracy"] == 0.0
  verdicts = {x.verdict.reason for one in found.pool for x in one.samples}
  assert verdicts == {"error: RuntimeError: broken"}
  assert all(x.answer is None for one in found.pool for x in one.samples)


def test_a_judge_has_seconds_that_a_run_file_sets(run):
  slow = "PROBLEMS=(0, 2)", "parity.Parity.slow=0.3", "COPIES=1"
  found = run(*slow, "search_run.SearchRun.judge_timeout=0.01")
  assert found.code == 0, found.err
  reasons = {x.verdict.reason for one in found.pool for x in one.samples}
  assert len(reasons) == 1 and reasons.pop().startswith("timeout")
  patient = run(*slow, folder="patient")
  for one in patient.pool:
    assert all(x.verdict.reason != "timeout" for x in one.samples)


def test_a_search_goes_on_behind_the_batches_that_a_verifier_answered(
  run, monkeypatch
):
  scored = (
    "VERIFIER=@parity.Hangs()",
    "CHOICE=@choose.BestOf()",
    "search_run.SearchRun.timeout=0.5",
  )
  monkeypatch.setattr(parity, "HANGS_AFTER", [24])  # a batch: 8 paths, 3 steps
  first = run(*scored)
  assert first.code == 1
  assert "found no scores after 0.5 s" in first.err
  kept = (first.folder / pools.FILE).read_text()
  assert kept.count("\n") == 2
  monkeypatch.setattr(parity, "HANGS_AFTER", [None])
  again = run(*scored)
  assert again.code == 0, again.err
  assert (again.folder / pools.FILE).read_text().startswith(kept)
  assert again.result["problems"] == 5


def test_a_command_of_another_kind_keeps_its_folder(run, tmp_path):
  (tmp_path / "work").mkdir()
  (tmp_path / "work" / "config.gin").write_text("of a training run")
  found = run()
  assert found.code == 1 and "files of another command" in found.err
  assert (tmp_path / "work" / "config.gin").read_text() == "of a training run"
