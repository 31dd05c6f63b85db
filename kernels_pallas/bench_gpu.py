"""Our GPU kernels on the GPU at hand: right first, then fast.

    python -m kernels_pallas.bench_gpu

needs this package and JAX; it installs nothing. Every kernel is checked against
the reference, then timed beside cuDNN, jax's own Mosaic GPU attention and,
where `flash_attn_jax` is installed, FlashAttention; those of packed weights
beside XLA's product. A part that fails says so and the others
go on; the last line is the result as JSON, printed whatever happens.
`--dry-run` walks every row on the CPU with tiny shapes, the kernels in the
interpreter.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import os
import sys
import time
import types
from collections.abc import Callable
from typing import Any

from kernels_pallas import bench_gpu_packed

REPEATS = 20
LENGTHS = (1024, 4096, 16384)
HEAD_DIMS = (64, 128, 256)
TOKENS = 16384
"""Batch times length, as in the FlashAttention papers; 2048 / H heads."""


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table: T = S = length.

  Attributes:
    length: Tokens a row of the batch.
    batch: Rows.
    heads: Heads of queries and of keys.
    head_dim: Of queries, keys and values.
    dtype: 'bfloat16' or 'float16'.
    causal: Whether the mask is causal, else full.
    direction: 'forward' or 'backward', which is both passes.
  """

  length: int
  batch: int
  heads: int
  head_dim: int
  dtype: str
  causal: bool
  direction: str

  @property
  def flops(self) -> float:
    """Credited: 4 H a visible pair, 3.5 times that with the backward pass."""
    pairs = self.length**2
    if self.causal:
      pairs = self.length * (self.length + 1) // 2
    forward = 4 * self.batch * self.heads * self.head_dim * pairs
    return float(forward * (3.5 if self.direction == "backward" else 1))


def main(arguments: list[str] | None = None) -> int:
  """Prints checks and a table, then one line of JSON; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m kernels_pallas.bench_gpu", description=main.__doc__
  )
  parser.add_argument(
    "--dry-run", action="store_true", help="tiny, interpreted, on the CPU"
  )
  parser.add_argument("--repeats", type=int, default=REPEATS)
  parser.add_argument("--only", help="checks to run, joined by commas")
  args = parser.parse_args(arguments)
  if args.dry_run:
    # The interpreter's threads wait for each other: XLA needs one for each.
    os.environ.setdefault("NPROC", "16")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
  if importlib.util.find_spec("jaxtyping") is None:
    sys.modules["jaxtyping"] = _Unchecked("jaxtyping")
  import jax

  device = jax.devices()[0]
  result = {"device": device.device_kind, "jax": jax.__version__}
  print(f"{device.device_kind}, jax {jax.__version__}", flush=True)
  if not args.dry_run and device.platform not in ("gpu", "cuda"):
    result["error"] = (
      f"found a {device.platform}, expected an Ampere, Ada, Hopper or "
      "Blackwell GPU"
    )
    print(json.dumps(result))
    return 1
  result["checks"] = check(args.dry_run, args.only)
  repeats = 1 if args.dry_run else args.repeats
  result["times"] = table(args.dry_run, repeats)
  result["packed"] = bench_gpu_packed.measure(args.dry_run, repeats, guarded)
  parts = [*result["checks"].values(), *result["packed"]]
  result["ok"] = all(found["ok"] for found in parts if "skipped" not in found)
  print(json.dumps(result))
  return 0 if result["ok"] else 1


class _Unchecked(types.ModuleType):
  """Stands for jaxtyping where it is absent: annotations that say nothing.

  Kernels annotate with it, and nothing of this command checks that.
  """

  def __getattr__(self, name: str) -> type:
    if name.startswith("__"):
      raise AttributeError(name)
    return type(name, (), {"__class_getitem__": classmethod(lambda c, _: c)})


def guarded(name: str, run: Callable[[], Any]) -> tuple[Any, str | None]:
  """What `run` returns, or None and the reason in one line, printed."""
  try:
    return run(), None
  except Exception as problem:  # noqa: BLE001
    lines = str(problem).strip().splitlines() or [""]
    reason = f"{type(problem).__name__}: {lines[0][:300]}"
    print(f"{name}: {reason}", flush=True)
    return None, reason


def checks(tiny: bool) -> dict[str, dict[str, Any]]:
  """Calls whose results and gradients must be those of the reference."""
  import jax.numpy as jnp

  from kernels_pallas.masks import Mask

  T = 128 if tiny else 1000
  ids = jnp.arange(T)[None] // (T // 3)
  found = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (T // 4, None)},
    "segments": {"causal": True, "segment_ids": ids},
    "ragged": {"kv_lens": jnp.array([T // 2])},
    "empty_rows": {"mask": Mask.causal(offset=-(T // 5))},
    "prefix": {"mask": Mask.prefix_lm(jnp.array([T // 3]))},
    "block_causal": {"mask": Mask.block_causal(24)},
    "block_diffusion": {"mask": Mask.block_diffusion(T // 2, 24)},
    "softcap": {"causal": True, "softcap": 20.0},
    "sinks": {"causal": True, "sinks": True},
    "grouped": {"causal": True, "N": 4},
    "dropout": {"causal": True, "dropout_rate": 0.2, "dropout_seed": 7},
    "other_width": {"causal": True, "Hv": 64, "H": 64 if tiny else 192},
    "float16": {"causal": True, "dtype": "float16"},
  }
  if not tiny:
    found |= {f"D{H}": {"causal": True, "H": H} for H in (64, 80, 256)}
    found["shared"] = {"causal": True, "operand": "shared"}
  return {k: {"T": T, "H": 64 if tiny else 128, **v} for k, v in found.items()}


def check(tiny: bool, only: str | None = None) -> dict[str, Any]:
  """Largest errors of every kernel, beside those of plain 16-bit attention."""
  found, every = {}, checks(tiny)
  names = list(every) if only is None else only.split(",")
  for name in names:
    options = every.get(name)
    if options is None:
      raise SystemExit(f"--only: found {name!r}, expected of {sorted(every)}")
    run = functools.partial(_check, tiny, **options)
    errors, reason = guarded(f"check {name}", run)
    if errors is None:
      found[name] = {"ok": False, "reason": reason}
      continue
    found[name] = errors
    text = " ".join(f"{k} {v:.1e}" for k, v in errors["error"].items())
    print(f"check {name:<12} {'ok ' if errors['ok'] else 'BAD'} {text}",
          flush=True)  # fmt: skip
  return found


def _check(tiny, T, H, Hv=None, N=2, sinks=False, dtype="bfloat16",
           operand=None, **options) -> dict[str, Any]:  # fmt: skip
  import jax
  import jax.numpy as jnp

  from kernels_pallas.flash_attention.api import flash_attention

  keys = jax.random.split(jax.random.key(0), 4)
  size = lambda n, d: (1, T, n, d)  # noqa: E731
  x = {
    "q": jax.random.normal(keys[0], size(N, H), dtype),
    "k": jax.random.normal(keys[1], size(2, H), dtype),
    "v": jax.random.normal(keys[2], size(2, Hv or H), dtype),
  }
  if sinks:
    x["sinks"] = jnp.linspace(-1, 1, N)
  do = jax.random.normal(keys[3], size(N, Hv or H), jnp.float32)
  ours = _ours(tiny, H, Hv or H, operand)

  def step(backend, x):
    def loss(x):
      o, lse = flash_attention(**x, **options, **backend, return_lse=True)
      return jnp.sum(o.astype(jnp.float32) * do), (
        o,
        jnp.where(jnp.isneginf(lse), 0, lse),
      )

    (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(x)
    return {"o": out[0], "lse": out[1], **gradients}

  exact = {k: y.astype(jnp.float32) for k, y in x.items()}
  reference = {"backend": "reference"}
  with jax.default_matmul_precision("highest"):
    expected = jax.jit(functools.partial(step, reference))(exact)
  rough = jax.jit(functools.partial(step, {"backend": "xla_blockwise"}))(x)
  found = jax.jit(functools.partial(step, ours))(x)

  def error(a):
    return {k: float(jnp.abs(a[k].astype(jnp.float32) - y).max())
            for k, y in expected.items()}  # fmt: skip

  errors, limit = error(found), error(rough)
  unit = float(jnp.finfo(dtype).eps)
  # Twice the error of plain attention in 16 bits, or two roundings of a result.
  ok = all(
    e <= 2 * limit[k] + 2 * unit * float(jnp.abs(expected[k]).max())
    for k, e in errors.items()
  )
  return {"ok": bool(ok), "error": errors}


def _ours(tiny: bool, H: int, Hv: int, operand: str | None) -> dict[str, Any]:
  import jax
  from jax.experimental.pallas import mosaic_gpu as plgpu

  from kernels_pallas.flash_attention.mosaic_gpu import cores, programs
  from kernels_pallas.flash_attention.mosaic_gpu_tiling import for_head_dim

  kind = jax.devices()[0].device_kind
  tiles = for_head_dim(H, Hv, cores(kind) or "wgmma", programs(kind))
  if not tiny:
    tiles = dataclasses.replace(tiles, operand=operand or tiles.operand)
    return {"backend": "mosaic_gpu", "config": tiles}
  tiles = dataclasses.replace(tiles, operand="shared")
  return {
    "backend": "mosaic_gpu",
    "config": tiles,
    "interpret": plgpu.InterpretGPUParams(),
  }


def rows(tiny: bool) -> list[Row]:
  """The table's rows."""
  lengths, dims = ((128,), (64,)) if tiny else (LENGTHS, HEAD_DIMS)
  return [
    Row(
      length=n,
      batch=1 if tiny else TOKENS // n,
      heads=1 if tiny else 2048 // H,
      head_dim=H,
      dtype="bfloat16",
      causal=causal,
      direction=direction,
    )
    for H in dims
    for n in lengths
    for causal in (False, True)
    for direction in ("forward", "backward")
    # Tiny, one with and one without a mask walk through all that there is.
    if not tiny or causal == (direction == "backward")
  ]


def table(tiny: bool, repeats: int) -> list[dict[str, Any]]:
  """Milliseconds and TFLOP/s of every maker for every row."""
  found, makers = [], dict(MAKERS)
  if tiny or importlib.util.find_spec("flash_attn_jax") is None:
    makers.pop("flash_attn", None)
  for row in rows(tiny):
    line = dataclasses.asdict(row)
    for name, make in makers.items():
      label = f"{name} H{row.head_dim} T{row.length} {row.direction}"
      seconds, reason = guarded(
        label, functools.partial(_time, make, row, tiny, repeats)
      )
      line[name] = {"reason": reason}
      if seconds is not None:
        line[name] = {
          "ms": round(seconds * 1e3, 4),
          "tflops": round(row.flops / seconds / 1e12, 1),
        }
    cells = " ".join(
      f"{name} {line[name].get('ms', '-')} ms {line[name].get('tflops', '-')}"
      for name in makers
    )
    mask = "causal" if row.causal else "full"
    print(f"H{row.head_dim} T{row.length} {mask} {row.direction}: {cells}",
          flush=True)  # fmt: skip
    found.append(line)
  return found


def _time(make, row: Row, tiny: bool, repeats: int) -> float:
  """Median seconds of a call."""
  import jax

  attend = make(row, tiny)
  shape = (row.batch, row.length, row.heads, row.head_dim)
  keys = jax.random.split(jax.random.key(1), 4)
  q, k, v, do = (jax.random.normal(key, shape, row.dtype) for key in keys)

  def both(q, k, v):
    o, pull = jax.vjp(attend, q, k, v)
    return o, pull(do)

  run = jax.jit(attend if row.direction == "forward" else both)
  jax.block_until_ready(run(q, k, v))
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run(q, k, v))
    seconds.append(time.perf_counter() - start)
  return sorted(seconds)[len(seconds) // 2]


def _make_ours(row: Row, tiny: bool):
  from kernels_pallas.flash_attention.api import flash_attention

  options = _ours(tiny, row.head_dim, row.head_dim, None)
  return functools.partial(flash_attention, causal=row.causal, **options)


def _make_cudnn(row: Row, tiny: bool):
  import jax

  return functools.partial(
    jax.nn.dot_product_attention,
    is_causal=row.causal,
    implementation="xla" if tiny else "cudnn",
  )


def _make_jax(row: Row, tiny: bool):
  """jax's own: scale 1 and float16 are its contract, not ours; no causal
  backward. Its CUDA version check is bypassed by nothing: it may refuse."""
  if tiny:
    return lambda q, k, v: q + k + v
  from jax.experimental.pallas.ops.gpu import attention_mgpu

  if row.causal and row.direction == "backward":
    raise ValueError("has no causal backward pass")
  small = row.head_dim > 128  # noqa: PLR2004
  block = 64 if small else 128
  config = attention_mgpu.TuningConfig(
    block_q=64, block_kv=block, max_concurrent_steps=2, causal=row.causal,
    block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64,
  )  # fmt: skip

  def attend(q, k, v):
    q, k, v = ((y * s).astype("float16") for y, s in (
      (q, 1 / math.sqrt(row.head_dim)), (k, 1), (v, 1)))  # fmt: skip
    return attention_mgpu.attention(q, k, v, config).astype(row.dtype)

  return attend


def _make_flash_attn(row: Row, tiny: bool):
  """Dao's kernels, by the package `flash_attn_jax`."""
  del tiny
  from flash_attn_jax import flash_mha

  return functools.partial(flash_mha, is_causal=row.causal)


MAKERS = {
  "ours": _make_ours,
  "cudnn": _make_cudnn,
  "jax": _make_jax,
  "flash_attn": _make_flash_attn,
}

if __name__ == "__main__":
  sys.exit(main())
