"""A disk that fills up while a run is going on."""

import os
import pathlib
import subprocess
import sys

import pytest

TINY = pathlib.Path(__file__).parents[1] / "multiprocess" / "tiny.gin"
WIDE = ["presets.Sizes.width=256", "presets.Sizes.hidden=512"]


@pytest.fixture
def small_disk(tmp_path):
  """A filesystem of 2 MB: less than one checkpoint of the wide model."""
  command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(tmp_path)]
  if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
    pytest.skip("needs the right to mount a small tmpfs")
  yield tmp_path
  subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_said_and_nothing_is_lost(small_disk):
  workdir = small_disk / "run"
  done = subprocess.run(
    [
      *[sys.executable, "-m", "experiments.train"],
      f"--config={TINY}",
      f"--workdir={workdir}",
      "--nohuge_pages",
      *(f"--set={binding}" for binding in WIDE),
    ],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1, done.stderr
  error = done.stderr[done.stderr.index("error:") :].strip().splitlines()
  assert 1 <= len(error) <= 3
  assert "No space left" in " ".join(error)
  assert str(small_disk) in error[0]
  assert "Traceback" not in done.stderr
  # What was there before the disk was full is there still, and whole.
  assert "loop.TrainConfig.steps" in (workdir / "config.gin").read_text()
