"""Compiles the decoding kernels for a TPU that is not present; prints failures.

libtpu reads its environment once, when it starts, so this is a program:
`python -m tests.kernels_pallas.chips_decode v5e`.
"""

import itertools
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.decode_attention.api import (
  decode_attention,
  paged_attention,
)
from kernels_pallas.decode_attention.pages import (
  append_to_pages,
  empty_pages,
)
from kernels_pallas.inspect.chips import CHIPS

DTYPES = ("bfloat16", "int8", "float8_e4m3fn", "float32")
ROWS, N, K, SIZE, COUNT, WIDTH = 16, 16, 4, 128, 64, 8
KINDS = {"decode": ROWS, "mixed": 200}


def paged(shape, head_dim, dtype, tokens):
  """A serving step: appends tokens to pages, and attends to the pages."""
  make = lambda: empty_pages(COUNT, K, SIZE, head_dim, dtype)  # noqa: E731
  pages = jax.tree.map(lambda x: shape(x.shape, x.dtype), jax.eval_shape(make))
  activations = jnp.float32 if dtype == "float32" else jnp.bfloat16
  q = shape((tokens, N, head_dim), activations)
  new = shape((tokens, K, head_dim), activations)
  where = [shape(s, jnp.int32) for s in ((ROWS, WIDTH), (ROWS,), (ROWS + 1,))]

  def step(pages, q, k, v, *where):
    pages = append_to_pages(pages, k, v, *where)
    return pages, paged_attention(
      q, pages, *where, window=300, return_lse=True, backend="mosaic_tpu"
    )

  jitted = jax.jit(step, donate_argnums=0)
  compiled = jitted.lower(pages, q, new, new, *where).compile()
  shape = ",".join(map(str, pages.kv.shape))
  copies = re.findall(
    rf"= \w+\[{shape}\]\S* copy(?:-start)?\(", compiled.as_text()
  )
  if copies:
    return f"copies the pages {len(copies)} times"
  return None


def cached(shape, head_dim, dtype, heads=K):
  """One token per row, from a cache of [B, K, S, H]."""
  q = shape((ROWS, N // K * heads, head_dim), jnp.dtype(dtype))
  k = shape((ROWS, heads, 1040, head_dim), jnp.dtype(dtype))

  def step(q, k, v, lengths):
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    return decode_attention(q, k, v, lengths, backend="mosaic_tpu")

  jax.jit(step).lower(q, k, k, shape((ROWS,), jnp.int32)).compile()


def main() -> None:
  """Prints a line for each failing case."""
  topology = CHIPS[sys.argv[1]].topology
  devices = topologies.get_topology_desc(topology, platform="tpu").devices
  mesh = Mesh(devices[:1], ("x",))
  sharding = NamedSharding(mesh, PartitionSpec())

  def shape(dims, dtype):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

  cells = [(paged, *x) for x in itertools.product(
    (64, 128, 256), DTYPES, KINDS.values())]  # fmt: skip
  cells += [(cached, *x) for x in itertools.product(
    (64, 128, 256), ("bfloat16", "float32"))]  # fmt: skip
  cells += [(cached, 64, dtype, 3) for dtype in ("bfloat16", "float32")]
  with jax.set_mesh(mesh):
    for compile_, *cell in cells:
      try:
        said = compile_(shape, *cell)
      except (ValueError, RuntimeError, NotImplementedError) as e:
        said = f"{type(e).__name__} {e}"[-300:]
      if said:
        print(compile_.__name__, *cell, said)
  print("compiled", len(cells))


if __name__ == "__main__":
  main()
