"""Compiles the programs of a benchmark for a chip that is not present.

    .venv-chips/bin/python -m tests.kernels_pallas.chips_bench h100 [REGEX]

prints a line of JSON for each job whose name matches, like the benchmark: 'ok',
or the compiler's error. Results can only be checked on a chip; this checks that
everything compiles, which would cost minutes of the chip. `--here` compiles in
this process, whose environment is set.
"""

import contextlib
import json
import re
import subprocess
import sys

import jax

from kernels_pallas.bench import bench_gpu, jobs, sequence
from kernels_pallas.inspect import build, gpu
from kernels_pallas.inspect.chips import CHIPS


def compiled(chip: str, only: str) -> list[dict]:
  """Returns the lines of a chip's jobs, from a child process.

  Args:
    chip: A key of `inspect.chips.CHIPS` or `inspect.gpu.TARGETS`.
    only: Regular expression for names.
  """
  done = subprocess.run(
    [sys.executable, "-m", __spec__.name, chip, only],
    capture_output=True,
    text=True,
    timeout=3000,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return [json.loads(line) for line in done.stdout.splitlines()]


def compile_all(chip: str, only: str) -> None:
  """Compiles the jobs in this process and prints their lines.

  Args:
    chip: A key of `inspect.chips.CHIPS` or `inspect.gpu.TARGETS`.
    only: Regular expression for names.
  """
  if chip in CHIPS:
    from jax.experimental import topologies

    platform, topology = "tpu", CHIPS[chip].topology
    device = topologies.get_topology_desc(topology, platform="tpu").devices[0]
  else:
    platform, device = "gpu", gpu.devices(chip)[0]
  target = jobs.Target(platform, device.device_kind)
  mesh = jax.sharding.Mesh(
    [device], (sequence.AXIS,), axis_types=(jax.sharding.AxisType.Auto,)
  )
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  for job in jobs.in_order(bench_gpu.jobs(target)):
    if not re.search(only, job.name):
      continue
    line = {"name": job.name, "ok": True}
    try:
      run, operands = job.program()
      shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
        operands,
      )
      # TPU kernels use the mesh, GPU kernels the default device.
      around = contextlib.nullcontext()
      if platform == "tpu" or "devices" in job.name:
        around = jax.set_mesh(mesh)
      with jax.default_device(device), around:
        # Appending writes into its first operand.
        donated = (0,) if job.name.startswith("append/") else ()
        done = jax.jit(run, donate_argnums=donated).lower(*shapes).compile()
      if donated:
        line |= _in_place(done, shapes[0])
    except Exception as problem:  # noqa: BLE001
      line = {"name": job.name, "ok": False, "reason": jobs.reason(problem)}
    print(json.dumps(line), flush=True)


def _in_place(done, held) -> dict[str, int]:
  """Returns the bytes written in place, and those of temporary copies."""
  memory = done.memory_analysis()
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held))
  return {
    "held": size,
    "in_place": memory.alias_size_in_bytes,
    "temporary": memory.temp_size_in_bytes,
  }


def main(arguments: list[str]) -> int:
  """Compiles in a child process with the compiler's environment."""
  chip, only = [*arguments, ""][:2]
  if "--here" in arguments:
    compile_all(chip, only)
    return 0
  import pathlib
  import tempfile

  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    environment = build.dumping(folder) if chip in CHIPS else (
      gpu._environment(folder))  # fmt: skip
    return subprocess.run(
      [sys.executable, "-m", __spec__.name, chip, only, "--here"],
      env=environment,
      check=False,
    ).returncode


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
