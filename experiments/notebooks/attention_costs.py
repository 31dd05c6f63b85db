"""What attention costs, naive and by tiles: the claims of FlashAttention.

Dao et al. 2022, "FlashAttention: fast and memory-efficient exact attention with
IO-awareness". Each function measures one claim for one head and returns rows,
plain values for tables and pictures; `study` has them as arms.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.common.chips import CHIPS
from kernels_pallas.flash_attention import cpu
from kernels_pallas.flash_attention.api import flash_attention
from kernels_pallas.flash_attention.tpu.tile_sizes import Tile
from kernels_pallas.inspect import traffic
from kernels_pallas.masks import Mask
from research.planning import chips, forecast

HEAD_DIM = 128
MEMORY = {
  "naive": jax.nn.dot_product_attention,
  "flash": flash_attention,
}


def memory(
  lengths: Sequence[int], topology: str | None = None
) -> list[dict[str, Any]]:
  """Returns bytes of a forward and backward pass, by the compiler.

  Args:
    lengths: Tokens, of one head of `HEAD_DIM` in float32.
    topology: A TPU slice to compile for, else this machine's CPU.

  Returns:
    For each length: `scores`, the bytes of one score matrix, and those that
    `naive` and `flash` take, q to dv included; None where it does not fit.
  """
  device = jax.devices("cpu")[0]
  if topology is not None:
    device = chips.topology(topology).devices[0]
  return [
    {"length": length, "scores": 4 * length**2}
    | {name: _bytes(f, length, device) for name, f in MEMORY.items()}
    for length in lengths
  ]


def _bytes(attend: Any, length: int, device: Any) -> int | None:
  mesh = Mesh(np.array([device]), ("x",))
  x = jax.ShapeDtypeStruct(
    (1, length, 1, HEAD_DIM),
    jnp.float32,
    sharding=NamedSharding(mesh, PartitionSpec()),
  )

  def step(q, k, v, do):
    o, back = jax.vjp(attend, q, k, v)
    return o, back(do)

  with jax.set_mesh(mesh):
    try:
      run = jax.jit(step).lower(x, x, x, x).compile()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return None
  found = run.memory_analysis()
  # A TPU's peak counts temporaries that the compiler keeps on the chip, too:
  # which ones those are changes with the length. A CPU's leaves out all.
  peak = getattr(found, "peak_memory_in_bytes", 0)
  return max(forecast.peak_bytes(found), peak)


def exactness(length: int) -> list[dict[str, Any]]:
  """Returns the largest errors against the definition in float64.

  Args:
    length: Tokens, of one causal head of 64.

  Returns:
    For each backend and type: `error` of the output and of the gradients of q,
    k and v, and `naive`, that of the definition in the same type. The TPU
    kernels are interpreted, the cpu backend has float32 alone.
  """
  rng = np.random.default_rng(0)
  draw = rng.standard_normal((4, 1, length, 1, 64))
  rows = []
  for dtype in ("float32", "bfloat16"):
    x = jnp.asarray(draw, jnp.float32).astype(dtype)
    exact = np.asarray(x.astype(jnp.float32), np.float64)
    with jax.enable_x64(True):
      truth = _results(flash_attention, jnp.asarray(exact), backend="reference")
    naive = _error(
      _results(jax.nn.dot_product_attention, x, is_causal=True), truth
    )
    backends = {"xla_blockwise": {}, "mosaic_tpu": {"interpret": True}}
    if dtype == "float32" and cpu.available():
      backends["cpu"] = {}
    for backend, options in backends.items():
      found = _results(flash_attention, x, backend=backend, **options)
      rows.append(
        {"backend": backend, "dtype": dtype, "error": _error(found, truth)}
        | {"naive": naive}
      )
  return rows


def _results(attend: Any, x: Any, **options: Any) -> list[np.ndarray]:
  if "is_causal" not in options:
    options["causal"] = True

  @jax.jit
  def run(q, k, v, do):
    o, back = jax.vjp(functools.partial(attend, **options), q, k, v)
    return o, *back(do)

  return [np.asarray(y, np.float64) for y in run(*x)]


def _error(found: list[np.ndarray], truth: list[np.ndarray]) -> float:
  """The largest difference, as a part of each result's largest value."""
  pairs = zip(found, truth, strict=True)
  return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def moved(
  length: int, blocks: Sequence[int], head_dim: int = HEAD_DIM
) -> list[dict[str, Any]]:
  """Returns HBM bytes and FLOPs a byte of the forward pass, in bfloat16.

  Args:
    length: Tokens of one head.
    blocks: Queries and keys of a tile of our TPU kernel.

  Returns:
    First standard attention (block 0), then a row for each block: `bytes`
    counted from the kernel's index maps, `formula` in closed form
    (kernels_pallas/MATH.md 5), `intensity` in FLOPs a byte, and `constant`,
    that of the paper's theta(N^2 D^2 / M) for bytes, M those of a tile's q, k,
    v and o.
  """
  plain = traffic.standard_traffic(length, head_dim)
  rows = [
    {"block": 0, "bytes": plain.total, "formula": plain.total}
    | {"intensity": plain.intensity, "constant": None}
  ]
  for block in blocks:
    tile = Tile(block, block, min(block, 256), min(block, 128))
    found = traffic.forward_traffic(length, head_dim, tile)
    once, fast = 2 * 2 * length * head_dim, 4 * 2 * block * head_dim
    constant = found.total * fast / (length * head_dim) ** 2
    rows.append(
      {"block": block, "bytes": found.total}
      | {"formula": once * (1 + length // block) + 4 * length}
      | {"intensity": found.intensity, "constant": constant}
    )
  return rows


def ridges() -> list[dict[str, Any]]:
  """Returns the FLOPs a byte from which a chip computes rather than waits."""
  return [
    {"chip": chip.name, "ridge": chip.flops / chip.bandwidth}
    for chip in CHIPS.values()
  ]


def masks(length: int) -> dict[str, Mask]:
  """Returns masks over `length` tokens that tiles can be counted for."""
  return {
    "full": Mask.full(),
    "causal": Mask.causal(),
    "sliding window": Mask.causal((length // 8 - 1, None)),
    "block diffusion": Mask.block_diffusion(length // 2, length // 32),
  }


def timing(lengths: Sequence[int], heads: int = 8) -> list[dict[str, Any]]:
  """Returns milliseconds of a forward pass on this machine's accelerator.

  Args:
    lengths: Tokens of a causal call in bfloat16.
    heads: Of `HEAD_DIM`.

  Returns:
    For each length, `naive` and `flash`. Nothing on a CPU, after saying so:
    its table is that of `make bench`.
  """
  platform = jax.default_backend()
  if platform == "cpu":
    print("timing: skipped, there is no TPU or GPU here")
    return []
  rows = []
  for length in lengths:
    x = jax.random.normal(
      jax.random.key(0), (3, 1, length, heads, HEAD_DIM), jnp.bfloat16
    )
    calls = {
      "naive": functools.partial(MEMORY["naive"], is_causal=True),
      "flash": functools.partial(MEMORY["flash"], causal=True),
    }
    spent = {name: _milliseconds(jax.jit(f), x) for name, f in calls.items()}
    rows.append({"length": length} | spent)
  return rows


def _milliseconds(run: Any, x: Any) -> float:
  jax.block_until_ready(run(*x))
  begin, calls = time.perf_counter(), 10
  for _ in range(calls):
    o = run(*x)
  jax.block_until_ready(o)
  return 1e3 * (time.perf_counter() - begin) / calls
