"""Schedules are parsed as libtpu writes them; inconsistencies raise."""

import json

import numpy as np
import pytest

from kernels_pallas.inspect import __main__ as command
from kernels_pallas.inspect import (
  build,
  chips,
  picture,
  report,
  schedule,
)

V5P, V6E = chips.CHIPS["v5p"], chips.CHIPS["v6e"]
BODY = """\
     0   :  { %s1 = smov 0 }
   0x1 LB: > { %s2 = sadd.s32 1, %s1 }
   0x2   : > { %v1 = vld [vmem:[%s2]]  ;;  %3 = vmatpush.bf16.msra.mxu0 %v1 }
   0x3   : > > { %4 = vmatmul.bf16.vlgmr.msra.gmra.mxu0 %v2 }
   0x4   : > > { %5 = vmatmul.bf16.gmra.mrb[4].mxu0 %v2  ;;  %v9 = vadd %v8 }
   0x5 PF: > { %6 = sbr.rel (%p1) target = $region4 }
   0x6   :  {}
"""
USE = """\
== CAPACITY:
MXU, VALU, VSTORE:SPILL
4 4 1
== UTILIZATION:
0 0 0
0 0 0
1 0 1
1 0 0
1 1 0
0 0 0
0 0 0
"""


@pytest.fixture(name="dump")
def _dump(tmp_path):
  (tmp_path / "17-kern.1-70-final_hlo-static-per-bundle-utilization.txt"
   ).write_text(USE)  # fmt: skip
  (tmp_path / "17-kern.1-72-final_bundles.txt").write_text(BODY)
  (tmp_path / "17-kern.1-71-schedule-analysis_final_bundles.txt").write_text("")
  return tmp_path


def test_bodies_of_loops_count_as_often_as_they_run(dump):
  found = schedule.read(dump, "kern", V6E, trips=(5,))
  # Three bundles a step, two of a loop; none from outside the grid.
  assert found.bundles == 3 + 2 * 5
  # One register of 16 rows of weights: two matmuls of 16 rows, 16 deep.
  assert found.macs == 5 * 2 * 16 * 16 * 256
  assert found.spills() == 1
  np.testing.assert_allclose(found.share()["MXU"], 11 / 4 / 13)


@pytest.mark.parametrize("trips", [(), (2, 3)])
def test_unknown_loops_raise(dump, trips):
  with pytest.raises(ValueError, match="found 1 loops"):
    schedule.read(dump, "kern", V5P, trips)


def test_other_formats_raise(dump):
  with pytest.raises(ValueError, match="found 0 files"):
    schedule.read(dump, "other", V5P)
  path = next(dump.glob("*72-final_bundles.txt"))
  path.write_text(BODY.replace("   0x6   :  {}\n", ""))
  with pytest.raises(ValueError, match="another format"):
    schedule.read(dump, "kern", V5P, (5,))


def test_bounds_are_those_of_the_matrix_units():
  assert chips.bound(V5P, 128, 2) == pytest.approx(3.906, abs=2e-3)
  assert chips.bound(V6E, 128, 2) == pytest.approx(1.953, abs=2e-3)
  # The published measurement of splash's best blocks, within 5%.
  assert chips.tflops(V5P, 128, 2, 2, 4.55) == pytest.approx(410, rel=0.05)


# Work in libtpu's schedules, in matmuls a grid step.
WORK = {
  ("flash_attention", "v6e", "forward", 128): 2,
  ("flash_attention", "v6e", "backward", 128): 5,
  ("flash_attention", "v6e", "forward", 64): 3,
  ("flash_attention", "v5p", "forward", 64): 3,
  ("flash_attention", "v6e", "forward", 256): 2,
  ("flash_attention", "v6e", "backward", 64): 9,
  ("flash_attention", "v5p", "backward", 64): 9,
  ("splash", "v5p", "forward", 64): 4,
  ("splash", "v6e", "forward", 128): 3,
  ("splash", "v6e", "forward", 64): 6,
  ("splash", "v6e", "backward", 128): 8,
}


@pytest.mark.parametrize("key", WORK, ids=str)
def test_work_must_be_that_of_the_matmuls(key):
  job = build.Job(*key[:3], 2048, key[3], "bfloat16", (512, 512, 256, 1))
  (step,), work = job.program.steps(job), float(WORK[key])
  # Twice the work of one matmul, or none of it, is not this kernel's.
  assert report._adds_up(work, step, job.chip)
  for other in (-1, -0.5, 0.5, 1, 2):
    assert not report._adds_up(work + other, step, job.chip)


@pytest.mark.parametrize(("errors", "reason"), [
  ("a\nE: Scoped allocation with size 70.00M and limit 63.94M exceeded scoped "
   "vmem limit by 6.06M. b", "size 70.00M and limit 63.94M"),
  ("Ran out of memory in memory space vmem. Used 21.46M of 16.00M vmem. "
   "Exceeded vmem capacity by 5.46M.\n", "Used 21.46M of 16.00M vmem"),
  ("Traceback\n  f()\njax.errors.JaxError: bad tile\n----\nFor simplicity, ...",
   "JaxError: bad tile"),
  ("killed\n", "killed"),
])  # fmt: skip
def test_compiler_errors_are_summarized(errors, reason):
  found = build._reason(errors)
  assert reason in found and "simplicity" not in found


def test_the_picture_is_a_valid_image(dump, tmp_path):
  picture.draw(
    [schedule.read(dump, "kern", V5P, (5,))], tmp_path / "schedule.png"
  )
  assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")


def test_missing_libtpu_is_reported(monkeypatch, capsys):
  monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
  assert command.main(["--target=v5p"]) == 1
  assert "libtpu is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--target=v9"], [
    "--target=v5p", "--blocks=1,2"]])  # fmt: skip
def test_invalid_arguments_raise(monkeypatch, arguments):
  monkeypatch.setattr(build, "missing", lambda: None)
  with pytest.raises(SystemExit):
    command.main(arguments)


@pytest.mark.chips
def test_the_last_line_is_the_result(monkeypatch, capsys):
  """A whole measurement next to splash, at small blocks to be quick."""
  # Splash only at blocks like ours.
  monkeypatch.setitem(command.REFERENCES["splash"], "forward", ())
  arguments = ["--target=v5p", "--blocks=512,512,256,128"]
  assert command.main([*arguments, "--compare=splash"]) == 0
  *table, last = capsys.readouterr().out.splitlines()
  found = json.loads(last)
  assert list(found) == [
    "kernel", "target", "direction", "bundles_per_kilo_element",
    "ratio_to_reference", "spills", "predicted_tflops", "roofline_share",
  ]  # fmt: skip
  assert 0.3 < found["ratio_to_reference"] < 1
  assert 0.3 < found["roofline_share"] < 1
  # At least q, k, v and o of 512 x 128 in bf16, each twice.
  assert 1.0 < float(table[0].rsplit("VMEM ")[1].split()[0]) < 4.0
