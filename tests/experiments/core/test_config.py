"""Configurations: what parses, what it says when it does not, round trips."""

import importlib
import re

import pytest

from experiments.core import cli, config
from experiments.core.experiment import Experiment, Pretrained
from experiments.labelling import label_run
from experiments.quantizing import quantizing
from experiments.searching import search_run
from experiments.stages.staged import Staged
from research.training.objectives.objective import NextToken
from research.typing import UserError

RUNS = sorted(
  str(p.relative_to(config.CONFIGS))
  for p in config.CONFIGS.glob("runs/**/*.gin")
  if "python -m experiments.study" not in p.read_text("utf-8")  # test_study
)


ROOTS = {
  "from experiments.quantizing import quantizing": quantizing.Job,
  "from experiments.labelling import label_run": label_run.LabelRun,
  "from experiments.searching import search_run": search_run.SearchRun,
}
"""What run files build that import these."""

QUESTIONS = [f"FILES='{config.CONFIGS / 'data/ten_questions.jsonl'}'"]
GIVEN = {
  "runs/data/labels": QUESTIONS,
  "runs/data/rewarded": QUESTIONS,
  "runs/data/reward_model": ["LABELS=a.jsonl", "TEST=b.jsonl"],
  "runs/data/": ["FILES=mine.jsonl"],
  "runs/prm/champ": ["CHAMP=v0.json"],
}
"""What runs of a user's own data, or of a package's, need."""


def _read(run):
  return config.read(run, _given(run), root=_root(run))


def _given(run):
  return next((x for name, x in GIVEN.items() if run.startswith(name)), [])


def _root(run):
  """Returns what a run file builds: an experiment, a job, labels, a search."""
  lines = config._imports((config.CONFIGS / run).read_text("utf-8"))
  for line, root in ROOTS.items():
    if line in lines:
      return root
  return Experiment


@pytest.mark.parametrize("run", RUNS)
def test_every_run_parses_and_its_text_rebuilds_it(run):
  root = _root(run)
  first = _read(run)
  again = config.parse(first.text, root=root)
  assert again.text == first.text
  stages, theirs = _stages(first.experiment), _stages(again.experiment)
  # Optax chains are closures; everything else compares as a value.
  same = {"optimizer": None}
  for one, two in zip(stages, theirs, strict=True):
    assert isinstance(one, root)
    assert vars(one) | same == vars(two) | same


@pytest.mark.parametrize("run", RUNS)
def test_every_line_of_a_run_has_an_effect(run):
  """As on the command line, which knows no names that imports are given."""
  text = (config.CONFIGS / run).read_text("utf-8")
  renamed = tuple(f"{x}." for x in re.findall(r" as (\w+)$", text, re.M))
  lines = re.findall(r"^[\w/.]+ = .*[^(,\s]$", text, re.M)
  lines = [x for x in lines if not x.split("/")[-1].startswith(renamed)]
  config.read(run, [*lines, *_given(run)], root=_root(run))


def _stages(run):
  return list(run.stages.values()) if isinstance(run, Staged) else [run]


def test_what_gin_builds_is_the_plain_value():
  experiment = config.read("runs/quickstart.gin", ["STEPS=7"]).experiment
  assert experiment.plan.steps == 7
  assert type(experiment.objective) is NextToken
  assert experiment.model == Pretrained(name="smollm2-135m", packed=False)


def test_no_two_runs_are_the_same():
  texts = [_read(run).text for run in RUNS]
  assert len(set(texts)) == len(texts)


def test_a_binding_wins_over_the_file():
  bindings = ["pipeline.Pipeline.length=64", "lora.LoRA.rank = 3"]
  experiment = config.read("runs/quickstart.gin", bindings).experiment
  assert experiment.data.length == 64
  assert experiment.transforms[0].method.rank == 3


@pytest.mark.parametrize(
  ("binding", "message"),
  [
    ("STEPZ=3", "did you mean STEPS"),
    ("LR=3", r"did you mean LEARNING_RATE\?"),
    ("EVAL=3", r"did you mean EVAL_(BATCHES|EVERY)\?"),
    ("TARGETS=q", r"did you mean adapt\.Adapt\.targets\?"),
    ("OPTIMIZER=q", r"did you mean experiment\.Experiment\.optimizer\?"),
    ("adapt.Adapt.target=q", "doesn't have a parameter named 'target'"),
    ("DROPOUT=0.1", "nothing in this run uses it; macros: .*STEPS.*\n.*a path"),
    ("adapt.Adapt.rang=3", "doesn't have a parameter named 'rang'"),
    ("nowhere.Nothing.x=1", "'nowhere' was not provided by an import"),
    ("STEPS=2.5", r"steps: found 2\.5, expected int$"),
    ("STEPS=abc", r"steps: found 'abc', expected int$"),
    ("STEPS=2*3", r"steps: found '2\*3', expected int$"),
    ("STEPS=1,2", r"steps: found \(1, 2\), expected int$"),
    ("STEPS='ten'", "steps: found 'ten'"),
    ("EVAL_BATCHES=0.5", r"eval_batches: found 0\.5, expected int \| None$"),
    ("STEPS", "expected NAME=VALUE"),
    ("STEPS=", "expected NAME=VALUE"),
    ("STEPS=[1,", r"--set=STEPS=\[1,: found a bracket or quote that does not"),
    ("DTYPE='float32", "found a bracket or quote that does not end"),
    ("lora.LoRA.rank=%NOPE", "%NOPE: has no value"),
    ("lora.LoRA.rank=-2", r"LoRA\.rank: found -2, expected at least 1\.$"),
    ("DTYPE=32", "dtype: found 32"),
    ("train/sources.PydocTopics.split='test'", "split: found 'test'"),
    # Bindings that another one wins over everywhere, or of no scope.
    ("trian/pipeline.Pipeline.length=64", "mean pipeline.Pipeline.length"),
    ("sources.PydocTopics.split='train'", "mean heldout/sources.PydocTopics."),
    ("experiment.Experiment.eval_batches=0", "eval_batches: found 0, expected"),
    ("SEED=-1", "TrainConfig.seed: found -1, expected at least 0"),
  ],
)
def test_what_is_wrong_is_said_in_three_lines(binding, message):
  with pytest.raises(UserError, match=message) as error:
    config.read("runs/quickstart.gin", [binding])
  assert len(str(error.value).splitlines()) <= 3


def test_what_a_binding_does_not_reach_is_warned_of(capsys):
  config.read("runs/quickstart.gin", ["pipeline.Pipeline.seed=9"])
  said = capsys.readouterr().err
  assert "train/pipeline.Pipeline.seed has a value of its own" in said
  both = ["pipeline.Pipeline.seed=9", "train/pipeline.Pipeline.seed=9"]
  config.read("runs/quickstart.gin", both)
  config.read("runs/quickstart.gin", ["pipeline.Pipeline.length=64"])
  assert capsys.readouterr().err == ""


PAGE = (config.CONFIGS.parent / "experiments" / "README.md").read_text()
TABLE = re.search(r"## Settings without a macro\n(.*?)\n##", PAGE, re.DOTALL)
PATHS = re.findall(r"`([\w./]+=[^`]+)`", TABLE.group(1))


@pytest.mark.parametrize("line", [x for x in PATHS if x[0].islower()])
def test_paths_of_the_page_reach_what_they_name(line, tmp_path):
  """Quotes are a shell's, as on the page."""
  name, value = line.split("=", 1)
  file = tmp_path / "mine.gin"
  file.write_text(
    "from __gin__ import dynamic_registration\n"
    "include 'runs/quickstart.gin'\n"
    "from research.optim import muon\n"
    "muon.muon.learning_rate = 1e-3\n"
  )
  bound = f"{name}={value.strip(chr(34))}"
  assert name in config.read(str(file), [bound]).text


OWN_RUNS = {
  "a macro": ("COPIES = 4", "COPIES: nothing in this run uses it"),
  "a near miss": ("RANC = 4", r"RANC: .* did you mean RANK\?"),
  "a scope": (
    "trian/pipeline.Pipeline.length = 64",
    "trian/pipeline.Pipeline.length: nothing in this run uses it",
  ),
}


@pytest.mark.parametrize("kind", OWN_RUNS)
def test_what_nothing_uses_in_a_file_of_one_s_own_is_refused(
  kind, tmp_path, capsys
):
  line, message = OWN_RUNS[kind]
  head = (
    "from __gin__ import dynamic_registration\n"
    "include 'runs/quickstart.gin'\n"
    "from research.data import pipeline\n"
    "from research.lora.methods import dora\n"
  )
  file = tmp_path / "mine.gin"
  # What waits for a value of the command line is not for what is included.
  waiting = "DORA_RANK = 3\ndora.DoRA.rank = %DORA_RANK\n"
  file.write_text(f"{head}{waiting}RANK = 4\n")
  assert config.read(str(file)).experiment.transforms[0].method.rank == 4
  file.write_text(f"{head}{line}\n")
  with pytest.raises(UserError, match=message):
    config.read(str(file))
  # The command line may have taken the place of what used it.
  config.read(str(file), ["STEPS=10"])
  assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
  "twice",
  [
    ["STEPS=3", "STEPS=4"],
    ["STEPS=3", "RANK=2", " STEPS = 3"],
    ["lora.LoRA.rank=3", "lora.LoRA.rank=4"],
  ],
)
def test_one_name_is_set_once(twice):
  with pytest.raises(UserError, match="is there twice"):
    cli.run_file("runs/quickstart.gin", twice)


def test_a_directory_is_no_file():
  for path in ("configs", "runs/lora"):
    with pytest.raises(UserError, match=f"{path}: is a directory, expected a"):
      config.read(path)


def test_a_run_of_own_data_says_what_it_needs():
  with pytest.raises(UserError, match="FILES: is required: --set=FILES=..."):
    config.read("runs/data/chat.gin")


def test_required_values_are_required():
  with pytest.raises(UserError, match="(?i)required"):
    config.parse("include 'base.gin'")


@pytest.mark.parametrize(
  "path", ["runs/quickstrat.gin", "quickstart", "configs/runs/quickstart"]
)
def test_a_mistyped_file_is_answered_with_the_nearest(path):
  with pytest.raises(UserError, match=r"Did you mean runs/quickstart") as error:
    config.read(path)
  assert len(str(error.value)) < 300 + len(str(config.CONFIGS))
  with pytest.raises(UserError, match="no such file") as error:
    config.read("zzz")
  assert "Did you mean" not in str(error.value)
  with pytest.raises(UserError, match="mean runs/lora/dora_smollm2.gin"):
    config.read("dora")


def test_a_bare_word_on_the_command_line_is_a_text():
  bindings = ["experiment.Experiment.prompt=Once upon a time", "DTYPE=bfloat16"]
  experiment = config.read("runs/quickstart.gin", bindings).experiment
  assert experiment.prompt == "Once upon a time"
  assert experiment.model.dtype == "bfloat16"


def test_a_bare_word_in_a_file_is_named(tmp_path):
  file = tmp_path / "mine.gin"
  head = "from __gin__ import dynamic_registration\n"
  file.write_text(head + "include 'runs/quickstart.gin'\nSTEPS = abc\n")
  with pytest.raises(UserError, match="line 3: found abc, expected a val") as e:
    config.read(str(file))
  assert "ast." not in str(e.value)


def test_a_file_elsewhere_includes_its_neighbours(tmp_path, monkeypatch):
  """Beside the file itself, wherever the command runs."""
  folder = tmp_path / "mine"
  folder.mkdir()
  head = "from __gin__ import dynamic_registration\n"
  (folder / "short.gin").write_text(head + "STEPS = 7\n")
  (folder / "run.gin").write_text(
    head + "include 'runs/quickstart.gin'\ninclude 'short.gin'\n"
  )
  monkeypatch.chdir(tmp_path)
  assert config.read("mine/run.gin", ["RANK=2"]).experiment.plan.steps == 7


def test_not_text(tmp_path):
  file = tmp_path / "x.gin"
  file.write_bytes(b"\xff\xfe\x00")
  with pytest.raises(UserError, match="UTF-8"):
    config.read(str(file))


def test_folders_here_do_not_hide_what_is_included(tmp_path, monkeypatch):
  """`runs/` and `models/` beside the user are no Python packages to search."""
  for name in ("runs", "models", "data"):
    (tmp_path / name).mkdir()
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)  # as `python -m` does
  file = tmp_path / "mine.gin"
  head = "from __gin__ import dynamic_registration\n"
  file.write_text(head + "include 'runs/quickstart.gin'\nSTEPS = 9\n")
  assert config.read("mine.gin").experiment.plan.steps == 9


def test_an_error_in_a_file_has_its_line(tmp_path):
  inner, outer = tmp_path / "inner.gin", tmp_path / "outer.gin"
  head = "from __gin__ import dynamic_registration\n"
  inner.write_text(head + "\nnowhere.X.a = 1\n")
  outer.write_text(head + f"include '{inner}'\n")
  for file in (inner, outer):
    with pytest.raises(UserError, match=r'inner\.gin", line 3') as error:
      config.read(str(file))
    assert len(str(error.value).splitlines()) <= 3


def test_a_failed_parse_leaves_nothing_behind():
  with pytest.raises(UserError):
    config.read("runs/quickstart.gin", ["STEPS='x'"])
  assert config.read("runs/quickstart.gin").experiment.plan.steps > 1


def test_the_text_is_what_was_bound_without_defaults():
  # Seen with and without type checks, which hide most defaults from gin.
  bound = config.read("runs/quickstart.gin").text
  assert "LoRA.rank" in bound
  assert "LoRA.dropout" not in bound
  assert "NextToken." not in bound
  more = config.read("runs/quickstart.gin", ["lora.LoRA.dropout=0.0"]).text
  assert "LoRA.dropout = 0.0" in more


CLASS = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Root:
  size: int = 1
"""


def test_what_another_file_calls_a_module_changes_nothing(
  tmp_path, monkeypatch
):
  """In one process, as a study reads its steps."""
  (tmp_path / "named_twice.py").write_text(CLASS)
  monkeypatch.syspath_prepend(tmp_path)
  root = importlib.import_module("named_twice").Root
  head = "from __gin__ import dynamic_registration\nimport named_twice"
  for name, line in ("other", f"{head} as other"), ("named_twice", head):
    text = f"{line}\n{name}.Root.size = 2\n"
    binding = f"{name}.Root.size=3"
    assert config.parse(text, [binding], root=root).experiment.size == 3
    with pytest.raises(UserError, match="nothing in this run uses it"):
      config.parse(text, [f"nowhere/{binding}"], root=root)
