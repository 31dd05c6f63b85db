"""Checks of attention on a chip: every mask and feature, forward and backward.

The expected result is the definition in float32. 16-bit results may differ by
twice the error of plain attention with 16-bit operands, plus two roundings of
the number (kernels_pallas/MATH.md 8); log-sum-exps and float32 by the error of
hardware exponentials and logarithms, about 2^-21, on logits near 20.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.bench import jobs
from kernels_pallas.bench.jobs import Check, Job, Target
from kernels_pallas.flash_attention.api import flash_attention
from kernels_pallas.flash_attention.gpu.support import (
  cores,
  num_multiprocessors,
)
from kernels_pallas.flash_attention.gpu.tile_sizes import (
  GpuTiles,
  for_head_dim,
)
from kernels_pallas.flash_attention.tpu.tile_sizes import Tile, Tiles
from kernels_pallas.masks import Mask

FEW = 3
"""Blocks of threads of a persistent kernel with many more lines, so that each
takes several and its buffers wrap around."""

FLOAT32 = 5e-5
"""Tolerance of float32 results, relative to 1 and to themselves."""

LONG = 1000
"""Tokens of most checks: several tiles, the last one partial."""


@dataclasses.dataclass(frozen=True)
class Problem:
  """A call to check.

  Attributes:
    mask: Builds the mask of T queries and S keys; None is causal.
    options: Further arguments of `flash_attention`.
    T, S: Number of queries and keys.
    B, N, K, H, Hv: Batch rows, heads of queries and of keys, head dims.
    dtype: Dtype of q, k and v.
    extras: Some of 'bias', 'sinks', 'padding' (filled with NaN).
    tiles: A variant of the kernel's tile sizes, see `tiles`.
    level: Added to one dim of queries and keys, to make logits large.
  """

  mask: Any = None
  options: tuple[tuple[str, Any], ...] = ()
  T: int = LONG
  S: int = LONG
  B: int = 1
  N: int = 2
  K: int = 2
  H: int = 128
  Hv: int = 128
  dtype: str = "bfloat16"
  extras: tuple[str, ...] = ()
  tiles: str = "few"
  level: float = 0.0

  @property
  def flops(self) -> float:
    """FLOPs of the forward pass, ignoring the mask."""
    return 2.0 * self.B * self.N * self.T * self.S * (self.H + self.Hv)


def checks(target: Target) -> list[Job]:
  """Returns two checks per problem: of outputs, and of gradients."""
  found = []
  for name, x in problems(target).items():
    x = _shrunk(x) if target.tiny else x
    for direction, times in (("forward", 1.0), ("backward", 3.5)):
      job = jobs.check(
        target,
        f"attention/{name}/{direction}",
        make_check(target, x, direction),
        times * x.flops,
        smoke=name == "causal",
      )
      found.append(job)
  return found


def problems(target: Target) -> dict[str, Problem]:
  """Returns the problems to check, by name."""
  options = lambda **x: tuple(x.items())  # noqa: E731
  dropout = {"dropout_rate": 0.2, "dropout_seed": 7}
  every = options(softcap=20.0, **dropout)
  found = {
    "causal": Problem(),
    "full": Problem(_full),
    "window": Problem(lambda T, S: Mask.causal((70, None))),
    "window_full": Problem(lambda T, S: Mask.full((40, 30))),
    "segments": Problem(_documents, B=2),
    "ragged": Problem(_lengths, B=2, extras=("padding",)),
    "more_keys": Problem(_plain, T=LONG // 2),
    "more_queries": Problem(_plain, S=LONG // 2),
    "empty_rows": Problem(lambda T, S: Mask.causal(offset=-(T // 5))),
    "prefix": Problem(_prefix, B=2),
    "positions": Problem(_positions, B=2),
    "block_causal": Problem(lambda T, S: Mask.block_causal(24)),
    "block_diffusion": Problem(
      lambda T, S: Mask.block_diffusion(T // 2, 24), S=LONG
    ),
    "function": Problem(
      lambda T, S: Mask.where(lambda q, k: (q - k) % (T // 2) < T // 4)
    ),
    "softcap": Problem(options=options(softcap=20.0)),
    "sinks": Problem(extras=("sinks",)),
    "no_sink": Problem(_documents, B=2, extras=("no_sink",)),
    "grouped": Problem(N=8),
    "dropout": Problem(options=options(**dropout)),
    "dropout_softcap": Problem(options=every),
    "everything": Problem(
      _documents, every, B=2, N=4, K=2, extras=("sinks", "padding")
    ),
    "large_logits": Problem(level=300.0),
    "D64": Problem(H=64, Hv=64),
    "D80": Problem(H=80, Hv=80),
    "D256": Problem(H=256, Hv=256),
    "other_width": Problem(H=192, Hv=128),
    "wider_values": Problem(H=64, Hv=128),
    # Enough lines to keep a whole chip busy, several for each block.
    "many_lines": Problem(T=2048, S=2048, B=2, N=16, K=16, tiles="own"),
  }
  for H in (64, 256):
    found[f"everything_D{H}"] = dataclasses.replace(
      found["everything"], H=H, Hv=H
    )
  return found | (_of_gpus() if target.platform == "gpu" else _of_tpus())


def _of_gpus() -> dict[str, Problem]:
  return {
    "float16": Problem(dtype="float16"),
    "one_row_of_queries": Problem(_plain, T=1),
    "wide_values": Problem(H=192, Hv=256),
    # Left operands through shared memory, as in the interpreter.
    "shared": Problem(tiles="shared"),
  }


def _of_tpus() -> dict[str, Problem]:
  some = {"softcap": 20.0}
  found = {
    "bias": Problem(extras=("bias",)),
    "bias_of_keys": Problem(_documents, B=2, extras=("bias_of_keys", "sinks")),
    "bias_inside": Problem(
      options=tuple({**some, "bias_before_softcap": True}.items()),
      extras=("bias",),
    ),
    "split": Problem(tiles="split", B=2),
    "parts": Problem(tiles="parts"),
    "float32": Problem(dtype="float32"),
    "float32_everything": Problem(
      _documents, tuple(some.items()), B=2, N=4, dtype="float32",
      extras=("bias", "sinks", "padding"),
    ),
  }  # fmt: skip
  return found


def _shrunk(x: Problem) -> Problem:
  """Returns a tiny version for the interpreter: a tile or two."""
  size = lambda n: n if n == 1 else 64 if n < LONG else 128  # noqa: E731
  if x.T == x.S:
    T = S = 128
  else:
    T, S = size(x.T), size(x.S)
  H, Hv = (64, 64) if x.Hv == x.H else (64, 128)
  return dataclasses.replace(
    x, T=T, S=S, B=min(x.B, 2), N=min(x.N, 4), K=min(x.K, 2), H=H, Hv=Hv
  )


def _plain(T, S):
  return Mask.causal()


def _full(T, S):
  return Mask.full()


def _documents(T, S):
  """Packed documents, the last one of the second row padding."""
  ids = jnp.arange(T)[None] * jnp.array([[3], [4]]) // T
  return Mask.causal((T // 3, None), jnp.where(ids == 3, -1, ids))


def _lengths(T, S):
  """Keys of different lengths, with padding that queries must ignore."""
  at, lens = jnp.arange(S)[None], jnp.array([[S // 2], [S - S // 8]])
  keys = jnp.where(at < lens, at, -1)
  return Mask.causal(q_positions=jnp.arange(T)[None], kv_positions=keys)


def _prefix(T, S):
  return Mask.prefix_lm(jnp.array([T // 3, 0]))


def _positions(T, S):
  """Positions in random order."""
  order = jax.random.permutation(jax.random.key(3), T)[None]
  return Mask.causal(q_positions=order, kv_positions=order)


def make_check(target: Target, x: Problem, direction: str) -> Check:
  """Returns a check of our kernels.

  Args:
    target: The chip.
    x: The call.
    direction: 'forward' or 'backward'.
  """
  attend = functools.partial(flash_attention, **_ours(target, x))
  return check_against_reference(
    x, direction, functools.partial(results, x, direction, attend)
  )


def check_against_reference(
  x: Problem, direction: str, run: Callable[..., Any]
) -> Check:
  """Returns a check of `run`, which returns some of the arrays of `results`.

  Args:
    x: The call.
    direction: 'forward' or 'backward'.
    run: Function of named arrays and the mask.
  """
  return Check(
    run=run,
    operands=functools.partial(operands, x),
    expected=functools.partial(_expected, x, direction),
    tolerances=functools.partial(_tolerances, x, direction),
  )


def operands(x: Problem) -> tuple[dict[str, Any], Mask]:
  """Returns named arrays of a call, and its mask."""
  mask = (x.mask or _plain)(x.T, x.S)
  draw = functools.partial(jobs.normal, dtype=x.dtype)
  found = {
    "q": draw(0, x.B, x.T, x.N, x.H),
    "k": draw(1, x.B, x.S, x.K, x.H),
    "v": draw(2, x.B, x.S, x.K, x.Hv),
  }
  if x.level:
    for name in "qk":
      found[name] = found[name].at[..., 0].set((x.level * x.H**0.5) ** 0.5)
  if "padding" in x.extras:
    keys, queries = mask.valid_keys(), mask.valid_queries()
    for name, live in (("q", queries), ("k", keys), ("v", keys)):
      if live is not None:
        found[name] = jnp.where(live[:, :, None, None], found[name], jnp.nan)
  extras = {
    "bias": ("bias", (1, x.N, x.T, x.S)),
    "bias_of_keys": ("bias", (x.B, 1, 1, x.S)),
    "sinks": ("sinks", (x.N,)),
    "no_sink": ("sinks", (x.N,)),
  }
  for extra in x.extras:
    if extra in extras:
      name, shape = extras[extra]
      found[name] = jobs.normal(5, *shape)
  if "no_sink" in x.extras:
    found["sinks"] = found["sinks"].at[0].set(-jnp.inf)
  return found, mask


def results(
  x: Problem,
  direction: str,
  attend: Callable[..., Any],
  operands: dict[str, Any],
  mask: Mask,
) -> dict[str, Any]:
  """Returns output and log-sum-exp, or gradients for the given `cotangents`.

  Args:
    x: The call.
    direction: 'forward' or 'backward'.
    attend: `flash_attention` with a backend.
    operands: Named arrays.
    mask: Which keys each query sees.
  """

  def run(operands):
    return attend(**operands, mask=mask, return_lse=True, **dict(x.options))

  if direction == "forward":
    return dict(zip(("o", "lse"), run(operands), strict=True))

  def loss(operands):
    (o, lse), (do, dlse) = run(operands), cotangents(x)
    lse = jnp.where(jnp.isneginf(lse), 0, lse)
    return jnp.sum(o.astype(jnp.float32) * do) + jnp.sum(lse * dlse)

  return {f"d{name}": y for name, y in jax.grad(loss)(operands).items()}


def cotangents(x: Problem) -> tuple[jax.Array, jax.Array]:
  """Returns cotangents of output [B, T, N, Hv] and log-sum-exp [B, N, T]."""
  return (
    jobs.normal(3, x.B, x.T, x.N, x.Hv),
    jobs.normal(4, x.B, x.N, x.T),
  )


def _expected(x: Problem, direction: str, operands, mask):
  """Computes the definition in float32."""
  attend = functools.partial(flash_attention, backend="reference")
  run = functools.partial(results, x, direction, attend)
  wide = jax.tree.map(lambda y: y.astype(jnp.float32), operands)
  with jax.default_matmul_precision("highest"):
    return jobs.untuned_jit(run)(wide, mask)


def _tolerances(x: Problem, direction: str, operands, expected):
  """Returns the tolerances that the module's docstring describes."""
  if x.dtype == "float32":
    # Sums of as many products as there are keys, weighted by cotangents.
    return {
      n: _float32(y) * (1 if n == "lse" else 4) for n, y in expected.items()
    }
  attend = functools.partial(flash_attention, backend="xla_blockwise")
  run = functools.partial(results, x, direction, attend)
  plain = jobs.untuned_jit(run)(*operands)
  unit, found = jobs.roundoff(x.dtype), {}
  for name, exact in expected.items():
    error = jobs.max_abs(plain[name].astype(jnp.float32) - exact)
    found[name] = 2 * error + 2 * unit * jnp.abs(exact)
  if "lse" in found:
    found["lse"] = _float32(expected["lse"])
  return found


def _float32(exact: Any) -> Any:
  return FLOAT32 * (1 + jnp.abs(exact) + jobs.max_abs(exact))


def _ours(target: Target, x: Problem) -> dict[str, Any]:
  """Returns the arguments of `flash_attention` that select our kernels."""
  found = {"backend": target.backend, "config": tiles(target, x.H, x.Hv, x)}
  if target.interpret() is not None:
    found["interpret"] = target.interpret()
  if x.dtype == "float32":
    found["precision"] = jax.lax.Precision.HIGHEST
  return found


def tiles(
  target: Target, H: int, Hv: int, x: Problem = Problem(tiles="own")
) -> GpuTiles | Tiles | None:
  """Returns the tile sizes of a call; None for the backend's default.

  Args:
    target: The chip.
    H, Hv: Head dims.
    x: The problem, whose variant of tiles is used.
  """
  if target.platform == "tpu":
    return _tpu_tiles(target, x)
  kind = target.kind
  found = for_head_dim(H, Hv, cores(kind) or "wgmma", num_multiprocessors(kind))
  if x.tiles != "own" or target.tiny:
    found = dataclasses.replace(found, programs=FEW)
  if x.tiles == "shared" or target.tiny:
    found = dataclasses.replace(found, operand="shared")
  return found


def _tpu_tiles(target: Target, x: Problem) -> Tiles | None:
  """Returns tiles of which a row has several, even for short rows."""
  if x.tiles == "own" and not target.tiny:
    return None
  small = Tile(256, 256, 128, 128)
  if target.tiny:
    small = Tile(64, 64, 32, 64)
  elif x.tiles == "parts":
    small = Tile(512, 512, 256, 128)
  return Tiles(small, small, small, "split" if x.tiles == "split" else "auto")
