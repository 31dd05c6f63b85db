"""Set-up of the live comparisons; runs in .venv-peers only."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent / "golden")]

torch.set_num_threads(1)  # tiny matmuls: a second thread only waits


class Heptad:
  """Heptad as a process of its own environment.

  Attributes:
    settings: of the environment, for the processes to come.
  """

  def __init__(self, folder: pathlib.Path):
    self.python = os.environ.get(
      "HEPTAD_PYTHON", str(ROOT / ".venv" / "bin" / "python")
    )
    self.folder = folder
    self.calls = 0
    self.settings: dict[str, str] = {}

  def hurry(self) -> None:
    """Compiles fast code no more: for many programs that run once."""
    self.settings["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

  def _process(self, *command: str) -> str:
    cache = os.environ.get(
      "JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla")
    )
    env = os.environ | dict(
      JAX_PLATFORMS="cpu", JAX_COMPILATION_CACHE_DIR=cache, **self.settings
    )
    done = subprocess.run(
      [self.python, *command],
      cwd=ROOT,
      env=env,
      capture_output=True,
      text=True,
      timeout=1200,
    )
    if done.returncode:
      pytest.fail(f"{' '.join(command)}\n{done.stderr[-3000:]}", pytrace=False)
    return done.stdout

  def command(self, name: str, *flags: str) -> dict:
    """Runs `python -m experiments.<name>`; returns its JSON line."""
    out = self._process("-m", f"experiments.{name}", *flags)
    return json.loads(out.strip().splitlines()[-1])

  def script(self, text: str, *arguments: object) -> str:
    """Runs a program of Heptad's environment; returns what it prints."""
    return self._process("-c", text, *map(str, arguments))

  def bridge(self, command: str, model, adapter=None, packed=False, **rows):
    """Runs a command of ours.py; returns its arrays."""
    self.calls += 1
    given = self.folder / f"in{self.calls}.npz"
    suffix = "npy" if command == "logits" else "npz"
    out = self.folder / f"out{self.calls}.{suffix}"
    np.savez(given, **rows)
    extra = [f"--adapter={adapter}"] if adapter else []
    extra += ["--packed"] if packed else []
    self._process(
      str(HERE / "ours.py"),
      command,
      f"--model={model}",
      f"--rows={given}",
      f"--out={out}",
      *extra,
    )
    if suffix == "npy":
      return np.load(out, mmap_mode="r")
    with np.load(out) as file:
      return dict(file)


@pytest.fixture
def heptad(tmp_path) -> Heptad:
  return Heptad(tmp_path)


@pytest.fixture(scope="module")
def shared_heptad(tmp_path_factory) -> Heptad:
  return Heptad(tmp_path_factory.mktemp("heptad"))


@functools.cache
def _reference():
  import smollm2

  return smollm2.reference()


@pytest.fixture
def reference():
  """transformers' SmolLM2, fp32, built once; on two threads."""
  torch.set_num_threads(2)
  yield _reference()
  torch.set_num_threads(1)
