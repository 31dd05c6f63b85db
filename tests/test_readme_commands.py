"""Every command of the README, run: with `--slow`, on little data.

Each line has an entry: a shorter run of that very line, other tests that run
it, or why nothing here does. A line without an entry fails in every suite.
"""

import dataclasses
import importlib.util
import json
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.experiments.labelling.test_label import reward_model
from tests.test_pages import ROOT, commands

README = (ROOT / "README.md").read_text("utf-8")
TINY = ROOT / "tests" / "golden" / "models" / "gguf_f32" / "model.gguf"

FILES = "chat.jsonl", "notes.txt", "questions.jsonl", "mine.jsonl"
"""What a reader has; `_write` makes them."""


@dataclasses.dataclass(frozen=True)
class Run:
  """The line, with more bindings.

  Attributes:
    set: what follows it as `--set=`.
    flags: other flags that follow it.
    needs: a package; without it the line is skipped.
  """

  set: tuple[str, ...] = ()
  flags: tuple[str, ...] = ()
  needs: str | None = None


@dataclasses.dataclass(frozen=True)
class Elsewhere:
  """Tests that run the line, or the parts of one that takes too long.

  Attributes:
    why: what they run of it.
    tests: each as `file::test`.
  """

  why: str
  tests: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class NotRun:
  """A line that this suite cannot run.

  Attributes:
    why: what it lacks.
  """

  why: str


QUICK = (
  *("STEPS=2", "WARMUP=1", "LENGTH=64", "EVAL_BATCHES=1", "EVAL_EVERY=0"),
  "experiment.Experiment.prompt=None",
)
MINE = ("STEPS=2", "WARMUP=1", "BATCH=2", "EVAL_BATCHES=1", "EVAL_EVERY=0")
SMALL_VISION = (
  *("WIDTH=16", "DEPTH=1", "HEADS=2", "HIDDEN=16", "PATCH=16", "GRID=2"),
  *("HELDOUT_SAMPLES=9", "WARMUP=1"),
)

ENTRIES = {
  "make quickstart": Run(QUICK),
  "make tiny-lm": Run(
    (
      *("STEPS=2", "WARMUP=1", "LENGTH=64", "EVAL_BATCHES=1", "VOCAB=400"),
      *("DOCUMENTS=3", "WIDTH=64", "DEPTH=1", "HEADS=1", "HIDDEN=64"),
    )
  ),
  "make tour": Run(
    ("pipeline.Pipeline.overrides={{'text': ['STEPS=2', 'WARMUP=1']}}",),
    flags=("--only=^text",),
  ),
  "make test": NotRun("is this suite"),
  "make test-slurm": NotRun(
    "needs root and half an hour; experiments/sweeps/README.md says when"
  ),
  "make soak": Elsewhere(
    "an hour at random: each fault once, and few damaged files",
    (
      "tests/crash/test_faults.py"
      "::test_every_fault_happens_and_nothing_is_lost",
      "tests/fuzz/test_fuzz.py::test_drawn_cases_are_read_or_refused",
    ),
  ),
  "pip install": NotRun(
    "downloads from PyPI; tests/test_wheel.py installs a wheel without"
  ),
  "train": Elsewhere(
    "names a command, without flags",
    ("tests/experiments/test_commands.py::test_setup_installs_the_script",),
  ),
  "train runs/lora/dora_smollm2.gin": Elsewhere(
    "the whole run, whose perplexities are those of its header",
    (
      "tests/experiments/test_lora_runs.py"
      "::test_a_run_file_gives_the_numbers_of_its_header",
    ),
  ),
  "train runs/lora/qlora_smollm2.gin": Run(QUICK),
  "train runs/lora/any_smollm2.gin": Run((*MINE, "LENGTH=32")),
  "train runs/llada/mdlm_markov.gin": Run(
    ("STEPS=2", "WARMUP=1", "EVAL_BATCHES=1")
  ),
  "train runs/llada/mdlm_markov.gin --devices=8": Run(
    ("STEPS=2", "WARMUP=1", "EVAL_BATCHES=1")
  ),
  "train runs/vlm/shapes.gin": Run(
    (
      *(*SMALL_VISION, "HEAD_DIM=8", "BATCH=4"),
      *("pretrain/STEPS=2", "finetune/STEPS=2"),
    )
  ),
  "train runs/vlm/two_stages_smollm2.gin": Run(
    (
      *(*SMALL_VISION, "BATCH=2", "pretrain/BATCH=2"),
      *("pretrain/STEPS=2", "align/STEPS=2", "tune/STEPS=2"),
    ),
    needs="sklearn",
  ),
  "train runs/search/countdown_policy.gin": Run(
    (
      *("STEPS=2", "WARMUP=1", "BATCH=4", "WIDTH=16"),
      *("PROBLEMS=64", "HELDOUT=8", "SAMPLES=1"),
    )
  ),
  "train runs/data/chat.gin": Run((*MINE, "LENGTH=64")),
  "train runs/data/text.gin": Run((*MINE, "LENGTH=64")),
  "train runs/data/images.gin": Run(
    ("STEPS=2", "WARMUP=1", "BATCH=2", "EVAL_BATCHES=1", "FOLDER='{here}'")
  ),
  "search runs/search/countdown_pool.gin": Run(
    ("PROBLEMS=(0, 2)", "COPIES=2", "BATCH=2")
  ),
  "search runs/search/answers.gin": Run(
    ("PROBLEMS=(0, 2)", "COPIES=2", "NEW_TOKENS=8")
  ),
  "study runs/flash_attention/claims_cost.gin": Run(
    ("study.Study.lengths=(2048, 4096)", "study.Study.topologies=()")
  ),
  "quantize runs/quant/gptq_smollm2.gin": Run(("WINDOWS=1", "LENGTH=64")),
  "sweep sweeps/quickstart_rank.gin": Run(
    (
      *("STEPS=2", "WARMUP=1", "BATCH=2", "LENGTH=16", "EVAL_BATCHES=1"),
      f"experiment.Pretrained.name='{TINY}'",
    )
  ),
  "plan runs/llada/sft_8b.gin": Run(needs="libtpu"),
  "plan runs/vlm/recipe_llava15_7b.gin": Run(needs="libtpu"),
  "generate FILE.gguf": Run(),
  "convert FILE.gguf": Run(),
  "convert smollm2-135m": Run(),
}


def key(line: str) -> str:
  """Returns what tells a line of the README from the others."""
  words = shlex.split(line, comments=True)
  if words[0] != "python":
    return " ".join(words[:2])
  name = words[2].removeprefix("experiments.")
  of = ("--config=", "--sweep=", "--model=", "--from=")
  files = [x.partition("=")[2] for x in words if x.startswith(of)]
  devices = [x for x in words if x.startswith("--devices=")]
  return " ".join([name, *files, *devices])


FOUND = [*commands(README), *re.findall(r"^ {4}(pip .+)$", README, re.M)]
LINES = {key(line): line for line in FOUND}


def test_every_line_has_an_entry():
  assert set(LINES) == set(ENTRIES)
  different = {" ".join(shlex.split(x, comments=True)) for x in FOUND}
  assert len(different) == len(LINES), "two lines share a key"


def test_tests_that_entries_name_exist():
  for entry in ENTRIES.values():
    for test in getattr(entry, "tests", ()):
      file, _, name = test.partition("::")
      assert f"\ndef {name}(" in (ROOT / file).read_text("utf-8"), test


def _write(folder: pathlib.Path) -> None:
  """Writes the reader's files: some records of each are in every split."""
  rng = np.random.default_rng(0)
  chat, questions, sums = [], [], []
  for i in range(40):
    turns = ("user", f"What is {i} + {i}?"), ("assistant", f"It is {2 * i}.")
    messages = [{"role": role, "content": text} for role, text in turns]
    chat.append({"messages": messages})
    sums.append({"question": turns[0][1], "answer": 2 * i})
    pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{i}.png")
    questions.append(
      {"images": [f"{i}.png"], "question": f"Which? {i}", "answer": str(i)}
    )
  files = {"chat": chat, "questions": questions, "mine": sums}
  for name, records in files.items():
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / f"{name}.jsonl").write_text(text)
  notes = (f"Note {i}: {i} and {i} are {2 * i}.\n" for i in range(500))
  (folder / "notes.txt").write_text("".join(notes))


def _python(line: str) -> list[list[str]]:
  """Returns the Python commands of a line, or of a target of the Makefile."""
  words = shlex.split(line, comments=True)
  if words[0] != "make":
    return [words]
  recipe = subprocess.run(
    ["make", "--dry-run", *words[1:]],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  recipe = re.sub(r"\\\n\s*", " ", recipe)
  # What is left out makes the environment that runs this.
  return [
    ["python", *shlex.split(x)[1:]]
    for x in recipe.splitlines()
    if re.match(r"\.venv/bin/python -m experiments", x)
  ]


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_a_line_runs(name, tmp_path):
  entry = ENTRIES[name]
  if isinstance(entry, NotRun):
    pytest.skip(entry.why)
  if isinstance(entry, Elsewhere):
    pytest.skip(f"{entry.why}: {', '.join(entry.tests)}")
  if entry.needs and importlib.util.find_spec(entry.needs) is None:
    pytest.skip(f"needs {entry.needs}")

  _write(tmp_path)
  put = {"DIR": tmp_path / "out", "FILE.gguf": TINY, "TEXT": "Hello"}
  put |= {file: tmp_path / file for file in FILES}
  if "PRM=B" in LINES[name]:
    reward_model(tmp_path)
    put |= {"A": tmp_path / "policy", "B": tmp_path / "prm"}
  more = [f"--set={x.format(here=tmp_path)}" for x in entry.set]
  found = _python(LINES[name])
  assert found
  for _, *words in found:
    given = []
    for word in words:
      flag, equals, value = word.rpartition("=")
      if flag == "--workdir":  # also that of a target of the Makefile
        value = "DIR"
      given.append(f"{flag}{equals}{put.get(value, value)}")
    done = subprocess.run(
      [sys.executable, *given, *more, *entry.flags],
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1])
