"""The benchmarks run every job without a chip and isolate failing jobs."""

import collections
import dataclasses
import importlib.machinery
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.bench import (
  attention,
  baselines,
  bench_gpu,
  bench_tpu,
  jobs,
  packed,
  sequence,
  supervisor,
  times,
  worker,
)
from kernels_pallas.bench.jobs import Target
from tests.support_gpu import needs_kernels

pytestmark = needs_kernels

ROOT = pathlib.Path(__file__).parents[3]
CHIPS = {
  "gpu": (bench_gpu, Target("gpu", "NVIDIA H100 80GB HBM3")),
  "tpu": (bench_tpu, Target("tpu", "TPU v5 lite")),
}

# Hides packages as if they were not installed: only JAX and NumPy are needed.
ALONE = """
import importlib.machinery as m
kept = m.PathFinder.find_spec
def find_spec(name, path=None, target=None):
  if name.split(".")[0] in ("jaxtyping", "beartype", "flax", "absl"):
    return None
  return kept(name, path, target)
m.PathFinder.find_spec = find_spec
"""
QUICK = "^append/bf|packed/W4.*forward|time/append"


def dry_run(tmp_path, platform, only):
  """Returns the lines of a dry run, with only JAX installed."""
  (tmp_path / "sitecustomize.py").write_text(ALONE)
  done = subprocess.run(
    [sys.executable, "-m", CHIPS[platform][0].__name__, "--dry-run",
     f"--only={only}", "--patience=900"],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    capture_output=True,
    text=True,
    timeout=3000,
    check=False,
  )  # fmt: skip
  lines = [json.loads(line) for line in done.stdout.splitlines()]
  assert done.returncode == 0, (lines[-1], done.stderr[-2000:])
  return lines


@pytest.mark.slow
@pytest.mark.parametrize("platform", CHIPS)
@pytest.mark.parametrize("only", [QUICK, ""], ids=["", "all"])
def test_dry_run_runs_all_jobs_with_only_jax_installed(
  tmp_path, platform, only
):
  first, *lines, last = dry_run(tmp_path, platform, only)
  target = Target(platform, "cpu", tiny=True)
  wanted = [
    job.name
    for job in jobs.in_order(CHIPS[platform][0].jobs(target))
    if re.search(only, job.name)
  ]
  assert [line["name"] for line in lines] == wanted and len(wanted) > 3
  assert all(line["ok"] for line in lines)
  assert first["jax"] == jax.__version__ and "cpu" in first["device"]
  assert last["ok"] and last["passed"] == len(wanted) and not last["left"]


@pytest.mark.parametrize("platform", CHIPS)
def test_every_kernel_has_a_smoke_test_checks_and_times(platform):
  module, target = CHIPS[platform]
  found = jobs.in_order(module.jobs(target))
  names = [job.name for job in found]
  assert len(set(names)) == len(names)
  stages = [job.stage for job in found]
  assert stages == sorted(stages)
  for stage in range(3):
    costs = [job.cost for job in found if job.stage == stage]
    assert costs == sorted(costs) and min(costs) > 0
  by_stage = collections.defaultdict(set)
  for job in found:
    kind = job.name.removeprefix("time/").split("/")
    kind = kind[0] if kind[0] != "decode" else kind[1][:5]
    by_stage[job.stage].add(kind)
  kernels = {"attention", "cache", "pages", "append", "packed"}
  assert by_stage[jobs.SMOKE] == kernels
  # The parts of a ring are attention calls.
  assert by_stage[jobs.CHECK] == by_stage[jobs.TIME] == kernels | {"sequence"}


@pytest.mark.slow
@pytest.mark.parametrize("platform", CHIPS)
@pytest.mark.sample(3)
def test_nothing_is_interpreted_on_a_chip(platform):
  """The smoke tests' programs, lowered for the chip, call kernels."""
  module, target = CHIPS[platform]
  call = {"gpu": "mosaic_gpu", "tpu": "tpu_custom_call"}[platform]
  found = {job.name: job for job in module.jobs(target)}
  for name in ("decode/cache", "decode/pages", "attention/causal/forward",
               "sequence/parts/forward"):  # fmt: skip
    run, shapes = found[name].program()
    traced = jax.jit(run).trace(*shapes)
    name = {"gpu": "cuda"}.get(platform, platform)
    assert call in traced.lower(lowering_platforms=(name,)).as_text()


def test_every_block_of_a_persistent_kernel_takes_several_lines():
  """In attention's checks, so that buffers are reused."""
  target = CHIPS["gpu"][1]
  for name, x in attention.problems(target).items():
    tiles = attention.tiles(target, x.H, x.Hv, x)
    lines = {
      "forward": x.N * -(-x.T // tiles.forward.rows),
      "dq": x.N * -(-x.T // tiles.dq.rows),
      "dkv": x.K * -(-x.S // tiles.dkv.rows),
    }
    if x.T > 1:
      assert x.B * min(lines.values()) >= 2 * tiles.programs, (name, lines)


WORKER = """
import json, os, pathlib, sys, time
to = next(a for a in sys.argv if a.startswith("--to="))[5:]
has = pathlib.Path(to).read_text() if pathlib.Path(to).exists() else ""
left = [n for n in ("good", "hangs", "dies", "breaks", "last")
        if '"' + n + '"' not in has]
say = lambda **line: print(json.dumps(line), flush=True)
say(device="none")
say(jobs=left)
for name in left:
  say(start=name)
  if name == "hangs":
    time.sleep(600)
  if name == "dies":
    os.kill(os.getpid(), 11)
  say(name=name, ok=name != "breaks")
  if name == "breaks":
    sys.exit(3)
"""


@pytest.mark.slow
def test_failing_jobs_do_not_affect_the_others(tmp_path, capsys):
  """One hangs, one kills its process, one leaves the chip broken."""
  script, to = tmp_path / "worker.py", tmp_path / "lines.jsonl"
  script.write_text(textwrap.dedent(WORKER))
  command = [sys.executable, str(script), f"--to={to}"]
  assert supervisor.supervise(command, to, patience=4.0) == 1
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  last = lines[-1]
  assert list(last["failed"]) == ["hangs", "dies", "breaks"]
  assert "4 s; killed" in last["failed"]["hangs"]
  assert "ended with -11" in last["failed"]["dies"]
  assert (last["passed"], last["left"], last["ok"]) == (2, [], False)
  assert supervisor.read_results(to)["last"]["ok"]
  # With the same file nothing runs again.
  assert supervisor.supervise(command, to) == 1
  assert "start" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["ptxas info: some", "3"])
def test_a_job_that_prints_and_dies_has_failed(tmp_path, capsys, text):
  """What it printed is neither its result nor its end."""
  script, to = tmp_path / "worker.py", tmp_path / "lines.jsonl"
  die = "    os.kill(os.getpid(), 11)"
  said = f'    print("{text}", flush=True)\n'
  script.write_text(WORKER.replace('"hangs", ', "").replace(die, said + die))
  command = [sys.executable, str(script), f"--to={to}"]
  assert supervisor.supervise(command, to) == 1
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert list(lines[-1]["failed"]) == ["dies", "breaks"]
  assert lines[-1]["left"] == [] and {"said": text} in lines


@pytest.mark.slow
def test_a_run_ends_at_its_budget_and_the_next_continues(tmp_path, capsys):
  script, to = tmp_path / "worker.py", tmp_path / "lines.jsonl"
  script.write_text(textwrap.dedent(WORKER))
  command = [sys.executable, str(script), f"--to={to}"]
  assert supervisor.supervise(command, to, budget=6.0, patience=60.0) == 2
  last = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert last["passed"] == 1 and last["seconds"] < 20
  assert last["left"] == ["hangs", "dies", "breaks", "last"]
  with to.open("a") as file:
    file.write('{"name": "hangs", "ok": true}\n{"name": "dies", "ok": true}\n')
    file.write('{"name": "cut o')
  assert supervisor.supervise(command, to) == 1
  last = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert list(last["failed"]) == ["breaks"] and last["passed"] == 4


def test_a_missing_chip_is_reported(capsys):
  assert worker.run_jobs("gpu", lambda target: [], False, "", set(), None) == 1
  last = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert last == {"error": "found a cpu, expected a GPU"}


def test_a_job_that_raises_does_not_end_the_worker(capsys):
  def bad():
    raise RuntimeError("no such chip\nand more")

  def make(target):
    line = lambda: {"ok": True}  # noqa: E731
    return [
      jobs.Job(name, jobs.CHECK, cost, measure, dict)
      for cost, name, measure in ((1.0, "bad", bad), (2.0, "good", line))
    ]

  assert worker.run_jobs("gpu", make, True, "", set(), None) == 0
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  found = {x["name"]: x for x in lines if "name" in x}
  assert found["bad"]["reason"] == "RuntimeError: no such chip"
  assert found["good"]["ok"] and not found["bad"]["ok"]
  # A second worker has no time left.
  assert worker.run_jobs("gpu", make, True, "", {"bad"}, -1.0) == 0
  assert "start" not in capsys.readouterr().out.splitlines()[-1]


def compared(run, limit=0.1, tiny=True):
  """Returns the line of a check whose expected values are 1, -inf and 3."""
  truth = jnp.array([1.0, -jnp.inf, 3.0])
  check = jobs.Check(
    run=run,
    operands=lambda: (jnp.ones(3),),
    expected=lambda x: {"y": truth},
    tolerances=lambda operands, truth: {"y": limit},
  )
  return jobs.check(Target("gpu", "", tiny), "a", check, 1.0).measure()


@pytest.mark.parametrize(
  ("found", "ratio"),
  [
    ([1.0, -np.inf, 3.0], 0.0),
    ([1.0, -np.inf, 3.05], 0.5),
    ([1.0, -np.inf, 3.2], 2.0),
    ([np.nan, -np.inf, 3.0], jobs.HOPELESS),
    ([1.0, 0.0, 3.0], jobs.HOPELESS),
    ([1.0, -np.inf, np.inf], jobs.HOPELESS),
  ],
)
def test_a_check_detects_wrong_values(found, ratio):
  line = compared(lambda x: {"y": jnp.array(found) * x})
  assert line["error_ratio"]["y"] == pytest.approx(ratio, rel=1e-3)
  assert line["ok"] == (ratio <= 1)
  assert compared(lambda x: {"y": jnp.array(found) * x}, limit=0.0)["ok"] == (
    ratio == 0
  )


def test_a_check_detects_irreproducible_results(monkeypatch):
  monkeypatch.setattr(jobs, "poison", lambda target: None)
  count = iter(range(9))

  def run(x):
    value = jax.pure_callback(
      lambda: np.float32(next(count)), jax.ShapeDtypeStruct((), np.float32)
    )
    return {"y": jnp.array([1.0, -jnp.inf, 3.0]) + 1e-3 * value}

  line = compared(run, tiny=False)
  assert (
    line["error_ratio"]["y"] <= 1 and not line["repeats"] and not line["ok"]
  )


def test_a_failing_baseline_does_not_affect_the_others():
  def broken():
    raise RuntimeError("not installed\nat all")

  makers = {"ours": lambda: jnp.sin, "theirs": broken}
  run = lambda makers: jobs.time_all(  # noqa: E731
    CHIPS["gpu"][1], makers, lambda: (jnp.ones(8),), flops=8e12, size=8e9
  )
  line = run(makers)
  assert line["ok"] and line["theirs"] == {
    "reason": "RuntimeError: not installed"
  }
  took = line["ours"]["ms"] / 1e3
  assert line["ours"]["of_peak"] == pytest.approx(8 / took / 989, rel=0.05)
  assert line["ours"]["of_bandwidth"] == pytest.approx(
    8 / took / 3350, rel=0.05
  )
  assert not run({"ours": broken, "theirs": lambda: jnp.sin})["ok"]


@pytest.mark.parametrize("platform", CHIPS)
def test_a_baseline_is_credited_with_the_bytes_that_it_reads(
  platform, monkeypatch
):
  """The matrix in bfloat16, not the packed one."""
  target, given = Target(platform, "", tiny=True), []

  def seconds(run, *operands, tiny):
    given.append(operands)
    return 1e-9  # so that GB/s are bytes

  monkeypatch.setattr(jobs, "seconds", seconds)
  for job in packed.times(target):
    line = job.measure()
    rows, _, matrix = given.pop()
    assert matrix.dtype == jnp.bfloat16
    moved = rows.nbytes + matrix.nbytes + (rows @ matrix).nbytes
    assert line["xla_bfloat16"]["gb_per_s"] == moved > line["ours"]["gb_per_s"]


def test_flash_attention_has_a_column_where_it_is_installed(monkeypatch):
  row, target = (
    times.AttentionCall(8, 1, 2, 4, True, "forward"),
    CHIPS["gpu"][1],
  )
  package = types.ModuleType("flash_attn_jax")
  package.flash_mha = lambda q, k, v, is_causal: q + k + v
  package.__spec__ = importlib.machinery.ModuleSpec("flash_attn_jax", None)
  assert "flash_attn" not in baselines.attention(target, row)
  monkeypatch.setitem(sys.modules, "flash_attn_jax", package)
  attend = baselines.attention(target, row)["flash_attn"]()
  assert attend(1, 2, 3) == 6


@pytest.mark.filterwarnings("ignore:jax.experimental.pallas.ops.gpu")
@pytest.mark.parametrize("platform", CHIPS)
def test_the_paged_baseline_accepts_its_arguments(platform):
  """Whose order differs between JAX's two kernels."""
  target, x = CHIPS[platform][1], times.DecodeStep(2, 512, 4, 2, 128, page=16)
  attend = baselines.decoding(target, x)["jax_paged"]()
  q = jax.ShapeDtypeStruct((x.rows, x.N, x.H), jnp.bfloat16)
  table = jax.ShapeDtypeStruct((x.rows, x.tokens // x.page), jnp.int32)
  apart = jax.eval_shape(lambda: baselines.split_pages(x))
  found = jax.eval_shape(attend, q, None, table, apart)
  assert (found.shape, found.dtype) == (q.shape, q.dtype)


def test_flops_are_those_of_visible_pairs():
  full = times.AttentionCall(4, 1, 2, 8, False, "forward")
  causal = times.AttentionCall(4, 1, 2, 8, True, "backward")
  assert full.flops == 4 * 2 * 8 * 16
  assert causal.flops == 3.5 * 4 * 2 * 8 * 10


@pytest.mark.parametrize("tiny", [False, True])
def test_flops_of_parts_are_those_inside_the_window(tiny):
  target = dataclasses.replace(CHIPS["tpu"][1], tiny=tiny)
  job = next(x for x in times.times(target) if "sequence/parts" in x.name)
  B, T, N, H = job.program()[1][0]["q"].shape
  seen = sequence.causal_by_position(T, T).visible(T, T)
  assert job.cost == 3.5 * 4 * B * N * H * int(seen.sum())
