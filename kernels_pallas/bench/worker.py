"""Benchmark worker: runs jobs in order, and prints a line of JSON for each.

It is a separate process: a kernel may crash or hang it, and `supervisor` then
starts another one for the remaining jobs.
"""

import importlib.util
import json
import os
import re
import sys
import time
import types
from collections.abc import Callable
from typing import Any

BROKEN = 3
"""Exit code if the chip no longer computes."""


def set_up(tiny: bool) -> None:
  """Sets up the process before JAX is imported.

  Args:
    tiny: Whether kernels are interpreted, on the CPU.
  """
  if tiny:
    # The interpreter's threads wait for each other, so XLA needs one for each.
    os.environ.setdefault("NPROC", "16")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
  if importlib.util.find_spec("jaxtyping") is None:
    sys.modules["jaxtyping"] = _Unchecked("jaxtyping")


class _Unchecked(types.ModuleType):
  """Replaces jaxtyping if it is not installed, with annotations that do
  nothing.

  The kernels are annotated with it, but benchmarks do not check that.
  """

  def __getattr__(self, name: str) -> type:
    if name.startswith("__"):
      raise AttributeError(name)
    return type(name, (), {"__class_getitem__": classmethod(lambda c, _: c)})


def run_jobs(
  platform: str,
  make: Callable[[Any], list[Any]],
  tiny: bool,
  only: str,
  done: set[str],
  seconds: float | None,
) -> int:
  """Prints the chip and the names of all jobs, then each job's result.

  Args:
    platform: 'gpu' or 'tpu'.
    make: Maps a `jobs.Target` to all jobs.
    tiny: Whether kernels are interpreted, on the CPU.
    only: Regular expression for names.
    done: Names of jobs to skip.
    seconds: Time in which jobs may start; None for no limit.

  Returns:
    The exit code: 0, `BROKEN`, or 1 if there is no such chip.
  """
  start = time.monotonic()
  import jax

  from kernels_pallas.bench import jobs

  device = jax.devices()[0]
  here = {"cuda": "gpu"}.get(device.platform, device.platform)
  _emit({"device": device.device_kind, "devices": jax.device_count(),
        "jax": jax.__version__, "python": sys.version.split()[0]})  # fmt: skip
  if not tiny and here != platform:
    _emit({"error": f"found a {here}, expected a {platform.upper()}"})
    return 1
  target = jobs.Target(platform, device.device_kind, tiny)
  found = [
    job for job in jobs.in_order(make(target)) if re.search(only, job.name)
  ]
  found = [job for job in found if job.name not in done]
  _emit({"jobs": [job.name for job in found]})
  for job in found:
    if seconds is not None and time.monotonic() - start > seconds:
      return 0
    _emit({"start": job.name})
    line = _run(job)
    _emit({"name": job.name, **line})
    if '"reason"' in json.dumps(line) and not _alive():
      return BROKEN
  return 0


def _run(job: Any) -> dict[str, Any]:
  from kernels_pallas.bench import jobs

  start = time.monotonic()
  try:
    line = job.measure()
  except Exception as problem:  # noqa: BLE001
    line = {"ok": False, "reason": jobs.reason(problem)}
  return line | {"seconds": round(time.monotonic() - start, 1)}


def _alive() -> bool:
  """Whether the chip still computes: after illegal accesses it does not."""
  import jax.numpy as jnp

  try:
    return float(jnp.ones(8).sum()) == 8.0  # noqa: PLR2004
  except Exception:  # noqa: BLE001
    return False


def _emit(line: dict[str, Any]) -> None:
  print(json.dumps(line), flush=True)
