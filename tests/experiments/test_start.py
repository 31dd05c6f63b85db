"""What commands have imported when they answer: the shorter, the sooner.

An error about a path, a flag, a macro or a model's name comes before JAX, and
help before all but what its flags are made from. Lists, not times: `make bench
ARGS=start` has those.
"""

import json
import subprocess
import sys

import pytest

from experiments.__main__ import commands
from experiments.core import bindings
from experiments.core.runtime import PACKAGES

EXPERIMENTS = bindings.CONFIGS.parent / "experiments"
PROGRAM = """
import atexit, builtins, json, os, runpy, sys
say = print
def show():
  added = [x for x in sys.modules if x.partition(".")[0] not in before]
  say("MODULES", json.dumps(added), flush=True)
def end(*line, **options):
  say(*line, **options)
  show()
  os._exit(0)
before = {x.partition(".")[0] for x in sys.modules}
first, name, *sys.argv = sys.argv[1:]
sys.argv = [name, "--nohuge_pages", *sys.argv]
if first:
  builtins.print = end
else:
  atexit.register(show)
runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
"""
LIGHT = {"absl", "etils", "lazy_loader", "typing_extensions"}
"""Packages of others that an error may have imported."""

HEAVY = {
  *("gin", "grain", "jinja2", "matplotlib", "optax", "orbax", "PIL", "scipy"),
  *("sympy", "tensorstore", "tokenizers", "tqdm"),
}
"""Those that no value of a flag takes."""

OURS = {
  *("bindings", "choices", "cli", "definers", "flags_from", "runtime"),
  "packed_weights",
  *("errors", "progress", "typechecks", "packages", "folders", "ranges"),
  # What flags are made from.
  *("settings", "config", "policies", "remask", "combinations"),
  *("conversation", "prompts", "text_perplexity", "conversion", "formats"),
  *("quantized", "rounding", "combine", "diagnose", "fidelity", "merge"),
  *("operation", "validate"),
}
"""Modules of ours that an error may have imported: their last names."""

TRAIN = "train --workdir={new} --config=runs/quickstart.gin"
OWN = "train --workdir={new} --config=runs/data/text.gin"
SEARCH = "search --workdir={new} --config=runs/search/countdown_pool.gin"
SUMS = "search --workdir={new} --config=runs/search/chain_sum_smollm2.gin"
LABEL = "label --to={new} --config=runs/prm/chain_sum_labels_smollm2.gin"
QUANTIZE = "quantize --to={new} --config=runs/quant/gptq_smollm2.gin"
PLAN = "plan --topology=cpu:1 --config=runs/quickstart.gin"
STUDY = "study --workdir={new} --config=runs/lora/claims_capacity.gin"
GENERATE = "generate --model=smollm2-135m --prompt=a"
CONVERT = "convert --from=smollm2-135m --to={new}"
NO_MODEL, NO_FILE = "nope: no such file", "nope: No such file or directory"
UNUSED = "nothing in this run uses it"
ERRORS = {
  "train --workdir={new} --config=runs/nope.gin": "no such file",
  "train --config=runs/quickstart.gin": "--workdir: is missing",
  "train --config=runs/quickstart.gin --workdir=setup.cfg": "is a file",
  "train --workdir={new}": "found no config.gin there",
  "train --workdir={new} --config=runs/search/countdown_pool.gin": (
    "binds nothing of experiment.Experiment"
  ),
  f"{TRAIN} --stepz=3": "Unknown command line flag",
  f"{TRAIN} --set=LR=3": "did you mean LEARNING_RATE?",
  f"{TRAIN} --set=STEPS": "expected NAME=VALUE",
  f"{TRAIN} --set=STEPS=1 --set=STEPS=2": "is there twice",
  f"{TRAIN} --set=experiment.Pretrained.name=nope": NO_MODEL,
  f"{TRAIN} --set=LEARNING_RATE=%RATE": "%RATE: has no value",
  OWN: "FILES: is required",
  f"{OWN} --set=FILES=/nope.txt": "/nope.txt: cannot be read",
  f"{OWN} --set=FILES=README.md --set=MODEL=nope": NO_MODEL,
  SEARCH: "PRM = 'runs/countdown/prm': found no config.gin",
  f"{SEARCH} --set=POLICY=nope --set=VERIFIER=None": "--set=POLICY='nope': ",
  f"{SEARCH} --set=PRM=nope": "--set=PRM='nope': found no config.gin there",
  f"{SEARCH} --set=LR=nope": UNUSED,
  f"{SUMS} --set=POLICY=nope": "did you mean experiment.Pretrained.name?",
  f"{SUMS} --set=search_run.SearchRun.policy=nope": "@experiment.Pretrained()",
  "evaluate --config=runs/nope.gin": "no such file",
  "evaluate --workdir={new}": "found no config.gin there",
  "evaluate --model=nope --base=smollm2-135m": NO_MODEL,
  "evaluate --model=smollm2-135m --base=nope": NO_MODEL,
  "plan --config=runs/nope.gin --topology=v5e:2x2": "no such file",
  f"{PLAN} --set=LR=3": "did you mean LEARNING_RATE?",
  f"{PLAN} --search=1x1x8+8 --verifier=nope.gin": "nope.gin: no such file",
  "quantize --config=runs/nope.gin --to={new}": "no such file",
  f"{QUANTIZE} --set=BITZ=3": "did you mean BITS?",
  f"{QUANTIZE} --set=experiment.Pretrained.name=nope": NO_MODEL,
  "quantize --to=tests --config=runs/quant/gptq_smollm2.gin": "already there",
  "label --config=runs/nope.gin --to={new}": "no such file",
  f"{LABEL} --set=ROLLOUT=3": UNUSED,
  f"{LABEL} --set=experiment.Pretrained.name=nope": NO_MODEL,
  "label --to={new} --config=runs/prm/countdown_labels.gin": "runs/countdown/",
  "study --config=runs/nope.gin --workdir={new}": "no such file",
  f"{STUDY} --set=SEED=3": UNUSED,
  f"{STUDY} --only=(": "no regular expression",
  "sweep --sweep=sweeps/nope.gin --workdir={new}": "no such file",
  "sweep --sweep=sweeps/quickstart_rank.gin --workdir={new} --status": (
    "found no sweep there"
  ),
  "report --workdir=gs://nope": "found a path in an object store",
  "imatrix --model=nope --to={new}": NO_MODEL,
  "imatrix --model=smollm2-135m --to=README.md": "already there",
  "imatrix --model=smollm2-135m --to={new} --text=nope": NO_FILE,
  "generate --model=nope --prompt=a": NO_MODEL,
  "generate --model=smollm2-135m --prompt_file=nope": NO_FILE,
  f"{GENERATE} --image=nope": NO_MODEL,
  f"{GENERATE} --adapter=a=nope": NO_MODEL,
  f"{GENERATE} --dtype=nope": "--dtype=nope: value should be one of",
  f"{GENERATE} --sampler=diffusion --policy=nope": "--policy=nope: expected",
  f"{GENERATE} --sampler=diffusion --steps=3 --policy=threshold:1": (
    "--steps=3: --policy=threshold:1 chooses the number of steps"
  ),
  "perplexity --model=nope --text=README.md": NO_MODEL,
  "perplexity --model=smollm2-135m --text=nope": NO_FILE,
  "convert --from=nope --to={new} --format=hf": NO_MODEL,
  "convert --from=smollm2-135m --to=tests --format=hf": "already there",
  f"{CONVERT} --format=nope": "expected one of hf, gguf",
  f"{CONVERT} --format=hf --shard_size=nope": "expected a number of bytes",
  f"{CONVERT} --format=gguf:Q4_K --imatrix=nope": NO_MODEL,
  "adapters --from=nope --op=diagnose": NO_MODEL,
  "adapters --from=tests --op=fidelity --base=nope": NO_MODEL,
  "adapters --from=tests --op=fidelity --text=nope": NO_MODEL,
  "adapters --from=tests --op=lora --rank=2 --to=tests": "already there",
}
LATER = {
  f"{GENERATE} --kv=nope": "kv=nope: found 'nope'",
  f"{GENERATE} --pages=nope": "pages=nope: found 'nope'",
  "perplexity --model=smollm2-135m --text=README.md --kv=nope": "--kv=nope: ",
  f"{CONVERT} --format=gguf:NOPE": "--format=gguf:NOPE: expected one of",
  "plan --config=runs/quickstart.gin --topology=nope:1": "topology 'nope:1'",
}
"""Errors of values that are understood by what computes with them."""

MODELS = "tests/golden/models"
MODEL = f"{MODELS}/gguf_f32/model.gguf"
TEXT = "tests/multiprocess/tiny.gin"
SAMPLE = "search --workdir={new} --config=tests/experiments/searching/tiny.gin"
LOADS = "loading FromScratch("
WORK = {
  f"adapters --op=diagnose --from={MODELS}/peft_lora": "loading tests/",
  f"convert --from={MODEL} --to={{new}} --format=hf": "loading tests/",
  f"evaluate --model={MODEL} --base={MODEL} --text={TEXT} --window=64": (
    "loading tests/"
  ),
  f"generate --model={MODEL} --prompt=a --max_new_tokens=4": "loading tests/",
  f"perplexity --model={MODEL} --text={TEXT} --window=64": "loading tests/",
  PLAN: "tracing",
  f"{QUANTIZE} --set=BLOCK=32 --set=experiment.Pretrained.name='{MODEL}'": (
    "loading Pretrained(name='tests/"
  ),
  SAMPLE: LOADS,
  STUDY: "checking the settings of 28 arms",
  "sweep --workdir={new} --sweep=sweeps/quickstart_rank.gin": "8 units, 8 of",
  f"train --workdir={{new}} --config={TEXT}": LOADS,
}
"""Cheap examples, and how their first line begins."""

LATE = {
  *("matplotlib", "sympy", "scipy.linalg", "scipy.optimize", "scipy.special"),
  *("scipy.stats", "experiments.notebooks"),
}
"""Modules that no first line of work has imported."""

SYSTEMS = {
  *("experiments.labelling", "experiments.searching", "research.reasoning"),
  *("research.search", "research.diffusion.sampling.sampler"),
  "experiments.studies.claims",
}
"""Packages that only a search and a study have imported by then."""

COMMANDS = list(commands())


def _is_package(name):
  return (EXPERIMENTS.parent / name.replace(".", "/") / "__init__.py").is_file()


def _run(command, tmp_path, first=""):
  """Returns (output, packages of others, all modules) of a command.

  As they are at its end, or with `first` at its first line.
  """
  words = command.replace("{new}", str(tmp_path / "new")).split()
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, first, *words],
    capture_output=True,
    text=True,
  )
  text, _, modules = done.stdout.rpartition("MODULES ")
  modules = set(json.loads(modules))
  others = {x.partition(".")[0] for x in modules} - sys.stdlib_module_names
  others -= {*PACKAGES, "sitecustomize"}
  others = {x for x in others if not x.startswith("_")}
  return text + done.stderr, others, modules


@pytest.mark.parametrize("command", ERRORS)
def test_errors_come_before_heavy_imports(command, tmp_path):
  output, others, modules = _run(command, tmp_path)
  assert "error: " in output and ERRORS[command] in output
  assert others <= LIGHT
  ours = {x for x in modules if x.startswith(PACKAGES) and not _is_package(x)}
  assert {x.rpartition(".")[2] for x in ours} <= OURS


@pytest.mark.parametrize("command", LATER)
def test_errors_come_before_models_are_read(command, tmp_path):
  output, others, modules = _run(command, tmp_path)
  assert LATER[command] in output
  assert not others & HEAVY
  assert not modules & {"research.vlm", "research.training", *SYSTEMS}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_what_flags_need(command, tmp_path):
  output, others, _ = _run(f"{command} --help", tmp_path)
  assert "Flags of every command:" in output
  assert others <= LIGHT


def test_every_command_has_errors_here():
  assert {x.split()[0] for x in ERRORS} == set(COMMANDS)


@pytest.mark.parametrize("command", WORK)
def test_work_begins_before_what_it_does_not_need_yet(command, tmp_path):
  output, _, modules = _run(command, tmp_path, "first")
  lines = [x for x in output.splitlines() if not x.startswith("working: ")]
  assert lines[0].startswith(WORK[command])
  assert not modules & LATE
  if command not in (SAMPLE, STUDY):
    assert not modules & SYSTEMS
