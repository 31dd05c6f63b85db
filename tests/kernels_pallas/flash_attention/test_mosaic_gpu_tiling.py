"""Tiles of the GPU kernels: which are refused, and what memory they share."""

import dataclasses
import functools

import jax.numpy as jnp
import pytest

from kernels_pallas.flash_attention.api import flash_attention
from kernels_pallas.flash_attention.gpu import (
  gpu_problem,
  gpu_tile_sizes,
  mosaic_gpu,
  sm90_forward,
  tile_stream,
)
from kernels_pallas.flash_attention.gpu.gpu_tile_sizes import (
  SHARED_BYTES,
  GpuTile,
  GpuTiles,
  for_head_dim,
)
from kernels_pallas.flash_attention.spec import Operands, Spec
from kernels_pallas.masks import Mask
from tests.support_gpu import needs_kernels, needs_tcgen05


@pytest.mark.parametrize(
  ("bad", "match"),
  [
    ({"groups": 4}, "1 to 3 groups"),
    ({"streamed": 48}, "multiple of 32"),
    ({"stages": (0, 1)}, "at least 1 stage"),
    ({"products": "none"}, "products"),
  ],
)
def test_bad_tiles_are_refused(bad, match):
  with pytest.raises(ValueError, match=match):
    GpuTile(**bad)


def test_bad_kernels_are_refused():
  with pytest.raises(ValueError, match="operand"):
    GpuTiles(operand="memory")
  with pytest.raises(ValueError, match="cores.*1 group"):
    GpuTiles(cores="mma")
  with pytest.raises(ValueError, match="multiple of 64 for 'wgmma'"):
    GpuTiles(dq=GpuTile(1, 32, (1, 1)))
  with pytest.raises(ValueError, match="'dk' and 'dv' once"):
    GpuTiles(gradients=(("dk",),))
  with pytest.raises(ValueError, match="programs: found 0"):
    GpuTiles(programs=0)


@pytest.mark.parametrize(
  ("tiles", "match"),
  [
    ({}, "height 128 for 'tcgen05'"),
    ({"dq": GpuTile(2, 32, height=128)}, "multiple of 64 for 'tcgen05'"),
    (
      {"dq": GpuTile(2, 64, (1, 2), height=128)},
      r"stages: found \(1, 2\) of dq",
    ),
    ({"dkv": GpuTile(1, 64, (2, 1), height=128)}, r"\(2, 1\) of dkv"),
  ],
)
def test_bad_tiles_of_tensor_memory_are_refused(tiles, match):
  tall = GpuTile(height=128)
  start = dict.fromkeys(("forward", "dkv", "dq"), tall) if tiles else {}
  with pytest.raises(ValueError, match=match):
    GpuTiles(cores="tcgen05", **(start | tiles))
  if tiles:
    GpuTiles(cores="tcgen05", **start)


@needs_tcgen05
def test_sums_that_tensor_memory_does_not_hold_are_refused_by_name():
  q, k, v = (jnp.zeros((1, 64, 1, 256), jnp.bfloat16),) * 3
  tiles = for_head_dim(256, 256, "tcgen05")
  two = dataclasses.replace(tiles.forward, groups=2)
  with pytest.raises(ValueError, match="GpuTile.*640 columns .* at most 512"):
    flash_attention(
      q,
      k,
      v,
      backend="mosaic_gpu",
      config=dataclasses.replace(tiles, forward=two),
    )


def prepared(H, Hv, cores):
  """The problems of the forward, dq and dkv kernels, and what dkv sums."""
  tiles = for_head_dim(H, Hv, cores)
  spec = Spec(scale=1.0, blocks=tiles)
  q, v = (jnp.zeros((1, 256, 1, D), jnp.bfloat16) for D in (H, Hv))
  x = Operands(q, q, v, Mask.full())

  problems = [
    gpu_problem.prepare(spec, x, tile, streamed)
    for tile, streamed in (
      (tiles.forward, gpu_problem.KEYS),
      (tiles.dq, gpu_problem.KEYS),
      (tiles.dkv, gpu_problem.QUERIES),
    )
  ]
  return *problems, tiles.gradients


def shared(H, Hv, cores="wgmma"):
  """Of each kernel: bytes of shared memory, and which buffers there are."""
  forward, dq, dkv, gradients = prepared(H, Hv, cores)
  back = mosaic_gpu.BACKWARD[cores]
  found = {"forward": mosaic_gpu.FORWARD[cores]._scratch(forward)}
  more = {"forward": sm90_forward.REDUCTION_BYTES}
  found["dq"] = back._dq_scratch(dq)
  for names in gradients:
    found["".join(names)] = back._dkv_scratch(dkv, names)
  if cores == "tcgen05":
    found = {name: [one[0], *one[2:]] for name, one in found.items()}
  return {
    name: (tile_stream.taken(one) + more.get(name, 0), set(one[0]))
    for name, one in found.items()
  }


# What `python -m kernels_pallas.inspect` says of a compiled kernel, and 8 bytes
# for each barrier, which that leaves out.
COMPILED = {
  (64, 64, "wgmma"): {
    "forward": 101_376 + 88,
    "dkdv": 99_328 + 80,
    "dq": 114_688 + 80,
  },
  (128, 128, "wgmma"): {
    "forward": 199_680 + 88,
    "dkdv": 197_632 + 80,
    "dq": 163_840 + 80,
  },
  (256, 192, "wgmma"): {
    "forward": 207_872 + 72,
    "dk": 205_824 + 72,
    "dv": 197_632 + 72,
    "dq": 204_800 + 72,
  },
  (256, 256, "wgmma"): {
    "forward": 199_680 + 88,
    "dk": 230_400 + 72,
    "dv": 230_400 + 72,
    "dq": 229_376 + 72,
  },
  (64, 64, "tcgen05"): {
    "forward": 134_144 + 112,
    "dkdv": 230_400 + 112,
    "dq": 131_072 + 112,
  },
  (128, 128, "tcgen05"): {
    "forward": 199_680 + 112,
    "dkdv": 197_632 + 88,
    "dq": 229_376 + 112,
  },
  (256, 256, "tcgen05"): {
    "forward": 199_680 + 88,
    "dk": 230_400 + 72,
    "dv": 230_400 + 72,
    "dq": 229_376 + 72,
  },
}


@pytest.mark.parametrize(("H", "Hv", "cores"), COMPILED)
def test_shared_memory_is_counted_as_the_compiler_does(H, Hv, cores):
  found = {name: size for name, (size, _) in shared(H, Hv, cores).items()}
  assert found == COMPILED[H, Hv, cores]


@pytest.mark.parametrize("cores", gpu_tile_sizes.CORES[::2])
@pytest.mark.parametrize("H", [64, 128, 192, 256])
@pytest.mark.parametrize("Hv", [64, 128, 192, 256])
def test_tiles_fit_shared_memory(H, Hv, cores):
  """And so do results beside what stays on Hopper, but the widest output."""
  for name, (size, buffers) in shared(H, Hv, cores).items():
    assert size <= SHARED_BYTES
    results = {"forward": {"o"}, "dq": {"dq"}}.get(name, {name, name[:2]})
    none = (H, Hv, name) == (256, 256, "forward")
    assert (buffers & results) or none or cores == "tcgen05"


@needs_kernels
def test_tiles_that_do_not_fit_are_refused_by_name():
  q, k, v = (jnp.zeros((1, 64, 1, 256), jnp.bfloat16),) * 3
  tiles = for_head_dim(256, 256)
  call = functools.partial(flash_attention, q, k, v, backend="mosaic_gpu")
  much = dataclasses.replace(tiles.forward, stages=(3, 2))
  with pytest.raises(ValueError, match="GpuTile.*232,552 bytes"):
    call(config=dataclasses.replace(tiles, forward=much))
