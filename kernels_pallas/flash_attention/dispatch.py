"""Backend selection: `backend=` names, what 'auto' resolves to, and why.

Each device's kernel has unsupported cases; the reason is returned as text. A
kernel is imported when a program for its device is traced.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.common import target_platform
from kernels_pallas.common.by_platform import by_platform
from kernels_pallas.flash_attention import cpu, gpu, tpu
from kernels_pallas.flash_attention.cotangents import (
  cast_gradients,
  query_cotangents,
  save_residuals,
)
from kernels_pallas.flash_attention.cpu import CpuTiles
from kernels_pallas.flash_attention.gpu.tile_sizes import (
  GpuTiles,
  for_head_dim,
  height,
)
from kernels_pallas.flash_attention.reference import reference_attention
from kernels_pallas.flash_attention.spec import Backend, Blocks, Operands, Spec
from kernels_pallas.flash_attention.tpu.tile_sizes import (
  LANES,
  Tiles,
  for_device,
)
from kernels_pallas.flash_attention.xla import tile_sizes
from kernels_pallas.flash_attention.xla.blockwise import (
  blockwise_attention,
  blockwise_gradients,
)
from kernels_pallas.masks import intervals

BACKENDS = (
  "auto",
  "reference",
  "xla_blockwise",
  "cpu",
  "mosaic_tpu",
  "mosaic_gpu",
)

KERNELS = {"tpu": "mosaic_tpu", "cuda": "mosaic_gpu", "cpu": "cpu"}
"""Kernel backends by platform, as named in lowering."""

TileSizes = Blocks | CpuTiles | Tiles | GpuTiles
TILE_SIZE_TYPES = typing.get_args(TileSizes)
"""Types of `config`; each backend takes one of them."""

GPUS = ("gpu", "cuda")
MAX_GPU_HEAD_DIM = 256
"""Head dim above which GPU tiles outgrow registers and shared memory."""


def choose(
  q: Float[Array, "B T N H"],
  config: TileSizes | None = None,
  bias: Float[Array, "..."] | None = None,
  precision: Any = None,
) -> tuple[str, str]:
  """Returns the backend that 'auto' takes here, and the reason, for any mask.

  Assumes no soft cap, dropout or sinks, which a kernel may not support. The
  platform is that of the current mesh, which may be a topology to compile for,
  else that of the default device; a call without a mesh is resolved when it is
  lowered (`resolve_auto`).

  Args:
    q: Queries; keys and values are assumed to have their dtype and head dim.
    config: Tile sizes, if the caller gives any.
    bias: Added to the logits, if any.
    precision: Precision of the matmuls.
  """
  x = Operands(q, q, q, None, bias)
  spec = Spec(scale=1.0, precision=precision)
  return without_compiler(
    *choose_for_device(x, target_platform.program_device(), config, spec)
  )


def without_compiler(name: str, why: str) -> tuple[str, str]:
  """Replaces the C++ kernel by xla_blockwise if no compiler is found."""
  if name == "cpu" and not cpu.available():
    return "xla_blockwise", "no C++ kernel can be compiled here"
  return name, why


def choose_for_device(
  x: Operands, device: tuple[str, str], config: Any, spec: Spec
) -> tuple[str, str]:
  """Returns the backend that 'auto' takes on a device, and the reason.

  Args:
    x: Arrays of the call.
    device: (platform, kind).
    config: Tile sizes, if the caller gives any.
    spec: Static part; its `blocks` are ignored.
  """
  platform, kind = device
  if isinstance(config, Blocks):
    return "xla_blockwise", "config is a Blocks"
  if platform in (*GPUS, *KERNELS) and (reason := _unsupported_by_all(x)):
    return "xla_blockwise", reason
  if platform in GPUS:
    reason = _unsupported_by_gpu(x, kind, spec.precision)
    return _either("mosaic_gpu", reason, f"the program is for {kind}")
  if platform == "tpu":
    reason = _unsupported_by_tpu(x)
    return _either("mosaic_tpu", reason, "the program is for a TPU")
  if platform == "cpu":
    return _either(
      "cpu", _unsupported_by_cpu(x, spec), "the program is for a CPU"
    )
  return "xla_blockwise", f"there is no kernel for platform {platform} yet"


def _either(kernel, refusal, why):
  return (kernel, why) if refusal is None else ("xla_blockwise", refusal)


def _unsupported_by_all(x) -> str | None:
  if x.mask is None or x.mask.kind != "function":
    return None
  found = intervals.mask_intervals(x.mask, x.q.shape[1], x.k.shape[1])
  return None if found.inexact_mask is None else intervals.TOO_MANY_INTERVALS


def _unsupported_by_gpu(x, kind, precision) -> str | None:
  cores = gpu.cores(kind)
  if cores is None:
    return gpu.no_kernel_reason(kind)
  reason = gpu.unsupported(x.q, x.k, x.v, x.bias, precision)
  if reason is not None:
    return reason
  wide = max(x.q.shape[-1], x.v.shape[-1])
  if wide > MAX_GPU_HEAD_DIM:
    return (
      f"GPU kernels support head dims up to {MAX_GPU_HEAD_DIM}, found {wide}"
    )
  rows = height(cores)
  if x.q.shape[1] < rows:
    return f"a GPU kernel would pad T to {rows} queries"
  return None


def _unsupported_by_tpu(x) -> str | None:
  for y in (x.q, x.k, x.v):
    if y.dtype not in (jnp.bfloat16, jnp.float32):
      return f"TPU kernels do not support {y.dtype}"
  if x.q.shape[1] < LANES:
    why = f"a TPU kernel would pad T to {LANES} queries"
    return f"{why}; decode_attention's would not"
  return None


def _unsupported_by_cpu(x, spec) -> str | None:
  if x.q.shape[1] < cpu.FEWEST:
    return f"the CPU kernel needs at least {cpu.FEWEST} queries"
  if reason := cpu.unsupported(spec, x):
    return reason
  if target_platform.may_be_sharded():
    return "XLA would gather what a mesh cuts; a shard_map would not"
  return None


def get_backend(name: str, interpret: Any = None) -> Backend:
  """Returns a backend by name, other than 'auto'.

  Args:
    name: One of `BACKENDS`.
    interpret: As in `flash_attention`.

  Raises:
    ValueError: The name is unknown, or the backend has no interpreter.
  """
  if name not in BACKENDS:
    raise ValueError(
      f"backend: found {name!r}, available here: {', '.join(BACKENDS)}"
    )
  if name == "mosaic_tpu":
    return Backend(
      functools.partial(_mosaic_tpu, interpret or False),
      functools.partial(_mosaic_tpu_gradients, interpret or False),
      Tiles,
    )
  if name == "mosaic_gpu":
    return Backend(
      functools.partial(_mosaic_gpu, interpret or False),
      functools.partial(_mosaic_gpu_gradients, interpret or False),
      GpuTiles,
    )
  if interpret is not None:
    raise ValueError(
      f"interpret: found {interpret!r}, {name} has no use for it"
    )
  if name == "reference":
    return Backend(reference_attention, None, Blocks)
  if name == "cpu":
    return Backend(cpu.cpu_attention, cpu.cpu_gradients, CpuTiles)
  return Backend(blockwise_attention, blockwise_gradients, Blocks)


def default_tile_sizes(x: Operands, config: type, kind: str) -> TileSizes:
  """Returns the default tile sizes of a call.

  Args:
    x: Arrays of the call.
    config: The backend's type of tile sizes.
    kind: Device kind, as JAX calls it.
  """
  H, Hv = x.q.shape[-1], x.v.shape[-1]
  if config is CpuTiles:
    return CpuTiles()
  if config is Tiles:
    return for_device(kind, max(H, Hv), x.q.dtype.name, x.bias is not None)
  if config is GpuTiles:
    cores = gpu.cores(kind) or "wgmma"
    return for_head_dim(H, Hv, cores, gpu.num_multiprocessors(kind))
  return tile_sizes.default_blocks(x)


@dataclasses.dataclass(frozen=True)
class TilesByPlatform:
  """Tile sizes by platform, for a call whose platform is not known yet.

  Attributes:
    default: Sizes for xla_blockwise, on platforms without a kernel.
    kernels: (platform, tile sizes) where 'auto' takes the platform's kernel.
    reasons: (platform, reason) for each platform considered.
  """

  default: Blocks
  kernels: tuple[tuple[str, CpuTiles | Tiles | GpuTiles], ...]
  reasons: tuple[tuple[str, str], ...]

  def log(self, platform: str) -> None:
    """Logs which backend runs on `platform`, once for each reason."""
    why = dict(self.reasons).get(platform, "it has no kernel yet")
    has = platform in dict(self.kernels)
    name = KERNELS[platform] if has else "xla_blockwise"
    target_platform.log_choice(
      "attention", platform, *without_compiler(name, why)
    )


def resolve_auto(
  x: Operands, config: Any, spec: Spec
) -> tuple[Backend, TileSizes | TilesByPlatform]:
  """Returns the backend that 'auto' runs, and its tile sizes.

  Under a mesh of accelerators the platform is known, and so is the backend.
  Otherwise the backend is chosen when the call is lowered.

  Args:
    x: Arrays of the call.
    config: Tile sizes, if the caller gives any; ignored by other backends.
    spec: Static part; its `blocks` are ignored.

  Raises:
    ValueError: No backend takes this type of config.
  """
  if not isinstance(config, (*TILE_SIZE_TYPES, type(None))):
    raise ValueError(
      f"config: found {config!r}, expected None or one of "
      f"{', '.join(size.__name__ for size in TILE_SIZE_TYPES)} for auto"
    )

  def sizes(run, kind):
    return (
      config if isinstance(config, run) else default_tile_sizes(x, run, kind)
    )

  known = target_platform.mesh_device()
  if known is not None and known[0] != "cpu":
    name, why = choose_for_device(x, known, config, spec)
    target_platform.log_choice("attention", known[0], name, why)
    run = get_backend(name)
    return run, sizes(run.config, known[1])
  # A mesh of CPUs is resolved late too: the compiler is looked for at lowering,
  # and forward-mode derivatives, which C++ lacks, come from xla_blockwise.
  kernels, reasons = [], []
  for platform, kernel in KERNELS.items():
    if known is not None and platform != known[0]:
      continue
    kind = target_platform.device_kind(platform)
    name, why = choose_for_device(x, (platform, kind), config, spec)
    reasons.append((platform, why))
    if name == kernel:
      kernels.append((platform, sizes(get_backend(name).config, kind)))
  plain = TilesByPlatform(sizes(Blocks, ""), tuple(kernels), tuple(reasons))
  return Backend(_attention, _gradients, TilesByPlatform), plain


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
  spec: Spec, x: Operands
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
  """Attention resolved at lowering; `spec.blocks` are `TilesByPlatform`."""
  dtype = spec.output or x.q.dtype

  def on_tpu(spec, x):
    o, lse = tpu.mosaic_tpu_attention(spec, False, x)
    return o.astype(dtype), lse

  def on_gpu(spec, x):
    return gpu.mosaic_gpu_attention(spec, False, x)

  # Without its custom_vjp: a gradient may be differentiated in forward mode.
  plain = blockwise_attention.__wrapped__
  on_cpu = _compiled(spec, cpu.cpu_attention.__wrapped__, plain)
  kernels = {"tpu": on_tpu, "cuda": on_gpu, "cpu": on_cpu}
  return _run(spec, plain, kernels, x)


def _forward(spec, x):
  return save_residuals(x, *_attention.__wrapped__(spec, x))


def _backward(spec, saved, cotangents):
  x, o, lse = saved
  rows = query_cotangents(x, o, lse, *cotangents)

  def whole(gradients):
    return lambda spec, x, rows: cast_gradients(
      x, gradients(spec, x, rows), rows
    )

  def on_tpu(spec, x, rows):
    return tpu.mosaic_tpu_gradients(spec, False, x, rows)

  def on_gpu(spec, x, rows):
    return gpu.rounded_gradients(spec, False, x, rows)

  on_cpu = _compiled(spec, cpu.cpu_gradients, blockwise_gradients)
  kernels = {"tpu": on_tpu, "cuda": on_gpu, "cpu": on_cpu}
  kernels = {name: whole(run) for name, run in kernels.items()}
  return (_run(spec, whole(blockwise_gradients), kernels, x, rows),)


def _gradients(spec: Spec, x: Operands, rows: Any) -> Operands:
  """Gradients for a subset of the keys, in the accumulator dtype."""
  kernels = {
    platform: get_backend(name).gradients for platform, name in KERNELS.items()
  }
  kernels["cpu"] = _compiled(spec, cpu.cpu_gradients, blockwise_gradients)
  return _run(spec, blockwise_gradients, kernels, x, rows)


def _compiled(spec: Spec, kernel: Callable, plain: Callable) -> Callable:
  """Returns the C++ kernel, or `plain` if no compiler is found at lowering."""
  by_blocks = dataclasses.replace(spec, blocks=spec.blocks.default)

  def run(spec, *xs):
    return kernel(spec, *xs) if cpu.available() else plain(by_blocks, *xs)

  return run


def _run(spec: Spec, plain: Callable, kernels: dict[str, Callable], *xs):
  """Calls the platform's implementation with the platform's tile sizes."""
  sizes: TilesByPlatform = spec.blocks

  def bound(run, blocks):
    return functools.partial(run, dataclasses.replace(spec, blocks=blocks))

  return by_platform(
    bound(plain, sizes.default),
    {name: bound(kernels[name], blocks) for name, blocks in sizes.kernels},
    *xs,
    on_lowering=sizes.log,
  )


_attention.defvjp(_forward, _backward)


def _mosaic_tpu(interpret, spec, x):
  return tpu.mosaic_tpu_attention(spec, interpret, x)


def _mosaic_tpu_gradients(interpret, spec, x, rows):
  return tpu.mosaic_tpu_gradients(spec, interpret, x, rows)


def _mosaic_gpu(interpret, spec, x):
  return gpu.mosaic_gpu_attention(spec, interpret, x)


def _mosaic_gpu_gradients(interpret, spec, x, rows):
  return gpu.mosaic_gpu_gradients(spec, interpret, x, rows)
