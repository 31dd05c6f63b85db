"""Flash attention in C++ (`attention.cc`): the cpu backend, in float32.

Compiled at first use and called by XLA, once for the forward and once for the
backward pass; a tile's scores never leave the L1 and L2 caches. The saved
output and log-sum-exp have the same checkpoint names as in `blockwise`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels_pallas.common import cpu_library, target_platform
from kernels_pallas.common.cpu_library import Library
from kernels_pallas.flash_attention import tiles
from kernels_pallas.flash_attention.cotangents import (
  QueryCotangents,
  cast_gradients,
  query_cotangents,
  save_residuals,
)
from kernels_pallas.flash_attention.spec import Operands, Spec
from kernels_pallas.masks import intervals

TARGET, GRADIENTS = "heptad_attention", "heptad_attention_gradients"
"""FFI target names by which compiled programs call the library."""

LIBRARY = Library(
  name="attention",
  source=pathlib.Path(__file__).with_name("attention.cc"),
  includes=(
    "problem.h",
    "mask.h",
    "lanes.h",
    "tile.inc",
    "forward.inc",
    "backward.inc",
    "../../common/cpu_isa.h",
    "../../common/cpu_tasks.h",
    "../../common/cpu_vector.inc",
  ),
  targets=(
    (TARGET, "HeptadAttention"),
    (GRADIENTS, "HeptadAttentionGradients"),
  ),
  warning="attention: {error}; XLA attends, by tiles that go through memory.",
)

ISAS = ("auto", "avx512", "avx2", "portable")
FULL = (None, *jax.lax.Precision, "default", "high", "highest")
"""Precisions that float32 arithmetic satisfies."""

FEWEST = 32
"""Queries per tile of AVX-512: fewer would leave lanes empty."""


DTYPES = "float32", "bfloat16", "float16"
"""Dtypes of q, k, v and sinks. The library computes in float32: widening 16-bit
inputs costs less than XLA's 16-bit products lose (1.3 times in the forward
pass, up to 1.5 in both)."""


@dataclasses.dataclass(frozen=True)
class CpuTiles:
  """How a call is split into tasks, and their instruction set.

  Tile sizes are fixed in the source. The backward pass splits the keys into
  chunks, each with its own array for the gradients of all queries.

  Attributes:
    chunk: Minimum number of keys per chunk.
    tasks: Number of tasks of the backward pass, if there are enough keys: at
      most this many arrays of the size of q.
    isa: One of `ISAS`; "auto" is the best that the running CPU supports.
  """

  chunk: int = 384
  tasks: int = 4
  isa: str = "auto"

  def __post_init__(self):
    if self.chunk < 1 or self.tasks < 1 or self.isa not in ISAS:
      raise ValueError(
        f"config: found {self}, expected chunk and tasks of at least 1, and "
        f"an isa of {', '.join(ISAS)}"
      )

  def chunks(self, rows: int, keys: int) -> int:
    """Returns the number of chunks for `rows` key heads of `keys` keys."""
    most = min(-(-self.tasks // rows), max(keys // self.chunk, 1))
    # Recomputed from the chunk size, so that none is empty.
    return -(-keys // -(-keys // most))


def unsupported(spec: Spec, x: Operands) -> str | None:
  """Returns why the kernel cannot run a call, with the argument, or None."""
  arrays = [y for y in (x.q, x.k, x.v, x.sinks) if y is not None]
  if wrong := [y.dtype.name for y in arrays if y.dtype.name not in DTYPES]:
    return f"dtype: found {wrong[0]}, expected {', '.join(DTYPES)}"
  if x.bias is not None:
    return "bias: found one, expected None"
  if spec.softcap is not None or spec.dropout_rate:
    return "softcap, dropout_rate: found one, expected neither"
  if spec.precision not in FULL:
    return f"precision: found {spec.precision!r}, expected one of {FULL}"
  return None


def available() -> bool:
  """Whether the library can be used; compiles it once, warns once if not."""
  return cpu_library.available(LIBRARY)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def cpu_attention(
  spec: Spec, x: Operands
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
  """Softmax attention on a CPU, with a custom gradient.

  kernels_pallas/MATH.md 1 and 3 have the definition and the gradients.
  Differentiable once in q, k, v and sinks, through both results.

  Args:
    spec: Static part; `spec.blocks` is a `CpuTiles`.
    x: Arrays.

  Returns:
    The output and the natural log-sum-exp of the logits, sinks included; 0 and
    -inf where a query sees no key and there is no sink.

  Raises:
    ValueError: The kernel does not support the call.
  """
  _check(spec, x)
  none = np.zeros((0,), np.float32)
  sinks = none if x.sinks is None else _wide(x.sinks)[None]

  def attend(q, k, v, *more):
    (B, T, N, _), Hv = q.shape, v.shape[-1]
    shapes = (B, T, N, Hv), (B, N, T)
    return _call(TARGET, spec, shapes, q, k, v, *more)

  given = map(_wide, (x.q, x.k, x.v))
  o, lse = _over_rows(attend)(*given, *_seen(x), sinks)
  return o.astype(spec.output or x.q.dtype), lse


def cpu_gradients(spec: Spec, x: Operands, rows: QueryCotangents) -> Operands:
  """Returns the gradients of q, k and v in float32.

  Args:
    spec: Static part; `spec.blocks` is a `CpuTiles`.
    x: Arrays; sinks are ignored.
    rows: Per-query inputs, computed over these keys and possibly others.
  """
  _check(spec, x)

  def differentiate(q, k, v, *more):
    chunks = spec.blocks.chunks(k.shape[0] * k.shape[2], k.shape[1])
    shapes = (chunks, *q.shape), k.shape, v.shape
    parts, dk, dv = _call(GRADIENTS, spec, shapes, q, k, v, *more)
    return (parts[0] if chunks == 1 else parts.sum(0)), dk, dv

  # With a sink, padding's log-sum-exp does not say that it sees no key.
  q = tiles.zero_padding(x.q, x.mask.valid_queries())
  given = map(_wide, (q, x.k, x.v))
  dq, dk, dv = _over_rows(differentiate)(
    *given, *_seen(x), _wide(rows.do), rows.lse, rows.shift
  )
  return Operands(q=dq, k=dk, v=dv, mask=None)


def _forward(spec, x):
  return save_residuals(x, *cpu_attention.__wrapped__(spec, x))


def _backward(spec, saved, cotangents):
  x, o, lse = saved
  rows = query_cotangents(x, o, lse, *cotangents)
  return (cast_gradients(x, cpu_gradients(spec, x, rows), rows),)


cpu_attention.defvjp(_forward, _backward)


def _wide(x: Array) -> Array:
  return x.astype(jnp.float32)


def _check(spec: Spec, x: Operands) -> None:
  if reason := unsupported(spec, x):
    raise ValueError(
      f"{reason}; the cpu backend has none of it, xla_blockwise has"
    )
  if not available():
    raise ValueError("backend: cpu needs a C++ compiler, xla_blockwise none")


def _seen(x: Operands) -> tuple[Any, ...]:
  """Returns the mask as the library's int32 arrays.

  Bounds [B or 1, intervals, 2, T], keys' coordinates [B or 1, S] and both
  segments, [B or 1, T] and [B or 1, S]; absent ones are empty.
  """
  T, S = x.q.shape[1], x.k.shape[1]
  found = intervals.mask_intervals(x.mask, T, S)
  found.check_exact()
  bounds = found.bounds.reshape(-1, found.bounds.shape[1] // 2, 2, T)
  none = np.zeros((0,), np.int32)
  ours, theirs = found.segments or (none, none)
  keys = none if found.keys is None else found.keys
  return bounds, keys, ours, theirs


def _over_rows(run: Callable[..., Any]) -> Callable[..., Any]:
  """Wraps `run` so that `vmap` makes one call with more rows, not one per row.

  Args:
    run: Function of arrays whose first axis is the batch rows, or 1, or which
      are empty; the first array has all rows, and so do the results.
  """
  call = jax.custom_batching.custom_vmap(run)

  @call.def_vmap
  def rule(size, batched, *arrays):
    B = arrays[0].shape[1 if batched[0] else 0]

    def fold(x, batched):
      shape = x.shape[1:] if batched else x.shape
      if shape == (0,):
        return jnp.zeros(shape, x.dtype)
      # Mask arrays may have one row for all; q and its companions may not.
      if not batched and (x.shape[0] != B or x.dtype == jnp.int32):
        return (
          x if x.shape[0] == 1 else jnp.tile(x, (size, *[1] * (x.ndim - 1)))
        )
      x = x if batched else jnp.broadcast_to(x, (size, *x.shape))
      x = jnp.broadcast_to(x, (size, B, *x.shape[2:]))
      return x.reshape(size * B, *x.shape[2:])

    found = _over_rows(run)(*map(fold, arrays, batched))
    unfolded = [x.reshape(size, B, *x.shape[1:]) for x in found]
    return tuple(unfolded), (True,) * len(unfolded)

  return call


def _call(target: str, spec: Spec, shapes: Any, *arrays: Any) -> Any:
  """Returns the library's results, float32 arrays of these shapes."""
  arrays, results = target_platform.match_varying_axes(arrays, shapes)
  return jax.ffi.ffi_call(target, tuple(results))(
    *arrays, scale=np.float32(spec.scale), isa=spec.blocks.isa
  )
