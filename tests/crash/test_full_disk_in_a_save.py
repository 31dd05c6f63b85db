"""A disk that fills up in the middle of a save costs that save alone."""

import os
import subprocess

import pytest

from research.typing import UserError
from tests.crash import kills, run

BIG = 250  # thousand floats, twice: 2 MB, and as much again while it is written


def mount(folder, option):
  command = ["mount", "-t", "tmpfs", "-o", option, "none", str(folder)]
  if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
    pytest.skip("needs the right to mount a small tmpfs")


@pytest.fixture
def small_disk(tmp_path):
  """A filesystem that two checkpoints fit on, and a part of a third."""
  folder = tmp_path / "disk"
  folder.mkdir()
  mount(folder, "size=8m")
  yield folder
  subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_costs_one_save(small_disk, tmp_path):
  workdir = small_disk / "run"
  with pytest.raises(UserError, match="No space left on device") as caught:
    run.fit(workdir, BIG)
  assert str(caught.value).count("\n") <= 2
  # Two were kept while the third was written; none of it is taken for one.
  assert kills.steps(workdir) == [1, 2]
  mount(small_disk, "remount,size=100m")
  resumed = run.fit(workdir, BIG)
  whole = run.fit(tmp_path / "whole", BIG)
  assert resumed.start == 2
  assert run.digest(resumed.state) == run.digest(whole.state)
  assert run.numbers(workdir) == run.numbers(tmp_path / "whole")
  assert not kills.drafts(workdir)
