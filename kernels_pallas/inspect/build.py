"""Compiles a kernel for a TPU that is not attached, in a separate process.

libtpu reads its dump settings once, when it starts, so each compilation is a
process, `python -m kernels_pallas.inspect.build JOB`, with its own folder.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

from kernels_pallas.inspect.programs import Job

TIMEOUT = 600

# The sentence in pages of error output that states the reason.
_REASON = re.compile(
  r"Scoped allocation with[^.]*\.\w+ and[^-]*?limit by \S+"
  r"|Used \S+ of \S+ vmem\. Exceeded vmem capacity by [\d.]+\w"
)

_RAISED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit)\b")

FEATURES = ("full", "causal", "everything")
"""Features of attention: a full mask, a causal one, or all that is possible."""


def missing(maker: str = "flash_attention") -> str | None:
  """Returns why `maker` cannot be compiled here, or None.

  Args:
    maker: A key of `programs.PROGRAMS`.
  """
  if importlib.util.find_spec("libtpu") is None:
    return (
      "libtpu is not installed, and no TPU kernel compiles without it; "
      "pip install libtpu into an environment of its own, or put its folder on "
      "PYTHONPATH"
    )
  if maker == "tokamax" and importlib.util.find_spec("tokamax") is None:
    return "not installed, so not compared; pip install tokamax"
  return None


def dumping(folder: pathlib.Path) -> dict[str, str]:
  """Returns the environment of a process whose libtpu dumps into `folder`.

  Dumps only the passes that `schedule` parses: all 70 would be a gigabyte, and
  half of the time.
  """
  flags = (
    f"--xla_jf_dump_to={folder}",
    "--xla_jf_dump_llo_text=true",
    "--xla_jf_dump_llo_pass_label_regex=final|post-ra",
  )
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "LIBTPU_INIT_ARGS": " ".join(flags),
  }


def compile_to(job: Job, folder: pathlib.Path) -> str | None:
  """Compiles `job` and leaves libtpu's dumps in `folder`.

  Returns:
    None, or the compiler's error.
  """
  folder.mkdir(parents=True, exist_ok=True)
  command = [sys.executable, "-m", "kernels_pallas.inspect.build"]
  done = subprocess.run(
    [*command, json.dumps(dataclasses.asdict(job))],
    env=dumping(folder),
    capture_output=True,
    text=True,
    timeout=TIMEOUT,
    check=False,
  )
  if done.returncode == 0:
    return None
  return _reason(done.stderr)


def _reason(errors: str) -> str:
  """Returns the sentence with the reason, or the last exception, or line."""
  found = _REASON.search(errors)
  if found is not None:
    return found.group()
  lines = [line for line in errors.splitlines() if line.strip()]
  raised = [line for line in lines if _RAISED.match(line)]
  return " ".join((raised or lines)[-1:])[:300]


def main() -> None:
  """Compiles the job given as JSON on the command line."""
  job = Job(**json.loads(sys.argv[1]))
  import jax
  from jax.experimental import topologies
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  topology = topologies.get_topology_desc(job.chip.topology, platform="tpu")
  mesh = Mesh(topology.devices[:1], ("x",))
  whole = NamedSharding(mesh, PartitionSpec())
  function, shapes = job.program.call(job)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes
  )
  with jax.set_mesh(mesh):
    jax.jit(function).lower(*shapes).compile()


if __name__ == "__main__":
  main()
