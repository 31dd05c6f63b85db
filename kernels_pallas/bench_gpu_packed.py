"""Products with packed weights on the GPU at hand: a part of `bench_gpu`.

Each is checked against the decoded matrix in float32, then timed beside XLA's
product with the same matrix in bfloat16.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

CODEBOOKS = {
  "even": tuple(float(code - 8) for code in range(16)),
  # That of arXiv:2305.14314, appendix E, in bfloat16.
  "nf4": (-1.0, -0.6953125, -0.5234375, -0.39453125, -0.28515625, -0.1845703125,
          -0.0908203125, 0.0, 0.07958984375, 0.1611328125, 0.24609375,
          0.337890625, 0.44140625, 0.5625, 0.72265625, 1.0),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
  """A product with a square matrix.

  Attributes:
    bits: Of a code.
    group: Inputs of a scale.
    offset: Whether groups have one.
    direction: 'forward' or 'gradient'.
    rows: Of activations.
    size: Inputs and outputs.
    codebook: 'even', or 'nf4', which is looked up.
    codes: Whether rows are rounded to 8 bits, too.
  """

  bits: int
  group: int
  offset: bool
  direction: str
  rows: int
  size: int = 4096
  codebook: str = "even"
  codes: bool = False

  @property
  def name(self) -> str:
    """What identifies it."""
    offset = "+offset" if self.offset else ""
    kind = "NF4" if self.codebook == "nf4" else f"W{self.bits}"
    return (
      f"{kind}A{8 if self.codes else 16} group {self.group}{offset} "
      f"{self.direction} "
      f"{self.rows}x{self.size}"
    )


def rows(tiny: bool) -> list[Row]:
  """The products."""
  if tiny:
    # Each of the kernels, and of the kinds of codes.
    return [
      Row(4, 32, True, "forward", 8, 128),
      Row(4, 64, False, "forward", 16, 128, "nf4"),
      Row(8, 128, False, "forward", 32, 128, codes=True),
    ]
  counts = 1, 16, 128, 1024, 8192
  kinds = (4, 128, False), (4, 32, True), (8, 128, False)
  found = [
    Row(*kind, direction, count)
    for kind in kinds
    for direction in ("forward", "gradient")
    for count in counts
  ]
  found += [
    Row(4, 64, False, direction, count, codebook="nf4")
    for direction in ("forward", "gradient")
    for count in counts
  ]
  return found + [
    Row(8, 4096, False, "forward", count, codes=True) for count in counts
  ]


def measure(
  tiny: bool, repeats: int, guarded: Callable[..., Any]
) -> list[dict[str, Any]]:
  """Errors and milliseconds of every product; none without a kernel.

  Args:
    tiny: Interpreted on a CPU.
    repeats: Of a timing.
    guarded: As of `bench_gpu`.
  """
  from kernels_pallas.quantized_matmul import mosaic_gpu

  if not tiny and not mosaic_gpu.is_for():
    reason = "there is no kernel of packed weights for this GPU"
    print(f"packed weights: skipped, {reason}", flush=True)
    return [{"skipped": reason}]
  found = []
  for row in rows(tiny):
    run = functools.partial(_measure, row, tiny, repeats)
    line, reason = guarded(row.name, run)
    line = line or {"ok": False, "reason": reason}
    found.append(dataclasses.asdict(row) | line)
    print(f"{row.name}: {line}", flush=True)
  return found


def _measure(row: Row, tiny: bool, repeats: int) -> dict[str, Any]:
  import jax
  import jax.numpy as jnp

  from kernels_pallas.quantized_matmul import planar

  w, x = _operands(row)
  run = jax.jit(_product(row, tiny))
  dense = planar.dense(w)
  dense = dense if row.direction == "forward" else dense.T
  wide = x.astype(jnp.float32)
  with jax.default_matmul_precision("highest"):
    want, size = wide @ dense, jnp.abs(wide) @ jnp.abs(dense)
  got = run(x, w).astype(jnp.float32)
  # Weights and the result are rounded to 8 bits; sums are of float32.
  bound = 2.0**-8 * (size + jnp.abs(want)) + 2.0**-20 * size
  worst = float(jnp.max(jnp.abs(got - want) / bound))
  plain, matrix = jax.jit(lambda x, w: x @ w), dense.astype(x.dtype)
  return {
    "ok": worst <= 1,
    "error_of_bound": round(worst, 3),
    "ms": round(_seconds(run, (x, w), repeats) * 1e3, 4),
    "xla_bfloat16_ms": round(_seconds(plain, (x, matrix), repeats) * 1e3, 4),
  }


def _operands(row: Row):
  import jax
  import jax.numpy as jnp

  from kernels_pallas.quantized_matmul import planar

  keys, n = jax.random.split(jax.random.key(0), 4), row.size
  low, high, kind = (0, 16, jnp.uint8) if row.bits == 4 else (-128, 128, "int8")
  codes = jax.random.randint(keys[0], (n, n), low, high).astype(kind)
  shape = (n // row.group, n)
  scale = jax.random.uniform(keys[1], shape, minval=0.5) / 2 ** (row.bits - 1)
  offset = jax.random.normal(keys[2], shape, jnp.bfloat16)
  w = planar.pack(
    codes,
    scale.astype(jnp.bfloat16),
    offset if row.offset else None,
    group=row.group,
    codebook=CODEBOOKS[row.codebook],
  )
  if row.codes:
    # Of which the codes are known.
    x = jax.random.randint(keys[3], (row.rows, n), -127, 128).at[:, 0].set(127)
    return planar.in_words(w), x.astype(jnp.bfloat16)
  x = jax.random.normal(keys[3], (row.rows, n), jnp.bfloat16)
  return planar.in_words(w), x


def _product(row: Row, tiny: bool):
  from jax.experimental.pallas import mosaic_gpu as plgpu

  from kernels_pallas.quantized_matmul import mosaic_gpu
  from kernels_pallas.quantized_matmul.mosaic_gpu_tiling import Tile

  run = mosaic_gpu.product
  if row.direction == "gradient":
    run = mosaic_gpu.input_gradient
  if row.codes:
    run = functools.partial(run, activations="int8")
  if not tiny:
    return run
  interpret = plgpu.InterpretGPUParams()
  tile = Tile(8, 2, 2, operand="shared")
  if row.rows > tile.rows:
    tile = Tile(row.rows, 2, 2, cores="mma")
  return functools.partial(run, tile=tile, interpret=interpret)


def _seconds(run, arguments, repeats: int) -> float:
  """Median seconds of a call."""
  import jax

  jax.block_until_ready(run(*arguments))
  found = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    found.append(time.perf_counter() - start)
  return sorted(found)[len(found) // 2]
