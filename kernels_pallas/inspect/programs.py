"""Kernels that can be inspected: how to call each, and the work of its grid
steps.

A kernel is one `Program` in `PROGRAMS`. Its steps state the matrix work of a
grid step, to validate a schedule, and the bytes it fetches, to predict when
memory is the limit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from kernels_pallas.inspect.chips import CHIPS, Chip

EXACT, LANES, WIDTH = "exact", "lanes", "width"
"""What pads the head dim of a matmul: nothing, if it indexes rows that stream
through a matrix unit; the 128 lanes of a register, if it is contracted or was
transposed; the columns of the unit, if it is the result's last axis."""

LANE_COUNT = 128


@dataclasses.dataclass(frozen=True)
class Job:
  """What to compile: for attention, T = S tokens and one head.

  Attributes:
    maker: A key of `PROGRAMS`.
    target: A key of `CHIPS`.
    direction: 'forward' or 'backward'.
    length: Number of tokens.
    head_dim: Head dim of q, k and v.
    dtype: 'bfloat16' or 'float32'.
    blocks: (q, kv, q part, kv part) of our kernels, or () for their defaults;
    (q,
      kv, kv part, fused: 0 or 1) of splash.
    backward: Variant of our backward pass.
    features: One of `FEATURES`.
  """

  maker: str
  target: str
  direction: str
  length: int
  head_dim: int
  dtype: str
  blocks: tuple[int, ...]
  backward: str = "fused"
  features: str = "full"

  @property
  def chip(self) -> Chip:
    """The TPU generation."""
    return CHIPS[self.target]

  @property
  def program(self) -> "Program":
    """The program to compile."""
    return PROGRAMS[self.maker]


@dataclasses.dataclass(frozen=True)
class Step:
  """The work of one grid step of a kernel.

  Attributes:
    name: Substring of the kernel's name.
    matmuls: For each matmul what pads its head dim: EXACT, LANES or WIDTH.
      Determined from schedules at D = 64 on v5p and v6e, where they differ.
    elements: Elements that the report counts by (for attention: scores), each
      `depth` multiply-adds of every matmul.
    depth: The head dim.
    bytes: Bytes read from and written to HBM, in a long sequence of steps.
    trips: How often each loop inside the step runs, in program order.
  """

  name: str
  matmuls: tuple[str, ...]
  elements: int
  depth: int
  bytes: int
  trips: tuple[int, ...] = ()

  def units(self, mxu: int) -> float:
    """Returns the work of the matmuls with padding, in units of one matmul.

    Args:
      mxu: Rows and columns of a matrix unit.
    """
    sizes = {EXACT: 1, LANES: LANE_COUNT, WIDTH: mxu}
    return sum(max(1.0, sizes[what] / self.depth) for what in self.matmuls)


@dataclasses.dataclass(frozen=True)
class Program:
  """A kernel that can be compiled for a chip that is not attached.

  Attributes:
    call: Maps a job to the function to compile and its arguments' shapes, a
      tree of `jax.ShapeDtypeStruct`. Only the function is traced under the
      chip's mesh.
    steps: Maps a job to the grid steps of each of its kernels.
    credited: Matmuls per element that count as work, by direction.
  """

  call: Callable[[Job], tuple[Callable[..., Any], Any]]
  steps: Callable[[Job], tuple[Step, ...]]
  credited: dict[str, int]


# Attention is credited with 2 matmuls forward and 5 backward, however it is
# implemented (kernels_pallas/MATH.md 5.1).
ATTENTION = {"forward": 2, "backward": 5}


def flash_attention(job: Job) -> tuple[Callable[..., Any], Any]:
  """Our attention: one head, with the job's features."""
  import jax
  import jax.numpy as jnp

  from kernels_pallas.flash_attention import api
  from kernels_pallas.flash_attention.tpu import tile_sizes

  config = None
  if job.blocks:
    tile = tile_sizes.Tile(*job.blocks)
    names = ("forward",) if job.direction == "forward" else ("dkv", "dq")
    config = dataclasses.replace(
      tile_sizes.for_device(job.chip.kind, job.head_dim, job.dtype),
      **dict.fromkeys(names, tile),
      backward=job.backward,
    )
  x = dict.fromkeys(
    "qkv",
    jax.ShapeDtypeStruct(
      (1, job.length, 1, job.head_dim), jnp.dtype(job.dtype)
    ),
  )
  data, options = {}, {"causal": job.features != "full"}
  if job.features == "everything":
    x["bias"] = jax.ShapeDtypeStruct(
      (1, 1, job.length, job.length), jnp.float32
    )
    x["sinks"] = jax.ShapeDtypeStruct((1,), jnp.float32)
    data["segment_ids"] = jax.ShapeDtypeStruct((1, job.length), jnp.int32)
    options |= {
      "window": (job.length // 2, None), "softcap": 30.0,
      "dropout_rate": 0.1, "dropout_seed": 0,
    }  # fmt: skip

  def run(x, data):
    return api.flash_attention(
      **x, **data, **options, backend="mosaic_tpu", config=config
    )

  return _directed(job, run), (x, data)


def flash_attention_steps(job: Job) -> tuple[Step, ...]:
  """Returns the grid steps of our kernels at the job's blocks."""
  q, kv, *_ = job.blocks
  H, size = job.head_dim, _size(job.dtype)
  tile = {"elements": q * kv, "depth": H}
  over_keys = 2 * q * H * size + 2 * 4 * q  # q, do, and two rows
  if job.direction == "forward":
    return (
      Step(
        "flash_attention_forward",
        (LANES, EXACT),
        bytes=2 * kv * H * size,
        **tile,
      ),
    )
  if job.backward == "fused":
    return (
      Step(
        "flash_attention_fused",
        (*4 * (LANES,), EXACT),
        bytes=over_keys + 4 * q * H,
        **tile,
      ),
    )
  return (
    Step("flash_attention_dkv", 4 * (LANES,), bytes=over_keys, **tile),
    Step(
      "flash_attention_dq",
      (LANES, LANES, EXACT),
      bytes=2 * kv * H * size,
      **tile,
    ),
  )


def splash(job: Job) -> tuple[Callable[..., Any], Any]:
  """JAX's splash attention, forward and backward, full mask."""
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  q, kv, part, fused = job.blocks
  sizes = kernel.BlockSizes(
    block_q=q, block_kv=kv, block_kv_compute=part,
    block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=part,
    block_q_dq=None if fused else q, block_kv_dq=None if fused else kv,
    use_fused_bwd_kernel=bool(fused),
  )  # fmt: skip
  full = masks.MultiHeadMask([masks.FullMask((job.length, job.length))])
  run = kernel.make_splash_mha(
    full, block_sizes=sizes, head_shards=1, q_seq_shards=1
  )
  return _heads_first(job, run)


def tokamax(job: Job) -> tuple[Callable[..., Any], Any]:
  """Tokamax's splash attention, whose backward pass is always fused."""
  from tokamax._src.ops.experimental.tpu.splash_attention import (
    splash_attention_kernel as kernel,
  )
  from tokamax._src.ops.experimental.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  q, kv, part, _ = job.blocks
  sizes = kernel.SplashConfig(
    block_q=q, block_kv=kv, block_kv_compute=part,
    block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=part,
  )  # fmt: skip
  run = kernel.make_splash_mha(
    masks.FullMask((job.length, job.length)), config=sizes, q_seq_shards=1
  )
  return _heads_first(job, run)


def splash_steps(job: Job) -> tuple[Step, ...]:
  """Returns the grid steps of JAX's and Tokamax's splash attention."""
  q, kv, _, fused = job.blocks
  H, size = job.head_dim, _size(job.dtype)
  tile = {"elements": q * kv, "depth": H}
  if job.direction == "forward":
    return (
      Step("splash_mha_fwd", (LANES, WIDTH), bytes=2 * kv * H * size, **tile),
    )
  over_keys = 2 * q * H * size + 2 * 4 * q
  if fused:
    return (
      Step(
        "splash_mha_dkv",
        (LANES, LANES, *3 * (WIDTH,)),
        bytes=over_keys + q * H * size,
        **tile,
      ),
    )
  return (
    Step(
      "splash_mha_dkv", (LANES, LANES, WIDTH, WIDTH), bytes=over_keys, **tile
    ),
    Step(
      "splash_mha_dq", (LANES, LANES, WIDTH), bytes=2 * kv * H * size, **tile
    ),
  )


def _heads_first(job: Job, run) -> tuple[Callable[..., Any], Any]:
  """Adapts `run` of q, k, v [N, T, H] to a job's function and shapes."""
  import jax
  import jax.numpy as jnp

  x = jax.ShapeDtypeStruct((1, job.length, job.head_dim), jnp.dtype(job.dtype))
  function = _directed(job, lambda x, data: run(**x, **data))
  return function, (dict.fromkeys("qkv", x), {})


def _directed(job: Job, run):
  """Returns `run` of (differentiated, other) arguments, or its gradient."""
  import jax

  def backward(x, data):
    return jax.vjp(lambda x: run(x, data), x)[1](x["q"])

  return run if job.direction == "forward" else backward


def _size(dtype: str) -> int:
  return {"bfloat16": 2, "float32": 4}[dtype]


PROGRAMS = {
  "flash_attention": Program(
    flash_attention,
    flash_attention_steps,
    ATTENTION,
  ),
  "splash": Program(splash, splash_steps, ATTENTION),
  "tokamax": Program(tokamax, splash_steps, ATTENTION),
}
"""Programs by name; add an entry to inspect another kernel."""
