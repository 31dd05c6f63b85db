"""Compiles products with packed weights for an H100 that is not here.

    .venv-chips/bin/python -m tests.kernels_pallas.chips_quantized_gpu

prints what ptxas says of each. `--job=JSON` is one compilation, in a process of
its own, because Mosaic GPU reads from the environment where to dump.
"""

import argparse
import dataclasses
import functools
import json
import sys

from kernels_pallas.inspect import gpu, ptx


@dataclasses.dataclass(frozen=True)
class Case:
  """A product.

  Attributes:
    bits: Of a code.
    group: Inputs of a scale.
    offset: Whether groups have one.
    direction: 'forward' or 'gradient'.
    rows: Of activations.
    dtype: Of activations.
    size: Inputs and outputs.
    operand: As of `Tile`; of a tile of 64 rows if 'shared'.
  """

  bits: int = 4
  group: int = 128
  offset: bool = False
  direction: str = "forward"
  rows: int = 4096
  dtype: str = "bfloat16"
  size: int = 4096
  operand: str = "registers"


TABLE = (
  Case(),
  Case(group=32, offset=True),
  Case(bits=8),
  Case(rows=8),
  Case(rows=8, group=32, offset=True),
  Case(bits=8, rows=8),
  Case(direction="gradient"),
  Case(direction="gradient", group=32, offset=True),
  Case(direction="gradient", bits=8),
)


def measure(case: Case) -> ptx.Kernel:
  """The kernel of a case.

  Raises:
    ValueError: The compiler refuses, in its words.
  """
  job = json.dumps(dataclasses.asdict(case))
  name = "tests.kernels_pallas.chips_quantized_gpu"
  (found,) = gpu.compiled([name, "--job", job])
  return found


def compile_here(case: Case) -> None:
  """Compiles a case in this process."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  from kernels_pallas.quantized_matmul import mosaic_gpu, planar
  from kernels_pallas.quantized_matmul.mosaic_gpu_tiling import Tile

  device = gpu.devices("h100")[0]
  whole = NamedSharding(Mesh([device], ("x",)), PartitionSpec())

  def pack():
    n = case.size
    scale = jnp.zeros((-(-n // case.group), n), jnp.bfloat16)
    codes = jnp.zeros((n, n), jnp.uint8 if case.bits == 4 else jnp.int8)
    offset = scale if case.offset else None
    w = planar.pack(codes, scale, offset, group=case.group)
    return planar.in_words(w), jnp.zeros((case.rows, n), case.dtype)

  w, x = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    jax.eval_shape(pack),
  )
  way = mosaic_gpu.input_gradient
  if case.direction == "forward":
    way = mosaic_gpu.product
  tile = None
  if case.operand != "registers":
    tile = Tile(64, operand=case.operand)
  with jax.default_device(device):
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
    found = measure(case)
    loop = ", ".join(f"{n} {kind}" for kind, n in sorted(found.loop.items()))
    print(
      f"W{case.bits}A16 {case.direction}, {case.rows} rows, group {case.group}"
      f"{', offsets' if case.offset else ''}: {found.registers} registers, "
      f"{found.spills} bytes spilled, {found.shared} bytes shared; an "
      f"iteration of {found.flops / 1e6:.2f} MFLOP: {loop}",
      flush=True,
    )
  return 0


if __name__ == "__main__":
  sys.exit(main())
