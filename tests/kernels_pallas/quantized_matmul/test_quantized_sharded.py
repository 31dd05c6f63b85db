"""Packed matrices sharded over a mesh: communication and results."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels_pallas.quantized_matmul import planar
from kernels_pallas.quantized_matmul.api import quantized_matmul
from kernels_pallas.quantized_matmul.planar_matmul import planar_matmul
from kernels_pallas.quantized_matmul.tpu.problem import Tile
from kernels_pallas.quantized_matmul.tpu.tile_sizes import Config
from tests.support_hlo import collectives

ROWS, INPUTS, OUTPUTS = 4, 256, 256
X, W, Y = P("rows", "inputs"), P("inputs", "outputs"), P("rows", "outputs")


@pytest.fixture(name="mesh")
def _mesh():
  """Every axis sharded in two: a shard is one block of 128 x 128."""
  mesh = jax.make_mesh((2, 2, 2), ("rows", "inputs", "outputs"), axis_types=(
    jax.sharding.AxisType.Auto,) * 3)  # fmt: skip
  with jax.set_mesh(mesh):
    yield mesh


def problem(bits, mesh):
  """Rows and a matrix on the mesh; y and dx of sum(sin(y)) by float64."""
  rng = np.random.default_rng(bits)
  codes, group = {
    4: (rng.integers(0, 16, (INPUTS, OUTPUTS), np.uint8), 64),
    8: (rng.integers(-9, 9, (INPUTS, OUTPUTS), np.int8), 128),
  }[bits]
  scale, offset = (
    rng.uniform(-0.2, 0.2, (INPUTS // group, OUTPUTS)).astype("f4")
    for _ in range(2)
  )
  matrix = np.repeat(scale.astype("f8"), group, 0) * codes
  matrix += np.repeat(offset.astype("f8"), group, 0)
  x = rng.standard_normal((ROWS, INPUTS)).astype("f4")
  y = x.astype("f8") @ matrix
  w = planar.pack(codes, scale, offset, group=group)
  put = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))  # noqa: E731
  return put(x, X), put(w, W), (y, np.cos(y) @ matrix.T)


def both(product, x, w):
  y, pull = jax.vjp(lambda x: product(x, w), x)
  return y, pull(jnp.cos(y))[0]


def on_a_device(product, x, w):
  """The product of shards, as a `shard_map` calls it."""
  w = dataclasses.replace(w, inputs=w.padded[0], outputs=w.padded[1])
  return jax.lax.psum(product(x, w), "inputs")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("way", ["by XLA", "shard_map"])
def test_only_sums_are_communicated(mesh, way, bits):
  """Of the result over the inputs, of the gradient over the outputs."""
  x, w, expected = problem(bits, mesh)
  f = functools.partial(both, quantized_matmul)
  if way == "shard_map":
    f = functools.partial(
      both, functools.partial(on_a_device, quantized_matmul)
    )
    f = jax.shard_map(f, in_specs=(X, W), out_specs=(Y, X))
  places = tuple(jax.NamedSharding(mesh, spec) for spec in (Y, X))
  traced = jax.jit(f, out_shardings=places).trace(x, w)
  program = traced.lower().compile()
  sent = collectives(program.as_text(), mesh)
  assert {(c.kind, c.axes, c.shapes) for c in sent} == {
    ("all-reduce", frozenset({axis}), ((ROWS // 2, 128),))
    for axis in ("inputs", "outputs")
  }
  # Sums of 256 float32 products of numbers up to 3, the size of an error of y
  # times 256 weights in dx.
  bounds = (1e-3, 5e-2)
  for found, want, atol in zip(program(x, w), expected, bounds, strict=True):
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=atol)
  # A kernel is a program of one device, so it needs a shard_map.
  tpu = traced.lower(lowering_platforms=("tpu",)).as_text()
  for name in ("quantized_matmul_few", "quantized_matmul_gradient"):
    assert (name in tpu) == (way == "shard_map")


@pytest.mark.parametrize("bits", [4, 8])
def test_the_kernel_multiplies_shards(mesh, bits):
  x, w, (expected, _) = problem(bits, mesh)
  tile = Tile(16, 128, 128)
  product = functools.partial(
    planar_matmul,
    backend="mosaic_tpu",
    config=Config(tile, tile, tile),
    interpret=True,
  )
  # The interpreter of kernels does not support types that vary over a mesh.
  run = jax.jit(jax.shard_map(
    functools.partial(on_a_device, product), in_specs=(X, W), out_specs=Y,
    check_vma=False))  # fmt: skip
  np.testing.assert_allclose(run(x, w), expected, rtol=1e-5, atol=1e-3)
