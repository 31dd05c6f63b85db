"""Compiles attention for a GPU that is not attached, and parses the result.

    python -m kernels_pallas.inspect.gpu --target=h100 --direction=forward

XLA's CUDA compiler needs a description of the chip and ptxas, but no GPU.
Mosaic GPU reads its dump settings from the environment, so each compilation is
a separate process: `python -m kernels_pallas.inspect.gpu --job=JSON`.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from kernels_pallas.inspect import ptx

TARGETS = {"a100": "mma", "h100": "wgmma", "b200": "tcgen05"}
"""Chips, and the `GpuTiles.cores` compiled for each."""

DTYPES = ("bfloat16", "float16")
FEATURES = ("window", "segments", "positions", "sinks", "softcap", "dropout")
"""Features of a call besides its mask; 'everything' is all of them."""

MASKS = ("full", "causal", "eight")

TIMEOUT = 600


@dataclasses.dataclass(frozen=True)
class Job:
  """What to compile: T = S tokens, four query heads, two key heads.

  Attributes:
    maker: 'ours' or 'attention_mgpu', JAX's kernel, for float16.
    target: One of `TARGETS`.
    direction: 'forward' or 'backward'.
    head_dim: Head dim of q, k and v.
    dtype: One of `DTYPES`.
    mask: One of `MASKS`; 'eight' has the most intervals that a query may have.
    operand: As in `GpuTiles`.
    length: Number of tokens.
    features: Some of `FEATURES`; for our kernels only.
    value_dim: Head dim of v; None is `head_dim`.
  """

  maker: str = "ours"
  target: str = "h100"
  direction: str = "forward"
  head_dim: int = 128
  dtype: str = "bfloat16"
  mask: str = "full"
  operand: str = "registers"
  length: int = 1024
  features: tuple[str, ...] = ()
  value_dim: int | None = None

  @property
  def dims(self) -> tuple[int, int]:
    """Head dims of q and k, and of v."""
    return self.head_dim, self.value_dim or self.head_dim


def main(arguments: list[str] | None = None) -> int:
  """Prints a table, then one line of JSON; returns the exit code."""
  args = _parser().parse_args(arguments)
  if args.job:
    _compile(Job(**json.loads(args.job)))
    return 0
  problem = missing()
  if problem is not None:
    print(f"kernels_pallas.inspect.gpu: {problem}", file=sys.stderr)
    return 1
  job = Job(
    target=args.target,
    direction=args.direction,
    head_dim=args.head_dim,
    dtype=args.dtype,
    mask=args.mask,
    features=args.features,
    value_dim=args.value_dim,
  )
  jobs = [job]
  if args.compare and args.mask == "eight":
    print(f"--compare: {args.compare} has no such mask", file=sys.stderr)
    return 2
  if args.compare:
    jobs.append(dataclasses.replace(job, maker=args.compare, dtype="float16"))
  found = {}
  for one in jobs:
    try:
      found[one.maker] = measure(one, args.keep)
    except ValueError as refusal:
      print(f"{one.maker}: {refusal}", flush=True)
      continue
    for kernel in found[one.maker]:
      print(_line(one.maker, kernel), flush=True)
  if "ours" not in found:
    return 1
  print(json.dumps(_summary(job, found["ours"])))
  return 0


def is_gpu_target(arguments: list[str]) -> bool:
  """Whether the command line names one of `TARGETS`."""
  parser = argparse.ArgumentParser(add_help=False)
  parser.add_argument("--target")
  return parser.parse_known_args(arguments)[0].target in TARGETS


def measure(job: Job, keep: pathlib.Path | None = None) -> list[ptx.Kernel]:
  """Compiles a job and returns its kernels.

  Args:
    job: What to compile.
    keep: Folder for the dumps; by default a temporary one.

  Raises:
    ValueError: Compilation fails; the compiler's message.
  """
  kernels = compiled(
    [
      "kernels_pallas.inspect.gpu",
      "--job",
      json.dumps(dataclasses.asdict(job)),
    ],
    None if keep is None else keep / job.maker,
  )
  if job.direction == "backward":
    kernels = [k for k in kernels if "forward" not in k.name]
  return kernels


def compiled(
  module: list[str], keep: pathlib.Path | None = None
) -> list[ptx.Kernel]:
  """Returns the kernels that a Python module compiles, run in its own process.

  Args:
    module: Its name and arguments.
    keep: Folder for the dumps; by default a temporary one.

  Raises:
    ValueError: Compilation fails; the compiler's message.
  """
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch) if keep is None else keep
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
      [sys.executable, "-m", *module],
      env=_environment(folder),
      capture_output=True,
      text=True,
      timeout=TIMEOUT,
      check=False,
    )
    if done.returncode:
      lines = [line for line in done.stderr.splitlines() if line.strip()]
      message = [line for line in lines if "Error" in line] or lines
      raise ValueError(" ".join(message[-1:])[-300:])
    return ptx.read(folder)


def devices(target: str) -> list:
  """Returns the devices of one of `TARGETS`, to compile for.

  Mosaic asks the default device for its instruction set.
  """
  from jax.experimental import topologies

  text = pathlib.Path(__file__).with_name(f"{target}.textproto").read_text()
  return topologies.get_topology_desc(
    target, platform="cuda", target_config=text, topology="1x1x1"
  ).devices


def missing() -> str | None:
  """Returns why nothing can be compiled here, or None."""
  plugins = importlib.util.find_spec("jax_plugins")
  places = [] if plugins is None else plugins.submodule_search_locations or []
  if not any(pathlib.Path(p, "xla_cuda13").exists() for p in places):
    return (
      "jax-cuda13-pjrt is not installed, and no GPU kernel compiles without "
      "it; `make test-chips` installs it into an environment of its own"
    )
  if toolkit() is None:
    return "ptxas was not found; pip install nvidia-cuda-nvcc beside the plugin"
  return None


def toolkit() -> pathlib.Path | None:
  """Returns the folder with bin/ptxas that NVIDIA's wheel installs, or None."""
  spec = importlib.util.find_spec("nvidia")
  for place in [] if spec is None else spec.submodule_search_locations or []:
    for found in sorted(pathlib.Path(place).glob("*/bin/ptxas")):
      return found.parents[1]
  return None


def _environment(folder: pathlib.Path) -> dict[str, str]:
  cuda = toolkit()
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "PATH": f"{cuda}/bin{os.pathsep}{os.environ.get('PATH', '')}",
    "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={cuda} "
    "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",
    "MOSAIC_GPU_DUMP_TO": str(folder),
    "MOSAIC_GPU_DUMP_PTX": "1",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "MOSAIC_GPU_DUMP_RESOURCES": "1",
  }


def _compile(job: Job) -> None:
  import jax
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  device = devices(job.target)[0]
  sharding = NamedSharding(Mesh([device], ("x",)), PartitionSpec())
  (H, Hv), T = job.dims, job.length

  def array(*shape, dtype=job.dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  function, data = call(job)
  data = {name: array(*x.shape, dtype=x.dtype) for name, x in data.items()}

  def backward(q, k, v, do, data):
    return jax.vjp(lambda *x: function(*x, **data), q, k, v)[1](do)

  def forward(q, k, v, do, data):
    return function(q, k, v, **data)

  run = forward if job.direction == "forward" else backward
  x = array(1, T, 4, H), array(1, T, 2, H), array(1, T, 2, Hv)
  with jax.default_device(device):
    jax.jit(run).lower(*x, array(1, T, 4, Hv), data).compile()


def call(job: Job) -> tuple:
  """Returns the function of q, k, v to compile, and its other arguments."""
  import jax

  if job.maker != "ours":
    return _theirs(job), {}
  rows = jax.ShapeDtypeStruct((1, job.length), "int32")
  data = {
    "segments": rows,
    "positions": rows,
    "sinks": jax.ShapeDtypeStruct((4,), "float32"),
  }
  return _ours(job), {k: x for k, x in data.items() if k in job.features}


def _ours(job: Job):
  from kernels_pallas.flash_attention.api import flash_attention
  from kernels_pallas.flash_attention.gpu.tile_sizes import for_head_dim
  from kernels_pallas.masks import Mask

  tiles = for_head_dim(*job.dims, TARGETS[job.target])
  options = {
    "backend": "mosaic_gpu",
    "config": dataclasses.replace(tiles, operand=job.operand),
  }
  if "softcap" in job.features:
    options["softcap"] = 30.0
  if "dropout" in job.features:
    options |= {"dropout_rate": 0.1, "dropout_seed": 0}
  window = (job.length // 2 if "window" in job.features else None, None)
  # Every other sixteenth of the keys.
  size = -(-job.length // 16)
  build = {
    "full": Mask.full,
    "causal": Mask.causal,
    "eight": functools.partial(
      Mask.where, lambda q, k: k % (2 * size) < size, extent=job.length
    ),
  }[job.mask]

  def run(q, k, v, segments=None, positions=None, sinks=None):
    mask = build(window, segments, positions, positions)
    return flash_attention(q, k, v, mask=mask, sinks=sinks, **options)

  return run


def _theirs(job: Job):
  """JAX's attention at our block sizes. If jaxlib was built without CUDA, its
  check of the runtime's version is answered here."""
  import types

  from jax.experimental.pallas.ops.gpu import attention_mgpu

  if attention_mgpu.cuda_versions is None:
    attention_mgpu.cuda_versions = types.SimpleNamespace(
      cuda_runtime_get_version=lambda: 13000
    )
  config = attention_mgpu.TuningConfig(
    block_q=64,
    block_kv=64 if job.head_dim > 128 else 128,  # noqa: PLR2004
    max_concurrent_steps=2,
    causal=job.mask == "causal",
    block_q_dkv=64,
    block_kv_dkv=64,
    block_q_dq=64,
    block_kv_dq=64,
  )
  return lambda q, k, v: attention_mgpu.attention(q, k, v, config)


def _line(maker: str, kernel: ptx.Kernel) -> str:
  loop = ", ".join(f"{n} {kind}" for kind, n in sorted(kernel.loop.items()))
  return (
    f"{maker:>14} {kernel.name}: {kernel.registers} registers, "
    f"{kernel.spills} bytes spilled, {kernel.shared} bytes shared; "
    f"an iteration of {kernel.flops / 1e6:.1f} MFLOP: {loop}"
  )


def _summary(job: Job, kernels: list[ptx.Kernel]) -> dict:
  shared = [k.shared for k in kernels if k.shared is not None]
  return {
    "kernel": "flash_attention",
    "target": job.target,
    "direction": job.direction,
    "bundles_per_kilo_element": None,
    "ratio_to_reference": None,
    "spills": sum(k.spills for k in kernels),
    "predicted_tflops": None,
    "roofline_share": None,
    "registers": max(k.registers for k in kernels),
    "shared_bytes": max(shared, default=None),
  }


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m kernels_pallas.inspect.gpu", description=main.__doc__
  )
  add = parser.add_argument
  add("--kernel", choices=["flash_attention"], default="flash_attention")
  add("--target", choices=TARGETS, default="h100")
  add("--direction", choices=["forward", "backward"], default="forward")
  add("--head_dim", type=int, default=128)
  add("--dtype", choices=DTYPES, default="bfloat16")
  add("--mask", choices=MASKS, default="full")
  choices = ", ".join(FEATURES)
  add("--features", type=_features, default=(),
      help=f"joined by commas, of {choices}; or everything")  # fmt: skip
  add("--value_dim", type=int, help="head dim of v, if different")
  add("--compare", choices=["attention_mgpu"], help="measure JAX's kernel, too")
  add("--keep", type=pathlib.Path, help="folder for the compiler's dumps")
  add("--job", help=argparse.SUPPRESS)
  return parser


def _features(text: str) -> tuple[str, ...]:
  if text == "everything":
    return FEATURES
  names = tuple(name for name in text.split(",") if name)
  if unknown := sorted(set(names) - set(FEATURES)):
    raise argparse.ArgumentTypeError(
      f"found {', '.join(unknown)}, expected of {', '.join(FEATURES)}, or "
      "everything"
    )
  return names


if __name__ == "__main__":
  sys.exit(main())
