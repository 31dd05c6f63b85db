"""Packages' public names are there, and cost nothing until they are used."""

import importlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROOMS = "research", "kernels_pallas", "experiments"
PACKAGES = sorted(
  ".".join(path.parent.relative_to(ROOT).parts)
  for room in ROOMS
  for path in (ROOT / room).rglob("__init__.py")
)


def test_every_package_says_what_it_has():
  assert len(PACKAGES) > 40
  for name in PACKAGES:
    assert importlib.import_module(name).__doc__, name


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_are_found(name):
  package = importlib.import_module(name)
  for public in getattr(package, "__all__", ()):
    found = getattr(package, public)
    module = importlib.util.find_spec(f"{name}.{public}")
    assert module is None, f"{name}.{public} is a module, too"
    assert found is not package


def test_imports_take_what_they_need():
  """Packages import no JAX; on a CPU, what is in them no kernel for chips.

  Compilers for GPUs and TPUs would take a quarter of a command's start.
  """
  rooms = "data", "generation", "interop", "lora", "nn", "quant", "training"
  lazy = [f"research.{room}" for room in rooms]
  code = (
    "import importlib, sys\n"
    f"packages = [importlib.import_module(name) for name in {lazy}]\n"
    "print('jax' in sys.modules, 'flax' in sys.modules)\n"
    "for x in packages: [getattr(x, name) for name in x.__all__]\n"
    "from experiments.core import config, train_eval\n"
    "print(*[f'jax.experimental.{x}' in sys.modules for x in\n"
    "  ('mosaic.gpu', 'pallas.mosaic_gpu', 'pallas.tpu', 'pallas')])\n"
    "print('scipy.ndimage' in sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
  )
  assert done.stdout.split() == ["False"] * 7, done.stdout + done.stderr
