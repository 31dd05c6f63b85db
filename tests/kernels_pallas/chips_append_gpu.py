"""Compiles appending for GPUs that are not here, and runs the PTX in NumPy.

    .venv-chips/bin/python -m tests.kernels_pallas.chips_append_gpu

prints what ptxas and XLA say of each case. `--job=JSON` is one compilation, in
a process of its own, because Mosaic GPU reads from the environment where to
dump.
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

from kernels_pallas.decode_attention import pages, ragged
from kernels_pallas.decode_attention.pages import Pages, append_to_pages
from kernels_pallas.inspect import gpu, ptx
from tests.kernels_pallas import ptx_emulator as emulator

COUNT, SIZE, HEADS = 8, 16, 2


@dataclasses.dataclass(frozen=True)
class Case:
  """Pages, and the chip that they are written on.

  Attributes:
    target: Of `gpu.TARGETS`.
    dtype: Of the pages.
    dims: H and Hv.
    backend: As of `append_to_pages`.
  """

  target: str = "a100"
  dtype: str = "int8"
  dims: tuple[int, int] = (64, 64)
  backend: str = "mosaic_gpu"


def arrays(case: Case):
  """(pages, k, v, table, lens, starts): tokens with and without a page."""
  rng = np.random.default_rng(0)
  (H, Hv), T = case.dims, 9

  def draw(*shape, dtype="float32"):
    return jnp.asarray(rng.standard_normal(shape), dtype)

  codes = jnp.dtype(case.dtype).itemsize == 1
  kv = draw(COUNT, HEADS, SIZE, H + Hv).astype(case.dtype)
  held = Pages(kv, draw(COUNT, 2, HEADS, SIZE) if codes else None, H)
  k = draw(T, HEADS, H, dtype="bfloat16")
  v = draw(T, HEADS, Hv, dtype="bfloat16")
  table = jnp.array([[3, 0], [1, -1], [2, COUNT]], jnp.int32)
  lens, starts = jnp.array([18, 0, 17]), jnp.array([0, 4, 4, 7])
  return held, k, v, table, lens, starts


def measure(case: Case) -> tuple[list[ptx.Kernel], str, dict]:
  """What ptxas says of a case's kernel, its PTX, and what XLA says.

  Without a kernel of ours, only the latter.

  Raises:
    ValueError: The compiler refuses, in its words.
  """
  job = json.dumps(dataclasses.asdict(case))
  name = "tests.kernels_pallas.chips_append_gpu"
  with tempfile.TemporaryDirectory() as scratch:
    folder, said = pathlib.Path(scratch, "dump"), pathlib.Path(scratch, "xla")
    try:
      found = gpu.compiled([name, "--job", job, "--to", str(said)], folder)
    except ValueError:
      if case.backend != "xla" or not said.exists():
        raise
      return [], "", json.loads(said.read_text())
    (dump,) = folder.glob("*.ptx")
    return found, dump.read_text(), json.loads(said.read_text())


def compile_here(case: Case, to: pathlib.Path) -> None:
  """Compiles a case in this process, and writes bytes of memory to a file."""
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  device = gpu.devices(case.target)[0]
  whole = NamedSharding(Mesh([device], ("x",)), PartitionSpec())
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    arrays(case),
  )
  run = functools.partial(append_to_pages, backend=case.backend)
  with jax.default_device(device):
    done = jax.jit(run, donate_argnums=0).lower(*shapes).compile()
  memory, held = done.memory_analysis(), jax.tree.leaves(shapes[0])
  entry = done.as_text().split("ENTRY")[1]
  to.write_text(
    json.dumps(
      {
        "pages": sum(x.size * x.dtype.itemsize for x in held),
        "in_place": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "kernels": entry.count(" fusion(") + entry.count(" custom-call("),
      }
    )
  )


def emulated(case: Case, text: str) -> Pages:
  """The pages that the kernel's PTX leaves behind."""
  held, k, v, *where = arrays(case)

  # What is known beforehand would be refused where a token has no page.
  @jax.jit
  def places(*where):
    rows = ragged.rows(k.shape[0], *where, (COUNT, SIZE), 1)
    return jnp.stack(pages.places(rows, k.shape[0], held)).astype(jnp.int32)

  loads, stores = [places(*where)], [held.kv]
  if held.scale is None:
    new = [x.astype(held.kv.dtype) for x in (k, v)]
  else:
    codes = [pages.quantize(x, held.kv.dtype) for x in (k, v)]
    new = [code for code, _ in codes]
    loads.append(jnp.stack([scale for _, scale in codes]))
    stores.append(held.scale)
  loads.insert(1, jnp.concatenate(new, axis=-1))
  loads, stores = (
    [np.array(x).reshape(-1).view(np.uint8) for x in some]
    for some in (loads, stores)
  )
  # In the order in which the kernel first uses them.
  order = {"ld": iter(loads), "st": iter(stores)}
  memory = emulator.Memory(lambda opcode: next(order[opcode[:2]]))
  program, rng = emulator.instructions(text), np.random.default_rng(0)
  for index in np.ndindex(k.shape[0], HEADS):
    emulator.Block(program, memory, (*index, 0), 0, True).run(rng)
  kv, *scale = stores
  kv = jnp.asarray(kv.view(held.kv.dtype).reshape(held.kv.shape))
  if held.scale is None:
    return Pages(kv, None, held.head_dim)
  scale = scale[0].view(np.float32).reshape(held.scale.shape)
  return Pages(kv, jnp.asarray(scale), held.head_dim)


def expected(case: Case) -> Pages:
  """The same by a scatter."""
  run = functools.partial(append_to_pages, backend="xla")
  return jax.jit(run)(*arrays(case))


TABLE = tuple(
  Case(target, dtype, dims)
  for target, dims in (
    ("a100", (64, 64)),
    ("h100", (256, 128)),
    ("h100", (128, 128)),
    ("b200", (256, 128)),
  )
  for dtype in ("bfloat16", "int8", "float8_e4m3fn")
)


def main() -> int:
  """Prints the table, or compiles a job."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--job")
  parser.add_argument("--to", type=pathlib.Path)
  args = parser.parse_args()
  if args.job:
    fields = json.loads(args.job)
    compile_here(Case(**{**fields, "dims": tuple(fields["dims"])}), args.to)
    return 0
  if problem := gpu.missing():
    print(problem, file=sys.stderr)
    return 1
  for case in TABLE:
    (kernel,), _, said = measure(case)
    _, _, plain = measure(dataclasses.replace(case, backend="xla"))
    print(
      f"{case}: {kernel.registers} registers, {kernel.spills} bytes spilled, "
      f"{said}; a scatter: {plain}",
      flush=True,
    )
  return 0


if __name__ == "__main__":
  sys.exit(main())
