"""The set-up finds a Python by running candidates, not by their names."""

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[1] / ".ci/find_python.sh"
MINE = "{}.{}".format(*sys.version_info[:2])
# Of another version than ours: one that no machine has.
NONE = "3.99"
# The Python under our virtual environment.
BASE = getattr(sys, "_base_executable", sys.executable)
# What a pyenv shim says of a version that is installed but not chosen.
SHIM = "echo 'pyenv: python: command not found' >&2; exit 127"


def _program(path: pathlib.Path, body: str) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/bin/sh\n{body}\n")
  path.chmod(0o755)
  return path


def _python(path: pathlib.Path, without: str = "") -> pathlib.Path:
  """Makes a working Python at `path`, of our version, less one module.

  It runs the real one with a first line before the question that is asked, so
  that it calls itself by its own path and cannot import what it must not have.
  """
  first = f"import sys; sys.executable = '{path}'"
  if without:
    first += f"; sys.modules['{without}'] = None"
  return _program(
    path,
    '[ "$1 $2" = "-I -c" ] || exit 1\n'
    f'exec {BASE} -I -c "{first}\n$3" "$4" "$5"',
  )


@pytest.fixture
def find(tmp_path):
  """Returns a function that runs the script under a PATH of its own."""
  tools = tmp_path / "tools"
  tools.mkdir()
  for name in ("sh", "dirname", "sed", "timeout", "cat"):
    for place in os.environ["PATH"].split(":"):
      if (program := pathlib.Path(place) / name).exists():
        (tools / name).symlink_to(program.resolve())
        break
  # A copy, so that nothing is cached in the checkout.
  script = tmp_path / "checkout" / ".ci" / "find_python.sh"
  script.parent.mkdir(parents=True)
  # The places that are searched whatever PATH says would find real Pythons.
  text = SCRIPT.read_text().replace(" /usr/local/bin /usr/bin ", " ")
  assert text != SCRIPT.read_text()
  script.write_text(text)

  def run(*folders, versions=(MINE,), **environment):
    path = ":".join(map(str, [*folders, tools]))
    result = subprocess.run(
      [str(tools / "sh"), str(script), *versions],
      env={"PATH": path, "HOME": str(tmp_path / "home"), **environment},
      capture_output=True,
      text=True,
      timeout=60,
    )
    return result.returncode, result.stdout.strip(), result.stderr.strip()

  return run


def test_a_shim_that_fails_is_passed_over(find, tmp_path):
  """pyenv's default is old, its shims refuse, yet it has what we need."""
  root = tmp_path / "pyenv"
  for name in (f"python{MINE}", "python3", "python"):
    _program(root / "shims" / name, SHIM)
  inside = _python(root / "versions" / f"{MINE}.1" / "bin" / "python")
  assert find(root / "shims") == (0, str(inside), "")


def test_pyenv_is_found_by_its_variable_alone(find, tmp_path):
  root = tmp_path / "elsewhere"
  inside = _python(root / "versions" / f"{MINE}.4" / "bin" / "python")
  assert find(PYENV_ROOT=str(root)) == (0, str(inside), "")


def test_a_folder_with_a_space_does_no_harm(find, tmp_path):
  python = _python(tmp_path / "my bin" / "python3")
  assert find(tmp_path / "my bin") == (0, str(python), "")


def test_a_version_that_does_not_run_yields_to_the_next(find, tmp_path):
  _program(tmp_path / "a" / f"python{NONE}", SHIM)
  python = _python(tmp_path / "b" / "python3")
  found = find(tmp_path / "a", tmp_path / "b", versions=(NONE, MINE))
  assert found == (0, str(python), "")


def test_a_name_that_lies_about_its_version_is_not_believed(find, tmp_path):
  _python(tmp_path / "a" / f"python{NONE}")
  assert find(tmp_path / "a", versions=(NONE,))[0] == 1


def test_an_old_python_alone_ends_in_one_sentence(find, tmp_path):
  _python(tmp_path / "bin" / "python3")
  code, out, err = find(tmp_path / "bin", versions=(NONE, "3.98"))
  assert (code, out, err.count("\n")) == (1, "", 0)
  assert "version 3.99, 3.98" in err and "PYTHON=" in err


def test_no_python_at_all_ends_in_one_sentence(find):
  code, out, err = find()
  assert (code, out, err.count("\n")) == (1, "", 0)
  assert err


def test_a_python_without_ensurepip_yields_to_one_with_it(find, tmp_path):
  """Debian's python3 without python3-venv."""
  _python(tmp_path / "a" / f"python{MINE}", without="ensurepip")
  assert find(tmp_path / "a")[0] == 1
  whole = _python(tmp_path / "b" / "python3")
  assert find(tmp_path / "a", tmp_path / "b") == (0, str(whole), "")


def test_without_ensurepip_any_other_pip_will_do(find, tmp_path):
  bare = _python(tmp_path / "a" / f"python{MINE}", without="ensurepip")
  _program(tmp_path / "b" / "python3", '[ "$1 $2" = "-m pip" ]')
  assert find(tmp_path / "a", tmp_path / "b") == (0, str(bare), "")


def test_the_named_python_comes_first_or_is_said_not_to_fit(find, tmp_path):
  other = _python(tmp_path / "bin" / f"python{MINE}")
  named = _python(tmp_path / "named")
  assert find(other.parent, PYTHON=str(named)) == (0, str(named), "")
  broken = _program(tmp_path / "broken", SHIM)
  code, out, err = find(other.parent, PYTHON=str(broken))
  assert (code, out) == (0, str(other))
  assert f"PYTHON={broken} cannot be used" in err


def test_uv_is_the_last_resort_and_downloads_nothing(find, tmp_path):
  hidden = _python(tmp_path / "hidden" / "python3")
  _program(
    tmp_path / "bin" / "uv",
    f'[ "$UV_PYTHON_DOWNLOADS" = never ] && echo {hidden}',
  )
  assert find(tmp_path / "bin") == (0, str(hidden), "")


def test_the_answer_is_never_a_virtual_environment(find, tmp_path):
  """Else `make` in an active .venv would build .venv out of itself."""
  venv = tmp_path / "venv"
  subprocess.run([BASE, "-m", "venv", "--without-pip", venv], check=True)
  code, out, _ = find(venv / "bin")
  assert code == 0
  assert not out.startswith(str(tmp_path))
  assert pathlib.Path(out).exists()
