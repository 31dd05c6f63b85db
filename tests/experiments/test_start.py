"""What commands have imported when they answer: the shorter, the sooner.

An error about a path, a flag, a macro or a model's name comes before JAX, and
help before all but what its flags are made from. Lists, not times: `make bench
ARGS=start` has those.
"""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import atexit, json, runpy, sys
def show():
  ours = ("research", "kernels_pallas", "experiments")
  tops = {x.partition(".")[0] for x in sys.modules} - set(before)
  mine = sorted(x for x in sys.modules if x.partition(".")[0] in ours)
  print("MODULES", json.dumps([sorted(tops), mine]))
before = {x.partition(".")[0] for x in sys.modules}
atexit.register(show)
name, *sys.argv = sys.argv[1:]
sys.argv = [name, "--nohuge_pages", *sys.argv]
runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
"""
LIGHT = {"absl", "etils", "lazy_loader", "typing_extensions"}
"""Packages of others that an error may have imported."""

HEAVY = {
  *("gin", "grain", "jinja2", "matplotlib", "optax", "orbax", "PIL", "scipy"),
  *("sympy", "tensorstore", "tokenizers", "tqdm"),
}
"""Those that no flag is made from. Some flags are made from JAX's types."""

OURS = {
  "experiments.core.bindings",
  "experiments.core.cli",
  "experiments.core.runtime",
  "research.errors",
  "research.interop.packages",
  "research.io.folders",
  "research.moved",
  "research.progress",
  "research.typechecks",
}
"""Modules of ours that an error may have imported, besides packages."""

TRAIN = "train --workdir={new} --config=runs/quickstart.gin"
OWN = "train --workdir={new} --config=runs/data/text.gin"
SEARCH = "search --workdir={new} --config=runs/search/countdown_pool.gin"
ERRORS = {
  "train --workdir={new} --config=runs/nope.gin": "no such file",
  "train --config=runs/quickstart.gin": "--workdir: is missing",
  "train --config=runs/quickstart.gin --workdir=setup.cfg": "is a file",
  f"{TRAIN} --stepz=3": "Unknown command line flag",
  f"{TRAIN} --set=LR=3": "did you mean LEARNING_RATE?",
  f"{TRAIN} --set=STEPS": "expected NAME=VALUE",
  f"{TRAIN} --set=STEPS=1 --set=STEPS=2": "is there twice",
  f"{TRAIN} --set=experiment.Pretrained.name=nope": "nope: no such file",
  f"{OWN} --set=FILES=/nope.txt": "/nope.txt: cannot be read",
  f"{OWN} --set=FILES=README.md --set=MODEL=nope": "nope: no such file",
  f"{SEARCH} --set=POLICY=nope": "--set=POLICY='nope': no such directory",
  f"{SEARCH} --set=PRM=nope": "--set=PRM='nope': no such directory",
  f"{SEARCH} --set=LR=nope": "nothing in this run uses it",
  "evaluate --config=runs/nope.gin": "no such file",
  "plan --config=runs/nope.gin --topology=v5e:2x2": "no such file",
  "quantize --config=runs/nope.gin --to={new}": "no such file",
  "label --config=runs/nope.gin --to={new}": "no such file",
  "study --config=runs/nope.gin --workdir={new}": "no such file",
  "sweep --sweep=sweeps/nope.gin --workdir={new}": "no such file",
  "imatrix --model=nope --to={new}": "nope: no such file",
}
LATER = {
  "generate --model=nope --prompt=a": "nope: no such file",
  "perplexity --model=nope --text=README.md": "nope: no such file",
  "convert --from=nope --to={new} --format=hf": "nope: no such file",
  "adapters --from=nope --op=diagnose": "nope: no such file",
}
"""Errors of commands whose flags are made from settings."""


def _run(command, tmp_path):
  """Returns (output, packages of others, modules of ours) of a command."""
  words = command.replace("{new}", str(tmp_path / "new")).split()
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True
  )
  text, _, modules = done.stdout.rpartition("MODULES ")
  tops, ours = json.loads(modules)
  standard = sys.stdlib_module_names
  others = {x for x in tops if x not in standard and not x.startswith("_")}
  mine = ("research", "kernels_pallas", "experiments", "sitecustomize")
  return text + done.stderr, others - set(mine), ours


@pytest.mark.parametrize("command", ERRORS)
def test_errors_come_before_heavy_imports(command, tmp_path):
  output, others, ours = _run(command, tmp_path)
  assert "error: " in output and ERRORS[command] in output
  assert others <= LIGHT
  packages = {x.rpartition(".")[0] for x in OURS} | {"experiments", "research"}
  assert set(ours) <= OURS | packages


@pytest.mark.parametrize("command", LATER)
def test_errors_come_before_models_are_read(command, tmp_path):
  output, others, ours = _run(command, tmp_path)
  assert LATER[command] in output
  assert not others & HEAVY
  rooms = {".".join(x.split(".")[:2]) for x in ours}
  read = {"research.nn", "research.vlm", "research.quant", "research.training"}
  assert not rooms & {*read, "kernels_pallas.flash_attention"}


@pytest.mark.parametrize("command", ["train", "search", "plan", "sweep"])
def test_help_imports_what_flags_need(command, tmp_path):
  output, others, _ = _run(f"{command} --help", tmp_path)
  assert "Flags of every command:" in output
  assert others <= LIGHT


@pytest.mark.parametrize("command", ["generate", "perplexity", "convert"])
def test_help_reads_no_models(command, tmp_path):
  output, others, ours = _run(f"{command} --help", tmp_path)
  assert "Flags of every command:" in output
  assert not others & HEAVY
  assert not any(x.startswith("research.nn") for x in ours)
