"""The index of commands, the script `heptad`, and what every help says."""

import configparser
import importlib.machinery
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

from experiments import __main__ as index
from experiments.core import cli, runtime

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMANDS = sorted(index.commands())


def test_the_index_has_every_command_and_its_first_line(capsys):
  assert index.main(["heptad"]) == 0
  text = " ".join(capsys.readouterr().out.split())
  with_main = {
    path.stem
    for path in (ROOT / "experiments").glob("[a-z]*.py")
    if "cli.run(main)" in path.read_text("utf-8")
  }
  assert set(COMMANDS) == with_main > {"train", "generate", "adapters"}
  for name in COMMANDS:
    module = importlib.import_module(f"experiments.{name}")
    assert f"{name} {module.__doc__.splitlines()[0]}" in text


def test_a_misspelt_command(capsys):
  assert index.main(["heptad", "trian", "--config=x"]) == 2
  out = capsys.readouterr()
  assert out.out == "" and "trian: no such command" in out.err
  assert "did you mean train?" in out.err


def test_setup_installs_the_script():
  config = configparser.ConfigParser()
  config.read(ROOT / "setup.cfg")
  scripts = config["options.entry_points"]["console_scripts"].split("\n")
  name, place = next(x for x in scripts if x).split(" = ")
  module, function = place.split(":")
  assert name == "heptad"
  assert getattr(importlib.import_module(module), function) is index.main


@pytest.fixture
def elsewhere(tmp_path):
  """Runs Python in a folder whose `experiments` and `research` are the user's.

  The script is as pip would write it; Heptad is found by PYTHONPATH.
  """
  here = tmp_path / "mine"
  for name in ("experiments", "research"):
    (here / name).mkdir(parents=True)
    (here / name / "__init__.py").write_text("raise SystemExit('mine')")
  (here / "my_method.py").write_text("")
  script = tmp_path / "bin" / "heptad"
  script.parent.mkdir()
  script.write_text(
    "import sys\nfrom experiments.__main__ import main\nsys.exit(main())"
  )

  def run(*arguments):
    return subprocess.run(
      [
        sys.executable,
        *(str(script) if x == "heptad" else x for x in arguments),
      ],
      cwd=here,
      env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)},
      capture_output=True,
      text=True,
      timeout=120,
    )

  return run


def test_the_script_runs_where_folders_have_our_names(elsewhere):
  done = elsewhere("heptad", "convert", "--help")
  assert done.returncode == 0, done.stderr
  assert "python -m experiments.convert" in done.stdout
  # The script passes flags on, and the status comes back.
  wrong = elsewhere("heptad", "convert", "--nonesuch=1")
  assert wrong.returncode == 2 and "nonesuch" in wrong.stderr


def test_modules_of_the_working_directory_come_last(monkeypatch, tmp_path):
  """Run files may name the user's own modules, which hide none of ours."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [str(ROOT)])
  index.import_before_working_directory()
  assert sys.path == [str(ROOT), str(tmp_path)]
  index.import_before_working_directory()
  assert sys.path == [str(ROOT), str(tmp_path)]


@pytest.mark.parametrize("package", runtime.PACKAGES)
def test_a_package_that_hides_ours_is_an_error(monkeypatch, tmp_path, package):
  runtime.check_packages()
  find = importlib.util.find_spec

  def found(name):
    if name != package:
      return find(name)
    (tmp_path / name).mkdir()
    return importlib.machinery.PathFinder.find_spec(name, [str(tmp_path)])

  monkeypatch.setattr(importlib.util, "find_spec", found)
  with pytest.raises(SystemExit) as error:
    runtime.check_packages()
  text = str(error.value)
  assert f"error: {package}: found {tmp_path / package}" in text
  assert str(ROOT) in text and "`heptad`" in text


def _help(name, capsys):
  main = importlib.import_module(f"experiments.{name}").main
  assert cli.call(main, [name, "--help"]) == 0
  return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_keep_their_backslashes(name, capsys):
  """A single backslash in a docstring joins two lines of an example."""
  example = []
  for line in _help(name, capsys).partition("\nFlags:\n")[0].splitlines():
    assert not re.search(r"\S {3,}-", line), line
    assert len(line) <= 80
    if line.startswith("    --"):
      assert example[-1].endswith("\\"), line
    example.append(line)


@pytest.mark.parametrize("name", COMMANDS)
def test_where_smollm2_is_named_its_weights_are(name, capsys):
  """In blocks of 4 bits: another model than the official one."""
  flags = " ".join(_help(name, capsys).partition("\nFlags:\n")[2].split())
  assert ("smollm2-135m" in flags) == ("not the official weights" in flags)
