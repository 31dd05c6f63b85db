"""What `backend=` names, and which of them 'auto' is on which platform."""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from kernels_pallas.common import target_platform
from kernels_pallas.common.by_platform import by_platform
from kernels_pallas.flash_attention import cpu
from kernels_pallas.flash_attention.cotangents import finished, kept, queries
from kernels_pallas.flash_attention.cpu import CpuTiles
from kernels_pallas.flash_attention.dispatch import (
  KERNELS,
  Sizes,
  choice,
  ready,
)
from kernels_pallas.flash_attention.gpu import mosaic_gpu
from kernels_pallas.flash_attention.gpu.gpu_tile_sizes import (
  GpuTiles,
  for_head_dim,
)
from kernels_pallas.flash_attention.reference import reference_attention
from kernels_pallas.flash_attention.spec import Backend, Blocks, Operands, Spec
from kernels_pallas.flash_attention.tpu import mosaic_tpu
from kernels_pallas.flash_attention.tpu.tpu_tile_sizes import Tiles, for_device
from kernels_pallas.flash_attention.xla import tile_sizes
from kernels_pallas.flash_attention.xla.blockwise import (
  blocked_attention,
  blocked_gradients,
)

BACKENDS = (
  "auto",
  "reference",
  "xla_blockwise",
  "cpu",
  "mosaic_tpu",
  "mosaic_gpu",
)
SIZES = typing.get_args(Sizes)
"""Types of a call's `config`, one of which each backend takes."""


def named(name: str, interpret: Any = None) -> Backend:
  """The backend of that name, which is not 'auto'.

  Args:
    name: One of `BACKENDS`.
    interpret: As of `flash_attention`.

  Raises:
    ValueError: An unknown name; one that has no use for `interpret`.
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
  return Backend(blocked_attention, blocked_gradients, Blocks)


def fitted(x: Operands, config: type, kind: str) -> Sizes:
  """Tile sizes of a call whose config says nothing.

  Args:
    x: Arrays of the call.
    config: Of the backend.
    kind: Of the device, as JAX calls it.
  """
  H, Hv = x.q.shape[-1], x.v.shape[-1]
  if config is CpuTiles:
    return CpuTiles()
  if config is Tiles:
    return for_device(kind, max(H, Hv), x.q.dtype.name, x.bias is not None)
  if config is GpuTiles:
    cores = mosaic_gpu.cores(kind) or "wgmma"
    return for_head_dim(H, Hv, cores, mosaic_gpu.programs(kind))
  return tile_sizes.fitted(x)


@dataclasses.dataclass(frozen=True)
class Platforms:
  """Tile sizes where the platform is not known before lowering.

  Attributes:
    default: Of xla_blockwise, for every platform that has no other.
    kernels: (platform, tiles) where 'auto' takes the platform's kernel.
    reasons: (platform, why) of all of `KERNELS`, or of the mesh's alone.
  """

  default: Blocks
  kernels: tuple[tuple[str, CpuTiles | Tiles | GpuTiles], ...]
  reasons: tuple[tuple[str, str], ...]

  def say(self, platform: str) -> None:
    """Logs what is taken on `platform`, once for each reason."""
    why = dict(self.reasons).get(platform, "it has no kernel yet")
    has = platform in dict(self.kernels)
    name = KERNELS[platform] if has else "xla_blockwise"
    target_platform.say("attention", platform, *ready(name, why))


def automatic(
  x: Operands, config: Any, spec: Spec
) -> tuple[Backend, Sizes | Platforms]:
  """What 'auto' runs, and its tile sizes.

  Under a mesh of accelerators, which it knows, that is a backend. Otherwise it
  is decided when the call is lowered, by the platform that it is lowered for.

  Args:
    x: Arrays of the call.
    config: Tile sizes, if the caller gave any. Another backend's are not used.
    spec: Static part; its blocks are not looked at.

  Raises:
    ValueError: A config that is no backend's.
  """
  if not isinstance(config, (*SIZES, type(None))):
    raise ValueError(
      f"config: found {config!r}, expected None or one of "
      f"{', '.join(size.__name__ for size in SIZES)} for auto"
    )

  def sizes(run, kind):
    return config if isinstance(config, run) else fitted(x, run, kind)

  known = target_platform.target()
  if known is not None and known[0] != "cpu":
    name, why = choice(x, known, config, spec)
    target_platform.say("attention", known[0], name, why)
    run = named(name)
    return run, sizes(run.config, known[1])
  # Under a mesh of CPUs, too: whether there is a compiler is asked when a call
  # is lowered, and tangents, which the C++ kernel has not, are xla_blockwise's.
  kernels, reasons = [], []
  for platform, kernel in KERNELS.items():
    if known is not None and platform != known[0]:
      continue
    kind = target_platform.kind_of(platform)
    name, why = choice(x, (platform, kind), config, spec)
    reasons.append((platform, why))
    if name == kernel:
      kernels.append((platform, sizes(named(name).config, kind)))
  plain = Platforms(sizes(Blocks, ""), tuple(kernels), tuple(reasons))
  return Backend(_attention, _gradients, Platforms), plain


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
  spec: Spec, x: Operands
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
  """As the backends' own, `spec.blocks` being `Platforms`."""
  dtype = spec.output or x.q.dtype

  def on_tpu(spec, x):
    o, lse = mosaic_tpu.mosaic_tpu_attention(spec, False, x)
    return o.astype(dtype), lse

  def on_gpu(spec, x):
    return mosaic_gpu.mosaic_gpu_attention(spec, False, x)

  # Not its custom_vjp: it may be differentiated forwards, of a gradient.
  plain = blocked_attention.__wrapped__
  on_cpu = _compiled(spec, cpu.cpu_attention.__wrapped__, plain)
  kernels = {"tpu": on_tpu, "cuda": on_gpu, "cpu": on_cpu}
  return _run(spec, plain, kernels, x)


def _forward(spec, x):
  return kept(x, *_attention.__wrapped__(spec, x))


def _backward(spec, saved, cotangents):
  x, o, lse = saved
  rows = queries(x, o, lse, *cotangents)

  def whole(gradients):
    return lambda spec, x, rows: finished(x, gradients(spec, x, rows), rows)

  def on_tpu(spec, x, rows):
    return mosaic_tpu.mosaic_tpu_gradients(spec, False, x, rows)

  def on_gpu(spec, x, rows):
    return mosaic_gpu.narrow_gradients(spec, False, x, rows)

  on_cpu = _compiled(spec, cpu.cpu_gradients, blocked_gradients)
  kernels = {"tpu": on_tpu, "cuda": on_gpu, "cpu": on_cpu}
  kernels = {name: whole(run) for name, run in kernels.items()}
  return (_run(spec, whole(blocked_gradients), kernels, x, rows),)


def _gradients(spec: Spec, x: Operands, rows: Any) -> Operands:
  """Of a part of the keys, in the accumulator dtype."""
  kernels = {
    platform: named(name).gradients for platform, name in KERNELS.items()
  }
  kernels["cpu"] = _compiled(spec, cpu.cpu_gradients, blocked_gradients)
  return _run(spec, blocked_gradients, kernels, x, rows)


def _compiled(spec: Spec, kernel: Callable, plain: Callable) -> Callable:
  """The C++ kernel, or `plain` where no compiler turns out to be here."""
  by_blocks = dataclasses.replace(spec, blocks=spec.blocks.default)

  def run(spec, *xs):
    return kernel(spec, *xs) if cpu.available() else plain(by_blocks, *xs)

  return run


def _run(spec: Spec, plain: Callable, kernels: dict[str, Callable], *xs):
  """The call of the platform's function, with the platform's tiles."""
  sizes: Platforms = spec.blocks

  def bound(run, blocks):
    return functools.partial(run, dataclasses.replace(spec, blocks=blocks))

  return by_platform(
    bound(plain, sizes.default),
    {name: bound(kernels[name], blocks) for name, blocks in sizes.kernels},
    *xs,
    note=sizes.say,
  )


_attention.defvjp(_forward, _backward)


def _mosaic_tpu(interpret, spec, x):
  return mosaic_tpu.mosaic_tpu_attention(spec, interpret, x)


def _mosaic_tpu_gradients(interpret, spec, x, rows):
  return mosaic_tpu.mosaic_tpu_gradients(spec, interpret, x, rows)


def _mosaic_gpu(interpret, spec, x):
  return mosaic_gpu.mosaic_gpu_attention(spec, interpret, x)


def _mosaic_gpu_gradients(interpret, spec, x, rows):
  return mosaic_gpu.mosaic_gpu_gradients(spec, interpret, x, rows)
