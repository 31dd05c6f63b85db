"""The wheel: built, installed into an empty environment, used elsewhere.

Nothing is downloaded: setuptools comes with the dev extra, and the environment
sees the libraries of this one, but not this checkout.
"""

import configparser
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("research", "kernels_pallas", "experiments", "configs")
NEEDED = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not (
      importlib.util.find_spec("setuptools") and importlib.util.find_spec("pip")
    ),
    reason="needs setuptools and pip: install the dev extra",
  ),
]


def run(*command, cwd, **environment):
  done = subprocess.run(
    list(map(str, command)),
    cwd=cwd,
    env={"PATH": "", "HOME": str(cwd), **environment},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return done.stdout


def version():
  config = configparser.ConfigParser()
  config.read(ROOT / "setup.cfg")
  return config["metadata"]["version"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """Is built of a copy: setuptools leaves folders where it builds."""
  source = tmp_path_factory.mktemp("source")
  for name in PACKAGES:
    shutil.copytree(
      ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
    )
  for name in NEEDED:
    shutil.copy(ROOT / name, source)
  out = tmp_path_factory.mktemp("wheel")
  build = ["wheel", ".", "--no-deps", "--no-build-isolation", "--no-index"]
  run(
    *(sys.executable, "-m", "pip", *build, f"--wheel-dir={out}"),
    cwd=source,
    PYTHONPATH=os.environ.get("PYTHONPATH", ""),
  )
  (made,) = out.iterdir()
  return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
  """An environment's `bin`, in which are the wheel and others' libraries."""
  folder = tmp_path_factory.mktemp("environment")
  run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
  python = folder / "bin" / "python"
  install = ["install", "--no-deps", "--no-index", "--no-compile", wheel]
  run(sys.executable, "-m", "pip", "--python", python, *install, cwd=folder)
  (site,) = folder.glob("lib/python*/site-packages")
  # As a line of its own, not as a folder of sites: its editable installations,
  # this checkout's among them, stay out.
  (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
  return folder / "bin"


@pytest.fixture
def elsewhere(tmp_path):
  """A folder of the user's, with a run file of his own."""
  (tmp_path / "mine.gin").write_text(
    "from __gin__ import dynamic_registration\n"
    "include 'runs/llada/mdlm_markov.gin'\n"
    "STEPS = 2\nBATCH = 2\nWARMUP = 1\n"
  )
  return tmp_path


def test_the_wheel_has_every_file_of_the_packages_but_their_pages(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = [x for x in archive.namelist() if ".dist-info/" not in x]
  expected = {
    str(path.relative_to(ROOT))
    for package in PACKAGES
    for path in (ROOT / package).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
    if path.suffix != ".md"
  }
  assert set(names) == expected and len(names) == len(expected)
  assert wheel.name == f"heptad-{version()}-py3-none-any.whl"


def test_its_version_is_that_of_setup_cfg_alone(installed, elsewhere):
  said = run(installed / "heptad", "--version", cwd=elsewhere)
  assert said == f"heptad {version()}\n"
  # In no other place of the code.
  for package in PACKAGES[:3]:
    for path in (ROOT / package).rglob("*.py"):
      assert "__version__ =" not in path.read_text("utf-8"), path


def test_it_is_imported_from_its_environment(installed, elsewhere):
  code = (
    "import json, kernels_pallas, research, experiments as e;"
    "from experiments.core import config;"
    "print(json.dumps([kernels_pallas.__file__, research.__file__,"
    " e.__path__[0], str(config.CONFIGS)]))"
  )
  said = run(installed / "python", "-c", code, cwd=elsewhere)
  home = str(installed.parent.resolve())
  for place in json.loads(said):
    assert str(pathlib.Path(place).resolve()).startswith(home), place


def test_commands_train_and_go_on_elsewhere(installed, elsewhere):
  """By the script and by python -m; run files come from inside the package."""
  train = ["train", "--config=mine.gin", "--workdir=run"]
  cache = {"JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"]}
  cache["JAX_PLATFORMS"] = "cpu"
  said = run(installed / "heptad", *train, cwd=elsewhere, **cache)
  result = json.loads(said.splitlines()[-1])
  assert result["steps"] == 2 and result["perplexity_after"] > 1
  module = ["-m", "experiments.evaluate", "--workdir=run"]
  said = run(installed / "python", *module, cwd=elsewhere, **cache)
  found = json.loads(said.splitlines()[-1])
  assert found["heldout/perplexity"] == result["perplexity_after"]
  listed = run(installed / "python", "-m", "experiments", cwd=elsewhere)
  assert "heptad COMMAND" in listed and "  train " in listed
