"""Compiles a kernel for a TPU that is not here, in a process of its own.

libtpu reads where to dump once, when it starts: so each compilation is a
process, `python -m kernels_pallas.inspect.build JOB`, with a folder of its own.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

from kernels_pallas.inspect.chips import CHIPS

TIMEOUT = 600

# The sentence in pages of error that says why.
_REASON = re.compile(r"Scoped allocation with[^.]*\.\w+ and[^-]*?limit by \S+")


@dataclasses.dataclass(frozen=True)
class Job:
  """What to compile: T = S tokens, one head, full mask.

  Attributes:
    maker: 'ours' or 'splash'.
    target: A key of `CHIPS`.
    direction: 'forward' or 'backward'.
    length: Tokens.
    head_dim: Of q, k and v.
    dtype: 'bfloat16' or 'float32'.
    blocks: (q, kv, q part, kv part) of ours; (q, kv, kv part, fused: 0 or 1)
      of splash.
    backward: Organisation of our backward pass.
  """

  maker: str
  target: str
  direction: str
  length: int
  head_dim: int
  dtype: str
  blocks: tuple[int, ...]
  backward: str = "fused"


def missing() -> str | None:
  """Why nothing can be compiled here, or None."""
  if importlib.util.find_spec("libtpu") is None:
    return (
      "libtpu is not installed, and no TPU kernel compiles without it; "
      "pip install libtpu into an environment of its own, or put its folder on "
      "PYTHONPATH"
    )
  return None


def compile_to(job: Job, folder: pathlib.Path) -> str | None:
  """Compiles `job` and leaves libtpu's dumps in `folder`.

  Returns:
    None, or the last lines of what the compiler said against it.
  """
  folder.mkdir(parents=True, exist_ok=True)
  flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "LIBTPU_INIT_ARGS": flags,
  }
  command = [sys.executable, "-m", "kernels_pallas.inspect.build"]
  done = subprocess.run(
    [*command, json.dumps(dataclasses.asdict(job))],
    env=environment,
    capture_output=True,
    text=True,
    timeout=TIMEOUT,
    check=False,
  )
  if done.returncode == 0:
    return None
  said = _REASON.search(done.stderr)
  if said is not None:
    return said.group()
  lines = [line for line in done.stderr.splitlines() if line.strip()]
  return " ".join(lines[-1:])[-300:]


def main() -> None:
  """Compiles the job that the command line holds as JSON."""
  job = Job(**json.loads(sys.argv[1]))
  import jax
  import jax.numpy as jnp
  from jax.experimental import topologies
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  chip = CHIPS[job.target]
  devices = topologies.get_topology_desc(chip.topology, platform="tpu").devices
  mesh = Mesh(devices[:1], ("x",))
  function = (_ours if job.maker == "ours" else _splash)(job)
  x = jax.ShapeDtypeStruct(
    (1, job.length, job.head_dim),
    jnp.dtype(job.dtype),
    sharding=NamedSharding(mesh, PartitionSpec()),
  )

  def backward(q, k, v):
    return jax.vjp(function, q, k, v)[1](q)

  with jax.set_mesh(mesh):
    run = function if job.direction == "forward" else backward
    jax.jit(run).lower(x, x, x).compile()


def _ours(job: Job) -> Any:
  from kernels_pallas.flash_attention.api import flash_attention
  from kernels_pallas.flash_attention.tiling import Tile, Tiles

  tile = Tile(*job.blocks)
  tiles = {"forward": tile} if job.direction == "forward" else {}
  tiles = tiles or {"dkv": tile, "dq": tile, "backward": job.backward}

  def run(q, k, v):
    q, k, v = (y.swapaxes(0, 1)[None] for y in (q, k, v))
    return flash_attention(
      q, k, v, backend="mosaic_tpu", config=Tiles(**tiles)
    )[0].swapaxes(0, 1)

  return run


def _splash(job: Job) -> Any:
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as mask,
  )

  q, kv, part, fused = job.blocks
  sizes = kernel.BlockSizes(
    block_q=q, block_kv=kv, block_kv_compute=part,
    block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=part,
    block_q_dq=None if fused else q, block_kv_dq=None if fused else kv,
    use_fused_bwd_kernel=bool(fused),
  )  # fmt: skip
  full = mask.MultiHeadMask([mask.FullMask((job.length, job.length))])
  return kernel.make_splash_mha(
    full, block_sizes=sizes, head_shards=1, q_seq_shards=1
  )


if __name__ == "__main__":
  main()
