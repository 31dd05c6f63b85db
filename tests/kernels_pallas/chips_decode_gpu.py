"""Compiles decoding for GPUs that are not present, and runs the PTX in NumPy.

    .venv-chips/bin/python -m tests.kernels_pallas.chips_decode_gpu

prints ptxas's report for each case. `--job=JSON` is one compilation, in a child
process, because Mosaic GPU reads from the environment where to dump.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.decode_attention import pages, ragged
from kernels_pallas.decode_attention import work as works
from kernels_pallas.decode_attention.gpu import mosaic_gpu, support
from kernels_pallas.decode_attention.reference import reference_decode
from kernels_pallas.decode_attention.spec import Blocks, Spec
from kernels_pallas.inspect import gpu, ptx
from tests.kernels_pallas import ptx_emulator as emulator


@dataclasses.dataclass(frozen=True)
class Case:
  """A call.

  Attributes:
    target: A key of `gpu.TARGETS`.
    lens: Tokens of each row.
    new: New tokens of each row, or () for one token per row.
    heads: N, K, H and Hv.
    page: Tokens per page, or None for a cache.
    queries: Tokens per item.
    splits: Runs of a row's keys.
    window, softcap: As in `decode_attention`.
    dtype: Dtype of all arrays except quantized pages.
    code: Dtype of quantized pages, or None.
  """

  target: str = "a100"
  lens: tuple[int, ...] = (200, 0, 1, 131)
  new: tuple[int, ...] = ()
  heads: tuple[int, int, int, int] = (8, 2, 128, 128)
  page: int | None = None
  queries: int = 1
  splits: int = 1
  window: int | None = None
  softcap: float | None = None
  dtype: str = "bfloat16"
  code: str | None = None


def arrays(case: Case, alive: bool = True):
  """(q, held, table, lens, starts); with `alive`, NaN in invisible places."""
  rng = np.random.default_rng(0)
  N, K, H, Hv = case.heads
  lens = np.array(case.lens, np.int32)
  new = np.array(case.new or np.ones_like(lens), np.int32)
  starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)

  def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape), case.dtype)

  q, S, key = draw(starts[-1], N, H), max(case.lens), np.arange(max(case.lens))
  first = np.maximum(0, lens - new + 1 - (case.window or S))[:, None]
  seen = (key < lens[:, None]) & (key >= first)
  if case.page is None:
    seen = jnp.asarray(seen[:, None, :, None] | (not alive))
    k, v = draw(len(lens), K, S, H), draw(len(lens), K, S, Hv)
    held = works.Cache(*(jnp.where(seen, x, jnp.nan) for x in (k, v)))
    return q, held, None, lens, starts
  width = -(-S // case.page)
  order = rng.permutation(len(lens) * width).astype(np.int32)
  table = order.reshape(len(lens), width)
  own = np.zeros((table.size, case.page), bool)
  for row, token in np.argwhere(seen):
    own[table[row, token // case.page], token % case.page] = True
  kv, scale = draw(table.size, K, case.page, H + Hv), None
  own = jnp.asarray(own[:, None, :, None] | (not alive))
  if case.code is None:
    kv = jnp.where(own, kv, jnp.nan)
  else:
    parts = [
      pages.quantize(x, case.code) for x in (kv[..., :H], kv[..., H:])
    ]  # fmt: skip
    kv, scale = (
      jnp.concatenate([x[0] for x in parts], -1),
      jnp.stack([x[1] for x in parts], 1),
    )
    scale = jnp.where(own[:, None, :, :, 0], scale, jnp.nan)
  return q, pages.Pages(kv, scale, H), jnp.asarray(table), lens, starts


def prepare(case: Case, q, held, table, lens, starts):
  """Returns a call's problem, and a function that restores its results."""
  rows = ragged.RaggedRows(table, *(jnp.asarray(x) for x in (lens, starts)))
  spec = Spec(case.heads[2] ** -0.5, case.softcap, case.window)
  blocks = Blocks(case.queries, support.KEYS, case.splits)
  p, tiling = works.prepare(spec, blocks, q, held, rows)
  return p, lambda o, lse: works.combine_splits(
    p, tiling, rows, q.shape[0], o, lse
  )


def emulated(case: Case, text: str, *, late: bool = True, seed: int = 0):
  """Returns the emulated (output, log-sum-exp), and the bytes copied."""
  p, untile = prepare(case, *arrays(case))
  x = mosaic_gpu.plan(p)
  E, _, K, blocks, _, Hv = x.dims
  o = np.full((E, K, blocks * x.rows, Hv), np.nan, np.float32)
  lse = np.full(o.shape[:3], np.nan, np.float32)
  held = {n: np.asarray(y).view(np.uint8).reshape(-1)
          for n, y in x.arrays.items()}  # fmt: skip
  held |= {"o": o.reshape(-1).view(np.uint8),
           "lse": lse.reshape(-1).view(np.uint8)}  # fmt: skip
  # In the order in which the kernel first uses the arrays of one instruction.
  first = {
    "cp.async.cg.shared.global": ["q", "k", "v"],
    "cp.async.ca.shared.global": ["scales"],
    "ld.global.b32": ["work", "table"],
    "ld.b32": ["bounds"],
    "st.b32": ["lse"],
    "st.v2.b32": ["o"],
    "st.b64": ["o"],
  }
  memory = emulator.Memory(lambda opcode: held[first[opcode].pop(0)])
  program, rng = emulator.instructions(text), np.random.default_rng(seed)
  for index in np.ndindex(E, blocks, K):
    block = emulator.Block(program, memory, index, x.shared + 2048, late)
    block.run(rng)
  found = mosaic_gpu.restore_outputs(p, x, *(jnp.asarray(y) for y in (o, lse)))
  return untile(*found), memory.copied


def least(case: Case) -> int:
  """Bytes of the queries of all items, and of each key and value they see."""
  p, _ = prepare(case, *arrays(case))
  x, (K, H, Hv) = mosaic_gpu.plan(p), p.heads
  E, _, _, blocks, _, _ = x.dims
  _, begin, end = np.asarray(x.arrays["work"]).reshape(E, 3).T
  keys = int((end - begin).sum()) * K * blocks
  # Threads without work in short tiles copy scales a second time.
  scales = 8 * support.KEYS // x.keys
  token = H + Hv + scales if case.code else 2 * (H + Hv)
  return keys * token + 2 * E * K * blocks * x.rows * H


def exact(case: Case):
  """Returns the results by the definition, in float32."""
  q, held, table, lens, starts = arrays(case, alive=False)
  rows = ragged.RaggedRows(table, jnp.asarray(lens), jnp.asarray(starts))
  if table is None:
    k, v = (y.swapaxes(1, 2).astype(jnp.float32) for y in (held.k, held.v))
  else:
    k, v = pages.gather_pages(held, table, jnp.float32)
  spec = Spec(case.heads[2] ** -0.5, case.softcap, case.window)
  q = q.astype(jnp.float32)
  return reference_decode(
    spec, q, k, v, *ragged.token_positions(rows, q.shape[0])
  )


def measure(case: Case) -> tuple[ptx.Kernel, str]:
  """Returns ptxas's report on a case's kernel, and its PTX.

  Raises:
    ValueError: The compiler rejects it; contains the compiler's message.
  """
  job = json.dumps(dataclasses.asdict(case))
  name = "tests.kernels_pallas.chips_decode_gpu"
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    (found,) = gpu.compiled([name, "--job", job], folder)
    (dump,) = folder.glob("*.ptx")
    return found, dump.read_text()


def compile_here(case: Case) -> None:
  """Compiles a case in this process."""
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  device = gpu.devices(case.target)[0]
  whole = NamedSharding(Mesh([device], ("x",)), PartitionSpec())
  q, held, table, *where = arrays(case)
  leaves = vars(held)
  if table is not None:
    leaves = {"kv": held.kv, "scale": held.scale}

  def shape(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

  def run(q, leaves, table, *where):
    again = (
      works.Cache(**leaves)
      if table is None
      else pages.Pages(**leaves, head_dim=case.heads[2])
    )
    p, untile = prepare(case, q, again, table, *where)
    return untile(*mosaic_gpu.mosaic_gpu_decode(p))

  shapes = jax.tree.map(shape, (q, leaves, table, *where))
  with jax.default_device(device):
    jax.jit(run).lower(*shapes).compile()


TABLE = tuple(
  Case(target, heads=(8, 2, H, H), page=page)
  for target in gpu.TARGETS
  for H in (64, 128, 256)
  for page in (None, 16, 128)
) + tuple(
  Case(target, heads=(8, 2, H, H), page=128, code=code)
  for target in gpu.TARGETS
  for H in (64, 128, 256)
  for code in ("int8", "float8_e4m3fn")
)


def main() -> int:
  """Prints the table, or compiles a job."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--job")
  job = parser.parse_args().job
  if job:
    fields = {n: tuple(x) if isinstance(x, list) else x
              for n, x in json.loads(job).items()}  # fmt: skip
    compile_here(Case(**fields))
    return 0
  if problem := gpu.missing():
    print(problem, file=sys.stderr)
    return 1
  for case in TABLE:
    found, _ = measure(case)
    loop = ", ".join(f"{n} {kind}" for kind, n in sorted(found.loop.items()))
    print(
      f"{case.target}, D = {case.heads[2]}, "
      f"{f'pages of {case.page}' if case.page else 'cache'}"
      f"{f' in {case.code}' if case.code else ''}: "
      f"{found.registers} registers, {found.spills} bytes spilled, "
      f"{found.shared} bytes shared; a tile: {loop}",
      flush=True,
    )
  return 0


if __name__ == "__main__":
  sys.exit(main())
