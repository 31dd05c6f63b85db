"""Checks and benchmarks of matmuls with packed weights on a chip.

The expected result is the product with the dequantized matrix in float32.
Weights and the result are rounded to the activations' dtype; sums are float32.
The baseline is XLA's matmul with the same matrix in bfloat16.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.bench import jobs
from kernels_pallas.bench.jobs import Check, Job, Target
from kernels_pallas.quantized_matmul import gpu, planar, tpu
from kernels_pallas.quantized_matmul.gpu.tile_sizes import MIN_CODES, Tile
from kernels_pallas.quantized_matmul.planar import Planar

CODEBOOKS = {
  "even": tuple(float(code - 8) for code in range(16)),
  # From arXiv:2305.14314, appendix E, in bfloat16.
  "nf4": (-1.0, -0.6953125, -0.5234375, -0.39453125, -0.28515625, -0.1845703125,
          -0.0908203125, 0.0, 0.07958984375, 0.1611328125, 0.24609375,
          0.337890625, 0.44140625, 0.5625, 0.72265625, 1.0),
}  # fmt: skip

SUMS = 2.0**-20
"""Error of float32 sums, relative to the sum of absolute values."""


@dataclasses.dataclass(frozen=True)
class Problem:
  """A product with a matrix.

  Attributes:
    bits: Bits per code.
    group: Inputs per scale.
    offset: Whether groups have an offset.
    direction: 'forward' or 'gradient'.
    rows: Rows of activations.
    inputs, outputs: Size of the matrix.
    codebook: One of `CODEBOOKS`.
    codes: Whether rows are rounded to 8 bits, too.
    dtype: Dtype of activations.
    scales: Dtype of scales and offsets.
  """

  bits: int = 4
  group: int = 128
  offset: bool = False
  direction: str = "forward"
  rows: int = 16
  inputs: int = 1024
  outputs: int = 1024
  codebook: str = "even"
  codes: bool = False
  dtype: str = "bfloat16"
  scales: str = "bfloat16"

  @property
  def name(self) -> str:
    """Unique name."""
    kind = "NF4" if self.codebook == "nf4" else f"W{self.bits}"
    more = ["_offset"] * self.offset
    more += [f"_{self.scales}"] * (self.scales != "bfloat16")
    more += [f"_{self.dtype}"] * (self.dtype != "bfloat16")
    return (
      f"{kind}A{8 if self.codes else 16}_group_{self.group}{''.join(more)}"
      f"/{self.direction}/{self.rows}x{self.inputs}x{self.outputs}"
    )

  @property
  def flops(self) -> float:
    """FLOPs of the product."""
    return 2.0 * self.rows * self.inputs * self.outputs

  @property
  def size(self) -> float:
    """Bytes of the packed matrix and the rows."""
    scales = 2 * (1 + self.offset) / self.group
    weights = self.inputs * self.outputs * (self.bits / 8 + scales)
    return weights + 2.0 * self.rows * (self.inputs + self.outputs)

  @property
  def dense_size(self) -> float:
    """Bytes of the matrix in bfloat16 and the rows."""
    weights = 2.0 * self.inputs * self.outputs
    return weights + 2.0 * self.rows * (self.inputs + self.outputs)


FORWARD, GRADIENT = ("forward", 16), ("gradient", 16)
MANY = ("forward", 300), ("gradient", 300)


def checks(target: Target) -> list[Job]:
  """Returns checks of every kind of codes, few and many rows, and gradients."""
  return [
    jobs.check(
      target,
      f"packed/{x.name}",
      _check(target, x),
      x.flops,
      smoke=n == 0,
    )
    for n, x in enumerate(problems(target))
  ]


def problems(target: Target) -> list[Problem]:
  """Returns the problems to check."""
  if target.tiny:
    small = Problem(inputs=128, outputs=128, group=32, offset=True, rows=8)
    return [
      small,
      dataclasses.replace(small, codebook="nf4", rows=16, group=64),
      dataclasses.replace(small, direction="gradient"),
      Problem(8, 128, rows=32, inputs=128, outputs=128, codes=True),
    ]
  kinds = [
    {}, {"group": 32, "offset": True}, {"group": 16}, {"group": 1024},
    {"bits": 8}, {"bits": 8, "group": 16, "offset": True},
    {"codebook": "nf4", "group": 64}, {"codebook": "nf4", "group": 16},
    {"group": 64, "offset": True, "scales": "float32"},
  ]  # fmt: skip
  kinds.append({"dtype": "float16" if target.platform == "gpu" else "float32"})
  if target.kind == "TPU v4":
    # TPU v4 cannot look up values in a register.
    kinds = [kind for kind in kinds if kind.get("codebook") != "nf4"]
  found = [
    Problem(**kind, direction=direction, rows=rows)
    for kind in kinds
    for direction, rows in (FORWARD, GRADIENT, *MANY)
  ]
  found += [
    Problem(inputs=1000, outputs=700, direction=direction, rows=130)
    for direction in ("forward", "gradient")
  ]
  if target.kind == "TPU v4":
    return found
  return found + [Problem(8, 1024, rows=n, codes=True) for n in (1, 16, 300)]


def times(target: Target) -> list[Job]:
  """Returns benchmarks of square matrices of 4096, from one row to many."""
  kinds = [{}, {"group": 32, "offset": True}, {"bits": 8}]
  kinds += [{"codebook": "nf4", "group": 64}]
  size, counts = 4096, (1, 16, 128, 1024, 8192)
  if target.tiny:
    kinds, size, counts = kinds[1:2], 128, (8,)
  found = [
    Problem(**kind, direction=direction, rows=rows, inputs=size, outputs=size)
    for kind in kinds
    for direction in ("forward", "gradient")
    for rows in counts
  ]
  found += [
    Problem(8, size, rows=rows, inputs=size, outputs=size, codes=True)
    for rows in counts
  ]
  if target.kind == "TPU v4":
    found = [x for x in found if x.codebook == "even" and not x.codes]
  return [_time(target, x) for x in found]


def _time(target: Target, x: Problem) -> Job:
  run = functools.partial(_product, target, x)

  def measure():
    x_rows, w = _operands(target, x)
    matrix = planar.dense(w).astype(x_rows.dtype)
    matrix = matrix if x.direction == "forward" else matrix.T
    implementations = {
      "ours": lambda: lambda x, w, _: run(x, w),
      "xla_bfloat16": lambda: lambda x, _, matrix: x @ matrix,
    }
    sizes = {"ours": x.size, "xla_bfloat16": x.dense_size}
    return jobs.time_all(
      target, implementations, lambda: (x_rows, w, matrix), x.flops, sizes
    )

  return Job(
    name=f"time/packed/{x.name}",
    stage=jobs.TIME,
    cost=x.flops,
    measure=measure,
    program=lambda: (
      run,
      jax.eval_shape(functools.partial(_operands, target, x)),
    ),
  )


def _check(target: Target, x: Problem) -> Check:
  return Check(
    run=lambda rows, w: {"y": _product(target, x, rows, w)},
    operands=functools.partial(_operands, target, x),
    expected=lambda rows, w: {"y": _exact(x, rows, w)[0]},
    tolerances=functools.partial(_tolerances, x),
  )


def _operands(target: Target, x: Problem) -> tuple[jax.Array, Planar]:
  """Returns rows, and the packed matrix."""
  n, m = x.inputs, x.outputs
  low, high, kind = (0, 16, "uint8") if x.bits == 4 else (-128, 128, "int8")
  key = jax.random.key(7)
  codes = jax.random.randint(key, (n, m), low, high).astype(kind)
  shape = (-(-n // x.group), m)
  scale = jax.random.uniform(key, shape, minval=0.5) / 2 ** (x.bits - 1)
  offset = jobs.normal(8, *shape, dtype=x.scales)
  w = planar.pack(
    codes,
    scale.astype(x.scales),
    offset if x.offset else None,
    group=x.group,
    codebook=CODEBOOKS[x.codebook],
  )
  w = planar.in_words(w) if target.platform == "gpu" else w
  width = n if x.direction == "forward" else m
  if x.codes:
    # Rows whose codes are known.
    rows = jax.random.randint(key, (x.rows, n), -127, 128).at[:, 0].set(127)
    return rows.astype(x.dtype), w
  return jobs.normal(9, x.rows, width, dtype=x.dtype), w


def _exact(x: Problem, rows, w: Planar) -> tuple[jax.Array, jax.Array]:
  """Returns the product, and that of absolute values."""
  # Codebook entries are rounded to the rows' dtype, as weights are.
  matrix = jax.jit(planar.dense)(w)
  matrix = matrix if x.direction == "forward" else matrix.T
  wide = rows.astype(jnp.float32)
  with jax.default_matmul_precision("highest"):
    return wide @ matrix, jnp.abs(wide) @ jnp.abs(matrix)


def _tolerances(x: Problem, operands, expected):
  _, size = _exact(x, *operands)
  unit = jobs.roundoff(x.dtype)
  if x.dtype == "float32":
    # TPU matrix units multiply float32 in pieces of bfloat16.
    unit = jobs.roundoff(jnp.bfloat16)
  return {"y": unit * (size + jnp.abs(expected["y"])) + SUMS * size}


def _product(target: Target, x: Problem, rows, w: Planar) -> Any:
  kernels = gpu if target.platform == "gpu" else tpu
  run = kernels.product if x.direction == "forward" else kernels.input_gradient
  if x.codes:
    run = functools.partial(run, activations=jnp.int8)
  if not target.tiny:
    return run(rows, w)
  run = functools.partial(run, interpret=target.interpret())
  if target.platform == "gpu":
    groups = 2 if x.direction == "forward" else 1
    tile = Tile(8, groups, 2, operand="shared")
    if x.codes or x.rows > tile.rows:
      size = -(-x.rows // MIN_CODES) * MIN_CODES if x.codes else x.rows
      tile = Tile(size, 2, 2, cores="mma")
    run = functools.partial(run, tile=tile)
  return run(rows, w)
