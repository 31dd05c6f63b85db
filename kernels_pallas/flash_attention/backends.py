"""What `backend=` names, and which of them 'auto' is on which platform."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import lowering, mask_blocks
from kernels_pallas.by_platform import by_platform
from kernels_pallas.flash_attention import (
  blocking,
  cpu,
  mosaic_gpu,
  mosaic_tpu,
)
from kernels_pallas.flash_attention.blocked import (
  blocked_attention,
  blocked_gradients,
)
from kernels_pallas.flash_attention.cotangents import finished, kept, queries
from kernels_pallas.flash_attention.cpu import CpuTiles
from kernels_pallas.flash_attention.mosaic_gpu_tiling import (
  ROWS,
  GpuTiles,
  for_head_dim,
)
from kernels_pallas.flash_attention.reference import reference_attention
from kernels_pallas.flash_attention.spec import Backend, Blocks, Operands, Spec
from kernels_pallas.flash_attention.tiling import LANES, Tiles, for_device

BACKENDS = (
  "auto",
  "reference",
  "xla_blockwise",
  "cpu",
  "mosaic_tpu",
  "mosaic_gpu",
)
KERNELS = {"tpu": "mosaic_tpu", "cuda": "mosaic_gpu", "cpu": "cpu"}
"""By platform, as lowering calls it."""

Sizes = Blocks | CpuTiles | Tiles | GpuTiles
SIZES = (Blocks, CpuTiles, Tiles, GpuTiles)
"""Types of a call's `config`, one of which each backend takes."""

GPUS = ("gpu", "cuda")
WIDEST = 256
"""Head dim above which GPU tiles outgrow registers and shared memory."""


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
  return blocking.fitted(x)


def choose(
  q: Float[Array, "B T N H"],
  config: Sizes | None = None,
  bias: Float[Array, "..."] | None = None,
  precision: Any = None,
) -> tuple[str, str]:
  """What backend 'auto' stands for here, whatever the mask, and why.

  The platform is that of the mesh that is set, which may be a topology to
  compile for, else that of the default device; a call without a mesh goes by
  what it is lowered for (`automatic`).

  Args:
    q: Queries; keys and values are taken to be of their dtype and dim.
    config: Tile sizes, if the caller gave any.
    bias: Added to the logits, if any.
    precision: Of the matmuls.
  """
  x = Operands(q, q, q, None, bias)
  spec = Spec(scale=1.0, precision=precision)
  return choice(x, lowering.device(), config, spec)


def choice(
  x: Operands, device: tuple[str, str], config: Any, spec: Spec
) -> tuple[str, str]:
  """What backend 'auto' stands for on a device, and why.

  Args:
    x: Arrays of the call.
    device: Platform and kind.
    config: Tile sizes, if the caller gave any.
    spec: Static part; its blocks are not looked at.
  """
  platform, kind = device
  if isinstance(config, Blocks):
    return "xla_blockwise", "config is a Blocks"
  if platform in (*GPUS, *KERNELS) and (reason := _refused_by_all(x)):
    return "xla_blockwise", reason
  if platform in GPUS:
    reason = _refused_by_gpu(x, kind, spec.precision)
    return _either("mosaic_gpu", reason, f"the program is for {kind}")
  if platform == "tpu":
    reason = _refused_by_tpu(x)
    return _either("mosaic_tpu", reason, "the program is for a TPU")
  if platform == "cpu":
    return _either("cpu", _refused_by_cpu(x, spec), "the program is for a CPU")
  return "xla_blockwise", f"there is no kernel for platform {platform} yet"


def _either(kernel, refusal, why):
  return (kernel, why) if refusal is None else ("xla_blockwise", refusal)


def _refused_by_all(x) -> str | None:
  if x.mask is None or x.mask.kind != "function":
    return None
  found = mask_blocks.rows(x.mask, x.q.shape[1], x.k.shape[1])
  return None if found.unlisted is None else mask_blocks.TOO_MANY


def _refused_by_gpu(x, kind, precision) -> str | None:
  if mosaic_gpu.cores(kind) is None:
    return f"there is no kernel for {kind}, but for Ampere, Ada and Hopper"
  reason = mosaic_gpu.unsupported(x.q, x.k, x.v, x.bias, precision)
  if reason is not None:
    return reason
  wide = max(x.q.shape[-1], x.v.shape[-1])
  if wide > WIDEST:
    return f"GPU kernels hold head dims of at most {WIDEST}, found {wide}"
  if x.q.shape[1] < ROWS:
    return f"a GPU kernel would pad T to {ROWS} queries"
  return None


def _refused_by_tpu(x) -> str | None:
  for y in (x.q, x.k, x.v):
    if y.dtype not in (jnp.bfloat16, jnp.float32):
      return f"TPU kernels do not compute in {y.dtype}"
  if x.q.shape[1] < LANES:
    why = f"a TPU kernel would pad T to {LANES} queries"
    return f"{why}; decode_attention's would not"
  return None


def _refused_by_cpu(x, spec) -> str | None:
  if x.q.shape[1] < cpu.FEWEST:
    return f"a CPU kernel would pad T to {cpu.FEWEST} queries"
  if reason := cpu.unsupported(spec, x):
    return reason
  if lowering.is_cut():
    return "XLA would gather what a mesh cuts; a shard_map would not"
  return None if cpu.available() else "no C++ kernel can be compiled here"


@dataclasses.dataclass(frozen=True)
class Platforms:
  """Tile sizes where the platform is not known before lowering.

  Attributes:
    default: Of xla_blockwise, for every platform that has no other.
    kernels: (platform, tiles) where 'auto' takes the platform's kernel.
    reasons: (platform, why) of all of `KERNELS`.
  """

  default: Blocks
  kernels: tuple[tuple[str, CpuTiles | Tiles | GpuTiles], ...]
  reasons: tuple[tuple[str, str], ...]

  def say(self, platform: str) -> None:
    """Logs what is taken on `platform`, once for each reason."""
    why = dict(self.reasons).get(platform, "it has no kernel yet")
    taken = KERNELS[platform] if platform in dict(self.kernels) else None
    lowering.say("attention", platform, taken or "xla_blockwise", why)


def automatic(
  x: Operands, config: Any, spec: Spec
) -> tuple[Backend, Sizes | Platforms]:
  """What 'auto' runs, and its tile sizes.

  Under a mesh, which knows its devices, that is a backend. Without one it is
  decided when the call is lowered, by the platform that it is lowered for.

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

  known = lowering.target()
  if known is not None:
    name, why = choice(x, known, config, spec)
    lowering.say("attention", known[0], name, why)
    run = named(name)
    return run, sizes(run.config, known[1])
  kernels, reasons = [], []
  for platform, kernel in KERNELS.items():
    kind = lowering.kind_of(platform)
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

  def on_cpu(spec, x):
    return cpu.cpu_attention.__wrapped__(spec, x)

  kernels = {"tpu": on_tpu, "cuda": on_gpu, "cpu": on_cpu}
  # Not its custom_vjp: it may be differentiated forwards, of a gradient.
  return _run(spec, blocked_attention.__wrapped__, kernels, x)


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

  kernels = {"tpu": on_tpu, "cuda": on_gpu, "cpu": cpu.cpu_gradients}
  kernels = {name: whole(run) for name, run in kernels.items()}
  return (_run(spec, whole(blocked_gradients), kernels, x, rows),)


def _gradients(spec: Spec, x: Operands, rows: Any) -> Operands:
  """Of a part of the keys, in the accumulator dtype."""
  kernels = {
    platform: named(name).gradients for platform, name in KERNELS.items()
  }
  return _run(spec, blocked_gradients, kernels, x, rows)


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
