"""The GPU bench walks every row without a GPU, and loses none to another."""

import importlib.machinery
import json
import pathlib
import subprocess
import sys
import types

import jax
import pytest

from kernels_pallas import bench_gpu, bench_gpu_packed
from kernels_pallas.quantized_matmul import mosaic_gpu
from tests.support_gpu import needs_kernels

pytestmark = needs_kernels

ROOT = pathlib.Path(__file__).parents[2]


# Hides packages as if they were not installed: JAX and numpy are all it asks.
ALONE = """
import importlib.machinery as m, runpy, sys
kept = m.PathFinder.find_spec
def find_spec(name, path=None, target=None):
  if name.split(".")[0] in ("jaxtyping", "beartype", "flax", "absl"):
    return None
  return kept(name, path, target)
m.PathFinder.find_spec = find_spec
sys.argv = ["bench_gpu", *sys.argv[1:]]
runpy.run_module("kernels_pallas.bench_gpu", run_name="__main__")
"""


@pytest.mark.parametrize(
  "checks", [["sinks"], pytest.param([], marks=pytest.mark.slow)]
)
def test_dry_run_walks_every_row_with_nothing_but_jax(checks):
  only = [f"--only={name}" for name in checks]
  done = subprocess.run(
    [sys.executable, "-c", ALONE, "--dry-run", *only],
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


def test_packed_weights_are_no_failure_of_other_gpus(monkeypatch, capsys):
  monkeypatch.setattr(mosaic_gpu, "device", lambda: ("gpu", "Tesla V100"))
  (found,) = bench_gpu_packed.measure(False, 1, bench_gpu.guarded)
  assert (
    "no kernel" in found["skipped"] and "skipped" in capsys.readouterr().out
  )
  gpu = types.SimpleNamespace(device_kind="Tesla V100", platform="gpu")
  monkeypatch.setattr(jax, "devices", lambda: [gpu])
  monkeypatch.setattr(bench_gpu, "table", lambda *_: [])
  for ok in (True, False):
    monkeypatch.setattr(bench_gpu, "check", lambda *_, ok=ok: {"a": {"ok": ok}})
    assert bench_gpu.main([]) == (0 if ok else 1)


def test_flash_attention_has_a_column_where_it_is_installed(monkeypatch):
  row = bench_gpu.Row(8, 1, 2, 4, "float32", True, "forward")
  called = []

  def flash_mha(q, k, v, is_causal):
    called.append(is_causal)
    return q + k + v

  package = types.ModuleType("flash_attn_jax")
  package.flash_mha = flash_mha
  package.__spec__ = importlib.machinery.ModuleSpec("flash_attn_jax", None)
  plain = bench_gpu.MAKERS | {"ours": None, "cudnn": None, "jax": None}
  monkeypatch.setattr(bench_gpu, "MAKERS", plain)
  monkeypatch.setattr(bench_gpu, "rows", lambda tiny: [row])
  assert "flash_attn" not in bench_gpu.table(False, 1)[0]
  monkeypatch.setitem(sys.modules, "flash_attn_jax", package)
  assert bench_gpu.table(False, 1)[0]["flash_attn"]["ms"] > 0 and called[0]


def test_without_a_gpu_it_says_so(capsys):
  assert bench_gpu.main([]) == 1
  last = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert "expected an Ampere, Ada, Hopper or Blackwell GPU" in last["error"]


def test_flops_are_those_of_visible_pairs():
  full = bench_gpu.Row(4, 1, 2, 8, "bfloat16", False, "forward")
  causal = bench_gpu.Row(4, 1, 2, 8, "bfloat16", True, "backward")
  assert full.flops == 4 * 2 * 8 * 16
  assert causal.flops == 3.5 * 4 * 2 * 8 * 10
