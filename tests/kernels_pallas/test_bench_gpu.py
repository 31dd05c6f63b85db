"""The GPU bench walks every row without a GPU, and loses none to another."""

import json
import pathlib
import subprocess
import sys

import pytest

from kernels_pallas import bench_gpu, bench_gpu_packed

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
  "checks", [["sinks"], pytest.param([], marks=pytest.mark.slow)]
)
def test_dry_run_walks_every_row(checks):
  only = [f"--only={name}" for name in checks]
  done = subprocess.run(
    [sys.executable, "-m", "kernels_pallas.bench_gpu", "--dry-run", *only],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
  found = json.loads(done.stdout.splitlines()[-1])
  assert found["ok"] and len(found["checks"]) == len(
    checks or bench_gpu.checks(True)
  )
  assert len(found["times"]) == len(bench_gpu.rows(True))
  assert all("ms" in row["ours"] for row in found["times"])
  assert len(found["packed"]) == len(bench_gpu_packed.rows(True))
  assert all(row["ok"] and "ms" in row for row in found["packed"])


def test_a_part_that_fails_does_not_lose_the_others(monkeypatch, capsys):
  def broken(row, tiny):
    raise RuntimeError("no such chip\nand more")

  monkeypatch.setattr(
    bench_gpu, "MAKERS", {"bad": broken, "jax": bench_gpu.MAKERS["jax"]}
  )
  found = bench_gpu.table(True, 1)
  assert len(found) == len(bench_gpu.rows(True))
  for row in found:
    assert row["bad"] == {"reason": "RuntimeError: no such chip"}
    assert row["jax"]["ms"] > 0
  assert "no such chip" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(capsys):
  assert bench_gpu.main([]) == 1
  last = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert "expected a Hopper GPU" in last["error"]


def test_flops_are_those_of_visible_pairs():
  full = bench_gpu.Row(4, 1, 2, 8, "bfloat16", False, "forward")
  causal = bench_gpu.Row(4, 1, 2, 8, "bfloat16", True, "backward")
  assert full.flops == 4 * 2 * 8 * 16
  assert causal.flops == 3.5 * 4 * 2 * 8 * 10
