"""Schedules of the quantized matmul on TPUs that are not present.

    .venv-chips/bin/python -m tests.kernels_pallas.chips_quantized v5e v6e \\
        [--only=REGEX]

prints a row for each case next to the same product of bfloat16 weights, by a
plain kernel in tiles of the same size. Each is compiled in a child process,
since libtpu reads where to dump once.
"""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import tempfile

from kernels_pallas.inspect import build, schedule
from kernels_pallas.inspect.chips import CHIPS

NAMES = {
  "few": "quantized_matmul_few",
  "many": "quantized_matmul_many",
  "gradient": "quantized_matmul_gradient",
}


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclasses.dataclass(frozen=True)
class Case:
  """A product of `rows` rows with a matrix of 4096 x 4096.

  Attributes:
    target: A key of `CHIPS`.
    way: A key of `NAMES`.
    kind: 'int4', 'nf4', 'e2m1', 'int8', 'w8a8'; or 'bf16', the plain kernel.
    group: Inputs per scale.
    rows: Number of rows.
    tile: (rows, inputs, outputs) of a grid step.
    dtype: Dtype of the activations.
    offset: Whether groups have an offset.
    size: Inputs and outputs of the matrix.
  """

  target: str
  way: str
  kind: str
  group: int
  rows: int
  tile: tuple[int, int, int]
  dtype: str = "bfloat16"
  offset: bool = False
  size: int = 4096

  @property
  def bytes(self) -> float:
    """Bytes of a step's weights."""
    weights = self.tile[1] * self.tile[2]
    bits = {"bf16": 16, "int8": 8, "w8a8": 8}.get(self.kind, 4)
    scales = 0 if self.kind == "bf16" else 16 * (1 + self.offset) / self.group
    return weights * (bits + scales) / 8


def compile_to(case: Case, folder: pathlib.Path) -> str | None:
  """Compiles a case with dumps; returns the compiler's error, if any."""
  done = subprocess.run(
    [sys.executable, "-m", __spec__.name, json.dumps(dataclasses.asdict(case))],
    env=build.dumping(folder),
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  lines = [line for line in done.stderr.splitlines() if line.strip()]
  return None if done.returncode == 0 else " ".join(lines[-2:])[-500:]


def read(case: Case, folder: pathlib.Path) -> schedule.Schedule:
  """Returns the schedule of a compiled case."""
  return schedule.read(folder, NAMES[case.way], CHIPS[case.target])


def _compile(case: Case) -> None:
  import jax
  import jax.numpy as jnp
  from jax.experimental import topologies
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  topology = topologies.get_topology_desc(
    CHIPS[case.target].topology, platform="tpu"
  )
  mesh = Mesh(topology.devices[:1], ("x",))
  whole = NamedSharding(mesh, PartitionSpec())

  def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=whole)

  function, w = (_plain if case.kind == "bf16" else _ours)(case, array)
  with jax.set_mesh(mesh):
    jax.jit(function).lower(
      array((case.rows, case.size), case.dtype), w
    ).compile()


def _ours(case: Case, array):
  import jax.numpy as jnp

  from kernels_pallas.quantized_matmul import planar, tpu

  n, tile = case.size, tpu.Tile(*case.tile)
  codebook = {
    "int4": tuple(float(code - 8) for code in range(16)),
    "nf4": tuple((code / 15) ** 2 for code in range(16)),
    "e2m1": tuple(sign * x for sign in (1, -1) for x in E2M1),
  }.get(case.kind, ())
  scale = array((n // case.group, n), "bfloat16")
  w = planar.Planar(
    codes=array((n // 8, n), "uint32") if codebook else array((n, n), "int8"),
    scale=scale,
    offset=scale if case.offset else None,
    inputs=n,
    outputs=n,
    bits=4 if codebook else 8,
    group=case.group,
    codebook=codebook,
  )
  most = 1 << 30 if case.way == "few" else 0
  config = tpu.Config(tile, tile, tile, most)
  activations = jnp.int8 if case.kind == "w8a8" else None

  def run(x, w):
    if case.way == "gradient":
      return tpu.input_gradient(x, w, config)
    return tpu.product(x, w, activations, config)

  return run, w


def _plain(case: Case, array):
  """A plain tiled matmul of bfloat16 weights."""
  import jax
  import jax.numpy as jnp
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  transposed = case.way == "gradient"
  rows, inputs, outputs = case.tile
  rows, n = min(rows, case.rows), case.size
  kept, depth = (inputs, outputs) if transposed else (outputs, inputs)

  def kernel(x, w, y, total):
    @pl.when(pl.program_id(2) == 0)
    def _():
      total[...] = jnp.zeros(total.shape, total.dtype)

    total[...] += jax.lax.dot_general(
      x[...],
      w[...],
      (((1,), (int(transposed),)), ((), ())),
      preferred_element_type=jnp.float32,
    )

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
      y[...] = total[...].astype(y.dtype)

  place = (lambda m, o, k: (o, k)) if transposed else (lambda m, o, k: (k, o))
  run = pl.pallas_call(
    kernel,
    grid=(case.rows // rows, n // kept, n // depth),
    in_specs=[
      pl.BlockSpec((rows, depth), lambda m, o, k: (m, k)),
      pl.BlockSpec((inputs, outputs), place),
    ],
    out_specs=pl.BlockSpec((rows, kept), lambda m, o, k: (m, o)),
    out_shape=jax.ShapeDtypeStruct((case.rows, n), jnp.bfloat16),
    scratch_shapes=[pltpu.VMEM((rows, kept), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=100 << 20,
    ),
    name=NAMES[case.way],
  )
  return run, array((n, n), "bfloat16")


TABLE = (  # way, kind, group, rows, tile, offset
  ("few", "bf16", 128, 8, (8, 2048, 1024), False),
  ("few", "int4", 128, 8, (8, 2048, 1024), False),
  ("few", "int4", 32, 8, (8, 2048, 1024), True),
  ("few", "int4", 64, 8, (8, 2048, 1024), True),
  ("few", "int4", 32, 8, (8, 2048, 1024), False),
  ("few", "nf4", 64, 8, (8, 2048, 1024), False),
  ("few", "nf4", 32, 8, (8, 2048, 1024), False),
  ("few", "e2m1", 32, 8, (8, 2048, 1024), False),
  ("few", "e2m1", 16, 8, (8, 2048, 1024), False),
  ("few", "int8", 32, 8, (8, 2048, 1024), False),
  ("few", "int8", 4096, 8, (8, 2048, 1024), False),
  ("few", "w8a8", 4096, 8, (8, 2048, 1024), False),
  ("many", "bf16", 128, 1024, (1024, 1024, 512), False),
  ("many", "int4", 128, 1024, (1024, 1024, 512), False),
  ("many", "int4", 32, 1024, (1024, 1024, 512), True),
  ("many", "nf4", 64, 1024, (1024, 1024, 512), False),
  ("many", "e2m1", 16, 1024, (1024, 1024, 512), False),
  ("many", "int8", 4096, 1024, (1024, 1024, 512), False),
  ("few", "w8a8", 4096, 1024, (256, 2048, 1024), False),
  ("gradient", "bf16", 128, 1024, (1024, 512, 1024), False),
  ("gradient", "int4", 128, 1024, (1024, 512, 1024), False),
  ("gradient", "nf4", 64, 1024, (1024, 512, 1024), False),
)


def main(targets: list[str], only: str = "") -> None:
  """Prints the table: cycles of 2^20 weights, of the schedule and of memory.

  Args:
    targets: Keys of `CHIPS`.
    only: Regular expression for `kind, group`; bf16 is always read.
  """
  heads = "chip kernel weights rows bytes bundles memory kiloMAC bf16's slot"
  print(f"| {' | '.join(heads.split())} |")
  print("|---" * len(heads.split()) + "|")
  for target in targets:
    plain = {}
    for way, kind, group, rows, tile, offset in TABLE:
      if kind != "bf16" and not re.search(only, f"{kind}, {group}"):
        continue
      case = Case(target, way, kind, group, rows, tile, offset=offset)
      with tempfile.TemporaryDirectory() as folder:
        problem = compile_to(case, pathlib.Path(folder))
        if problem is not None:
          print(f"| {target} | {way} | {kind} | {rows} | {problem} |")
          continue
        found = read(case, pathlib.Path(folder))
      chip = CHIPS[target]
      scale = 2**20 / (tile[1] * tile[2]) * rows / min(rows, tile[0])
      memory = case.bytes / (chip.bandwidth / chip.cores / chip.clock)
      bundles, memory = found.bundles * scale, memory * scale
      cost = max(bundles, memory)
      plain.setdefault(rows if way != "gradient" else way, cost)
      base = plain[rows if way != "gradient" else way]
      slot, full = max(found.share().items(), key=lambda x: x[1])
      print(
        f"| {target} | {way} | {kind}, group {group}"
        f"{', offset' if offset else ''} | {rows} | "
        f"{case.bytes / tile[1] / tile[2]:.3f} | {bundles:.0f} | "
        f"{memory:.0f} | {1000 * bundles / 2**20 / rows:.4f} | "
        f"{cost / base:.2f} | {slot} {full:.0%} |",
        flush=True,
      )


if __name__ == "__main__":
  if sys.argv[1:2] and sys.argv[1].startswith("{"):
    fields = json.loads(sys.argv[1])
    _compile(Case(**{**fields, "tile": tuple(fields["tile"])}))
  else:
    given = [a for a in sys.argv[1:] if not a.startswith("--only=")]
    only = [a.removeprefix("--only=") for a in sys.argv[1:] if a not in given]
    main(given or ["v5e", "v6e"], *only)
