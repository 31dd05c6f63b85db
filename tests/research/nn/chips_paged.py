"""Compiles a model's step over pages for a chip that is not here.

`python -m tests.research.nn.chips_paged h100 bfloat16` is one compilation, in
a process of its own, because Mosaic GPU reads from the environment where to
dump. It fails unless the pages stay where they are.
"""

import sys

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.inspect import gpu
from research import tree
from research.generation import generate
from research.generation import generate_paged_rows as programs
from research.generation.generate_paged import PREFILL_SIZES
from research.generation.sampling import GREEDY, row_keys
from research.nn.cache.paged import CODE_DTYPES, empty_pool
from tests import support

ROWS, COUNT, SIZE, WIDTH, DEPTH = 8, 64, 128, 8, 2


def lowered(device, dtype):
  """Returns decoding and reading of a model of two layers, lowered for a chip.

  Args:
    device: of a topology.
    dtype: of the pages, of `CODES` or the model's.
  """
  model = support.model(
    "llama", vocab=256, width=512, hidden=512, heads=8, kv_heads=2,
    head_dim=128, depth=DEPTH,
  ).clone(dtype="bfloat16")  # fmt: skip
  mesh = Mesh([device], ("x",))
  there = NamedSharding(mesh, PartitionSpec())

  def shapes(make):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there),
      jax.eval_shape(make),
    )

  tokens = jnp.zeros((1, 1), jnp.int32)
  params = shapes(
    lambda: tree.unroll(model.init(jax.random.key(0), tokens)["params"])
  )
  kept = dtype if dtype in CODE_DTYPES else None
  pool = shapes(lambda: empty_pool(model, params, COUNT, SIZE, kept))

  def whole(*shape, dtype="int32"):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=there)

  keys = shapes(lambda: row_keys(jax.random.key(0), jnp.zeros(ROWS, "int32")))
  done = whole(ROWS, dtype="bool")
  rows = programs.Rows(*[whole(ROWS)] * 3, done, keys)
  stop = whole(len(generate.pad_stop_tokens(())))
  with jax.set_mesh(mesh), jax.default_device(device):
    yield programs.decode.lower(
      *(model, params, pool, whole(ROWS), rows, whole(ROWS, WIDTH)),
      *(GREEDY, stop),
      size=4,
    )
    for size in PREFILL_SIZES:
      yield programs.prefill.lower(
        model, params, pool, whole(1, WIDTH), whole(1), whole(1, size), whole(1)
      )


def main() -> None:
  """Compiles all programs."""
  target, dtype = sys.argv[1:]
  pages = DEPTH * COUNT * 2 * SIZE * 256 * (1 if dtype in CODE_DTYPES else 2)
  for program in lowered(gpu.devices(target)[0], dtype):
    found = program.compile().memory_analysis()
    given, more = found.alias_size_in_bytes, found.temp_size_in_bytes
    if given < pages or more > pages // DEPTH:
      raise ValueError(f"{given} of {pages} bytes are in place, {more} beside")


if __name__ == "__main__":
  main()
