"""Compiles products with packed weights for GPUs that are not present.

    .venv-chips/bin/python -m tests.kernels_pallas.chips_quantized_gpu

prints ptxas's report for each. `--job=JSON` is one compilation, in a child
process, because Mosaic GPU reads from the environment where to dump.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.inspect import gpu, ptx
from kernels_pallas.quantized_matmul import planar
from kernels_pallas.quantized_matmul.activations import quantize_rows
from kernels_pallas.quantized_matmul.gpu import mosaic_gpu
from kernels_pallas.quantized_matmul.gpu.tile_sizes import (
  SHARED_BYTES,
  Tile,
)
from tests.kernels_pallas import ptx_emulator as emulator

CODEBOOKS = {
  "even": planar.AFFINE,
  # Quantiles of a normal distribution (arXiv:2305.14314, appendix E).
  "nf4": (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343,
          -0.091050036, 0.0, 0.0795803, 0.1609302, 0.2461123, 0.33791524,
          0.44070983, 0.562617, 0.72295684, 1.0),
}  # fmt: skip

SHARED = SHARED_BYTES["mma"]


@dataclasses.dataclass(frozen=True)
class Case:
  """A product.

  Attributes:
    bits: Bits per code.
    group: Inputs per scale.
    offset: Whether groups have an offset.
    direction: 'forward' or 'gradient'.
    rows: Rows of activations.
    dtype: Dtype of the activations.
    size: Inputs and outputs.
    operand: As in `Tile`; with a tile of 64 rows if 'shared'.
    target: A key of `gpu.TARGETS`.
    scales: Dtype of scales and offsets.
    codebook: A key of `CODEBOOKS`.
    codes: Whether rows are rounded to 8 bits, too.
  """

  bits: int = 4
  group: int = 128
  offset: bool = False
  direction: str = "forward"
  rows: int = 4096
  dtype: str = "bfloat16"
  size: int = 4096
  operand: str = "registers"
  target: str = "h100"
  scales: str = "bfloat16"
  codebook: str = "even"
  codes: bool = False


TABLE = tuple(
  dataclasses.replace(case, target=target)
  for target in ("h100", "a100", "b200")
  for case in (
    Case(),
    Case(group=32, offset=True),
    Case(bits=8),
    Case(rows=8),
    Case(rows=8, group=32, offset=True),
    Case(bits=8, rows=8),
    Case(direction="gradient"),
    Case(direction="gradient", group=32, offset=True),
    Case(direction="gradient", bits=8),
    Case(group=64, codebook="nf4"),
    Case(rows=8, group=64, codebook="nf4"),
    Case(direction="gradient", group=64, codebook="nf4"),
    Case(bits=8, group=4096, codes=True),
    Case(bits=8, group=4096, codes=True, rows=8),
  )
)


def measure(case: Case) -> tuple[ptx.Kernel, str]:
  """Returns the kernel of a case, and its PTX.

  Raises:
    ValueError: The compiler rejects it; contains the compiler's message.
  """
  job = json.dumps(dataclasses.asdict(case))
  name = "tests.kernels_pallas.chips_quantized_gpu"
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    (found,) = gpu.compiled([name, "--job", job], folder)
    (dump,) = folder.glob("*.ptx")
    return found, dump.read_text()


def operands(case: Case):
  """Returns (x, w): random rows and a random matrix."""
  rng, n = np.random.default_rng(0), case.size
  low, high, kind = (0, 16, np.uint8) if case.bits == 4 else (-128, 128, "int8")
  codes = rng.integers(low, high, (n, n)).astype(kind)
  shape = (-(-n // case.group), n)
  scale = rng.uniform(0.5, 1, shape) / 2 ** (case.bits - 1)
  offset = rng.normal(size=shape) if case.offset else None
  w = planar.pack(
    codes,
    jnp.asarray(scale, case.scales),
    None if offset is None else jnp.asarray(offset, case.scales),
    group=case.group,
    codebook=CODEBOOKS[case.codebook],
  )
  x = jnp.asarray(rng.standard_normal((case.rows, n)), case.dtype)
  return x, planar.in_words(w)


def emulated(case: Case, text: str, *, late: bool = True) -> np.ndarray:
  """Returns the emulated result, in float32."""
  x, w = operands(case)
  if case.codes:
    x, unit = quantize_rows(x)
  p, t, arrays, out = mosaic_gpu.plan(x, w, _inputs(case), "mma")
  nothing = 2**31 - 1 if case.codes else np.nan
  y = np.full((t.splits, len(arrays["x"]), p.width), nothing, out)
  # In the order in which the kernel first uses them.
  held = [np.asarray(x).reshape(-1).view(np.uint8) for x in arrays.values()]
  loads, stores = iter(held), iter([y.reshape(-1).view(np.uint8)])
  memory = emulator.Memory(
    lambda opcode: next(loads if opcode.startswith("cp") else stores)
  )
  program, rng = emulator.instructions(text), np.random.default_rng(0)
  # The kernel's axes, the last one first.
  grid = t.splits, p.width // (t.groups * p.kept), y.shape[1] // t.rows
  for index in np.ndindex(grid):
    block = emulator.Block(program, memory, index, SHARED, late)
    block.run(rng)
  if case.codes:
    return y.sum(0)[: case.rows] * np.asarray(w.scale) * np.asarray(unit)
  return y.astype(np.float32).sum(0)[: case.rows]


def planned(case: Case):
  """Returns problem, tile and array names of an `mma` kernel."""
  found = []

  def run(x, w):
    x = x.astype(jnp.int8) if case.codes else x
    p, t, arrays, _ = mosaic_gpu.plan(x, w, _inputs(case), "mma")
    found.extend((p, t, list(arrays)))

  jax.eval_shape(run, *_shapes(case))
  return found


def _inputs(case):
  return 1 if case.direction == "forward" else 0


def _shapes(case):
  def pack():
    n = case.size
    scale = jnp.zeros((-(-n // case.group), n), case.scales)
    codes = jnp.zeros((n, n), jnp.uint8 if case.bits == 4 else jnp.int8)
    offset = scale if case.offset else None
    codebook = CODEBOOKS[case.codebook]
    w = planar.pack(
      codes, scale, offset, group=case.group, codebook=codebook
    )  # fmt: skip
    return jnp.zeros((case.rows, n), case.dtype), planar.in_words(w)

  return jax.eval_shape(pack)


def compile_here(case: Case) -> None:
  """Compiles a case in this process."""
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  device = gpu.devices(case.target)[0]
  mesh = Mesh([device], ("x",))
  whole = NamedSharding(mesh, PartitionSpec())
  x, w = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    _shapes(case),
  )
  way = mosaic_gpu.input_gradient
  if case.direction == "forward":
    codes = jnp.int8 if case.codes else None
    way = functools.partial(mosaic_gpu.product, activations=codes)
  tile = None
  if case.operand != "registers":
    tile = Tile(64, operand=case.operand)
  with jax.default_device(device), jax.set_mesh(mesh):
    jax.jit(functools.partial(way, tile=tile)).lower(x, w).compile()


def main() -> int:
  """Prints the table, or compiles a job."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--job")
  job = parser.parse_args().job
  if job:
    compile_here(Case(**json.loads(job)))
    return 0
  if problem := gpu.missing():
    print(problem, file=sys.stderr)
    return 1
  for case in TABLE:
    found, _ = measure(case)
    loop = ", ".join(f"{n} {kind}" for kind, n in sorted(found.loop.items()))
    print(
      f"{case.target}: W{case.bits}A{8 if case.codes else 16} "
      f"{case.direction}, {case.rows} rows, "
      f"group {case.group}, {case.codebook}"
      f"{', offsets' if case.offset else ''}: {found.registers} registers, "
      f"{found.spills} bytes spilled, {found.shared} bytes shared; an "
      f"iteration of {found.flops / 1e6:.2f} MFLOP: {loop}",
      flush=True,
    )
  return 0


if __name__ == "__main__":
  sys.exit(main())
