"""The GPU kernels of packed weights, interpreted on the CPU, or on a GPU.

For Hopper the interpreter runs the variant whose weights pass through shared
memory; barriers, copies, loops and arithmetic are the same in the other one.
Which register holds which weight is checked by the layouts' definition. In the
interpreted `mma` kernel, copies are assignments and products plain ones.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from kernels_pallas.flash_attention.gpu.support import cores
from kernels_pallas.quantized_matmul import planar
from kernels_pallas.quantized_matmul.api import quantized_matmul
from kernels_pallas.quantized_matmul.gpu import dequantize, mosaic_gpu, support
from kernels_pallas.quantized_matmul.gpu.tile_sizes import (
  SHARED_BYTES,
  Tile,
  default_tile,
)
from kernels_pallas.quantized_matmul.planar_matmul import planar_matmul
from tests import support_chip
from tests.support_gpu import needs_kernels

pytestmark = needs_kernels

TILES = {
  "wgmma": Tile(rows=8, groups=2, stages=2, operand="shared"),
  "mma": Tile(rows=16, groups=2, stages=3, cores="mma"),
}
TILE = TILES["wgmma"]
I, O = 256, 128
SYMMETRIC = tuple(float(n) for n in range(-8, 8))
LOOKED_UP = (-1.0, -0.7, -0.53, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16,
             0.25, 0.34, 0.44, 0.56, 0.72, 1.25)  # fmt: skip


@pytest.fixture(name="gpu", params=support_chip.MODES)
def _gpu(request):
  yield from support_chip.runner(request.param)


def sized(gpu, tile):
  """The tile, with operands as they are on a GPU."""
  if gpu.interpret is not None:
    return tile
  if tile.cores == "wgmma":
    gpu.needs(cores(gpu.kind), "wgmma")
  return dataclasses.replace(tile, operand="registers")


@functools.cache
def packed(
  bits, group, offset=False, dtype="float16", inputs=I, outputs=O,
  codebook=SYMMETRIC,
):  # fmt: skip
  """A matrix whose codes are symmetric, of weights near 1."""
  rng = np.random.default_rng([bits, group])
  low, high, kind = (0, 16, "uint8") if bits == 4 else (-128, 128, "int8")
  codes = rng.integers(low, high, (inputs, outputs)).astype(kind)
  shape = (-(-inputs // group), outputs)
  scale = jnp.asarray(rng.uniform(0.5, 1, shape) / 2 ** (bits - 1), dtype)
  shift = jnp.asarray(rng.normal(size=shape), dtype) if offset else None
  w = planar.pack(codes, scale, shift, group=group, codebook=codebook)
  return planar.in_words(w)


def draw(*shape, seed=0, dtype=jnp.float16):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.standard_normal(shape), dtype)


def close(found, x, matrix):
  """Weights and results are rounded to float16, sums are float32."""
  x, found = (np.asarray(y, np.float64) for y in (x, found))
  matrix = np.asarray(matrix, np.float64)
  want, size = x @ matrix, np.abs(x) @ np.abs(matrix)
  bound = 2.0**-11 * (size + np.abs(want)) + 2.0**-20 * size
  assert np.all(np.abs(found - want) <= bound)


CASES = {  # name: (bits, group, offset, scales), gradient, tile
  "group_32_offset": ((4, 32, True), False, {}),
  "one_group_float32": ((4, 256, False, "float32"), False, {"splits": 2}),
  "group_16_8_bits": ((8, 16, True), False, {"groups": 1}),
  "gradient_16_float32": ((4, 16, True, "float32"), True, {"groups": 1}),
  "gradient_64": ((4, 64), True, {}),
  "gradient_8_bits": ((8, 128), True, {"splits": 2}),
}


@pytest.mark.parametrize("kernel", TILES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.cover(1)
def test_products_are_those_of_the_decoded_matrix(gpu, name, kernel):
  what, gradient, changes = CASES[name]
  tile = sized(gpu, dataclasses.replace(TILES[kernel], **changes))
  w, x = packed(*what), draw(11 if kernel == "wgmma" else 23, O if gradient
                             else I)  # fmt: skip
  run = mosaic_gpu.input_gradient if gradient else mosaic_gpu.product
  found = gpu.run(lambda x, w: run(x, w, tile, gpu.interpret), x, w)
  matrix = planar.dense(w)
  close(found, x, matrix.T if gradient else matrix)


@pytest.mark.slow
@pytest.mark.parametrize("offset", [False, True])
def test_rows_of_codes_are_summed_as_integers(gpu, offset):
  w, tile = packed(8, 256, offset, "float32"), Tile(32, 2, 2, cores="mma")
  # Whose codes are known: the largest is 127.
  rng = np.random.default_rng(0)
  codes = rng.integers(-127, 128, (37, I))
  codes[:, 5] = 127
  unit = 2.0 ** rng.integers(-3, 3, (37, 1))
  x = jnp.asarray(codes * unit, jnp.bfloat16)
  dy = draw(37, O, dtype=jnp.bfloat16)

  def both(x, w, dy):
    y, pull = jax.vjp(
      lambda x: planar_matmul(x, w, "mosaic_gpu", jnp.int8, tile,
                              gpu.interpret), x)  # fmt: skip
    return y, pull(dy)[0]

  found, slope = gpu.run(both, x, w, dy)
  matrix = np.asarray(planar.dense(w), np.float64)
  want = unit * (codes @ matrix)
  # The result is rounded; sums are exact, and scaled in float32.
  size = unit * (np.abs(codes) @ np.abs(matrix))
  bound = 2.0**-8 * np.abs(want) + 2.0**-21 * size
  assert np.all(np.abs(np.asarray(found, np.float64) - want) <= bound)
  # The gradient is that of the unrounded rows.
  exact = np.asarray(dy, np.float64) @ matrix.T
  size = np.abs(np.asarray(dy, np.float64)) @ np.abs(matrix.T)
  error = np.abs(np.asarray(slope, np.float64) - exact)
  assert np.all(error <= 2.0**-8 * (size + np.abs(exact)))


@pytest.mark.parametrize("scales", ["float16", "float32"])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("kernel", TILES)
@pytest.mark.cover(1)
def test_codebooks_are_looked_up(gpu, kernel, gradient, scales):
  """Their entries are rounded to the type of the rows."""
  w = packed(4, 32, True, scales, codebook=LOOKED_UP)
  x, tile = draw(16, O if gradient else I), sized(gpu, TILES[kernel])
  run = mosaic_gpu.input_gradient if gradient else mosaic_gpu.product
  found = gpu.run(lambda x, w: run(x, w, tile, gpu.interpret), x, w)
  rounded = tuple(map(float, np.asarray(LOOKED_UP, np.float16)))
  matrix = planar.dense(dataclasses.replace(w, codebook=rounded))
  close(found, x, matrix.T if gradient else matrix)


@pytest.mark.slow
@pytest.mark.parametrize(
  "tile", [Tile(128, 1, 2, operand="shared"), Tile(80, 1, 2, cores="mma")]
)
@pytest.mark.sample(4)
def test_many_rows_are_stored_in_parts_and_matrices_are_padded(gpu, tile):
  """The last tile of rows is partial, as are inputs and outputs."""
  w = packed(4, 64, inputs=200, outputs=70)
  tile, x, dy = sized(gpu, tile), draw(130, 200), draw(130, 70)

  def both(x, w, dy):
    y, pull = jax.vjp(
      lambda x: planar_matmul(x, w, "mosaic_gpu", None, tile, gpu.interpret), x
    )
    return y, pull(dy)[0]

  found, slope = gpu.run(both, x, w, dy)
  close(found, x, planar.dense(w))
  close(slope, dy, planar.dense(w).T)


@pytest.mark.parametrize("codebook", [SYMMETRIC, LOOKED_UP])
def test_offsets_in_float32_are_not_rounded_before_they_are_added(
  gpu, codebook
):
  """They nearly cancel the codes, as those of zero points do."""
  w, tile = packed(4, 64, codebook=codebook), sized(gpu, TILES["mma"])
  entry = np.float32(np.float16(codebook[13]))
  offset = -entry * w.scale.astype(jnp.float32)
  w = dataclasses.replace(w, offset=offset)
  x = jnp.eye(16, I, dtype=jnp.float16)  # a result is a weight
  run = lambda x, w: mosaic_gpu.product(x, w, tile, gpu.interpret)  # noqa: E731
  found = np.asarray(gpu.run(run, x, w), np.float64)
  codes = np.asarray(planar.unpack(w)[0])[:16]
  entries = np.asarray(codebook, np.float16).astype(np.float64)[codes]
  scale = np.asarray(w.scale, np.float64)[0]
  want = entries * scale + np.asarray(w.offset, np.float64)[0]
  # A weight is rounded to float16; so are products in float32 before.
  bound = 2.0**-11 * np.abs(want) + 2.0**-23 * np.abs(entries * scale)
  assert np.all(np.abs(found - want) <= bound) and np.any(codes == 13)


@pytest.mark.slow
@pytest.mark.parametrize("offset", [False, True])
def test_arithmetic_in_16_bits_is_that_in_32_rounded(gpu, offset):
  """Bit by bit: the codes are exact, and only one rounding remains."""
  w, x = packed(4, 32, offset), draw(8, I)
  wide = dataclasses.replace(
    w,
    scale=w.scale.astype(jnp.float32),
    offset=None if not offset else w.offset.astype(jnp.float32),
  )
  chosen = [
    dequantize.narrow(4, -8.0, x.dtype, y.scale.dtype) for y in (w, wide)
  ]
  assert chosen == [True, False]
  tile = sized(gpu, TILE)
  run = lambda x, w: mosaic_gpu.product(x, w, tile, gpu.interpret)  # noqa: E731
  found = [gpu.run(run, x, y) for y in (w, wide)]
  chex.assert_trees_all_equal(*found)


def test_words_of_8_bits_are_the_same_matrix():
  w = planar.pack(
    np.arange(-128, 128, dtype=np.int8).reshape(2, 128).repeat(65, 0),
    draw(1, 128, dtype=np.float32),
  )
  words = planar.in_words(w)
  assert (words.codes.shape, words.padded) == ((64, 128), w.padded)
  chex.assert_trees_all_equal(planar.unpack(words), planar.unpack(w))
  assert planar.in_words(words) is words


def elements(layout, shape):
  """The flat index in each register, [thread, *registers, vector]."""
  x = np.arange(np.prod(shape)).reshape(shape)
  for tile in layout.tiling.tiles:
    lead = x.ndim - len(tile)
    cut = [(n // t, t) for n, t in zip(x.shape[lead:], tile, strict=True)]
    x = x.reshape(*x.shape[:lead], *sum(cut, ()))
    outer = [lead + 2 * n for n in range(len(tile))]
    x = x.transpose(*range(lead), *outer, *(n + 1 for n in outer))

  def threads(dims, count):
    """Index along each partitioned dim, by thread."""
    sizes = [d.times if hasattr(d, "times") else x.shape[d] for d in dims]
    places = np.unravel_index(np.arange(count), sizes)
    return {d: p for d, p in zip(dims, places, strict=True) if d in at}

  at = [d for d in (*layout.warp_dims, *layout.lane_dims) if isinstance(d, int)]
  warps, lanes = threads(layout.warp_dims, 4), threads(layout.lane_dims, 32)
  found = []
  for warp in range(4):
    for lane in range(32):
      pick = [slice(None)] * x.ndim
      for dims, n in ((warps, warp), (lanes, lane)):
        for d, place in dims.items():
          pick[d] = slice(place[n], place[n] + 1)
      found.append(x[tuple(pick)])
  return np.stack(found).reshape(128, *layout.registers_shape(shape), -1)


@pytest.mark.parametrize("inputs", [0, 1])
def test_registers_hold_the_words_of_their_weights(inputs):
  """A thread's words are those of its own part of an operand."""
  weights = elements(plgpu.Layout.WGMMA.to_mgpu(), (64, 64))
  words = elements(dequantize.words_layout(inputs).to_mgpu(), (16, 64))
  for at in np.ndindex(weights.shape[1:-1]):
    have = words[:, *dequantize.source(at, inputs)]
    for n in range(2):  # of a register's two neighbours
      place = np.divmod(weights[:, *at, n], 64)
      i, o = place[inputs], place[1 - inputs]
      word = have[:, 0 if inputs == 1 else n]
      np.testing.assert_array_equal(word, i % 32 // 2 * 64 + o)
      # Where in the word: which half, and which plane of the two.
      thread = np.arange(128)
      half = n if inputs == 1 else thread // 4 % 2
      plane = at[1] // 4 if inputs == 1 else thread // 64
      np.testing.assert_array_equal(i % 2, np.broadcast_to(half, 128))
      np.testing.assert_array_equal(i // 32, np.broadcast_to(plane, 128))


@pytest.mark.parametrize(("depth", "sums"), [(128, 1), (64, 1), (64, 2)])
@pytest.mark.parametrize("rows", [1, 8, 60, 100, 4096])
@pytest.mark.parametrize("pieces", [3, 8, 64])
def test_fitted_tiles_fit_shared_memory(rows, pieces, depth, sums):
  tile = default_tile("wgmma", rows, pieces, 32, depth, sums)
  assert pieces % tile.groups == 0 and 32 // tile.splits >= 1
  assert tile.stages >= 2 and tile.rows * sums <= 256
  # Rows in 16 bits; words, 8 scales and 8 offsets of 32 bits; a part of sums.
  stage = tile.rows * depth * 2 + tile.groups * 64 * (16 + 2 * 8) * 4
  result = tile.groups * min(64, tile.rows) * 64 * 4
  assert tile.stages * stage + result + 2048 <= SHARED_BYTES["wgmma"]
  tile = default_tile("mma", rows, pieces, 32, depth, sums)
  assert pieces % tile.groups == 0 and 32 // tile.splits >= 1
  # As many registers as sums of 80 rows of two pieces.
  assert tile.stages >= 2 and tile.rows * tile.groups * sums <= 160
  stage = tile.rows * depth * 2 + tile.groups * 64 * (16 + 2 * 8) * 4
  assert tile.stages * stage + 2048 <= SHARED_BYTES["mma"]
  codes = default_tile("mma", rows, pieces, 32, depth, sums, codes=True)
  assert pieces % codes.groups == 0 and codes.rows % 32 == 0 < codes.rows <= 64
  tiles = -(-rows // tile.rows)
  assert tiles == -(-rows // 80) and tiles * tile.rows - rows < 16 * tiles


@pytest.mark.slow
@pytest.mark.parametrize(
  ("device", "few", "many"),
  [
    ("NVIDIA H100", True, True),
    ("NVIDIA A100-SXM4-80GB", True, True),
    ("NVIDIA L4", True, True),
    ("NVIDIA L40S", True, True),
    ("NVIDIA GeForce RTX 4090", True, True),
    ("NVIDIA GH200 480GB", True, True),
    ("NVIDIA B200", True, False),
    ("NVIDIA GB200", True, False),
    ("NVIDIA GeForce RTX 5090", False, False),
    ("Quadro RTX 4000", False, False),
    ("Tesla V100-SXM2-16GB", False, False),
  ],
)
@pytest.mark.sample(6)
def test_programs_for_gpus_call_the_kernels(device, few, many):
  device = jax.sharding.AbstractDevice(device, None, platform="gpu")
  mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)

  def kernels(w, dtype, rows=9, codes=None):
    x = jnp.zeros((rows, I), dtype)

    def run(x):
      y = quantized_matmul(x, w, activations=codes)
      return y.astype(jnp.float32).sum() if codes is None else y

    run = jax.grad(run) if codes is None else run
    with jax.sharding.use_abstract_mesh(mesh):
      lowered = jax.jit(run).trace(x).lower(lowering_platforms=("cuda",))
    return "mosaic_gpu" in lowered.as_text()

  w = packed(4, 64)
  assert kernels(w, jnp.bfloat16) == few
  assert kernels(w, jnp.bfloat16, 257) == many
  assert not kernels(w, jnp.float32)
  looked_up = dataclasses.replace(w, codebook=LOOKED_UP)
  assert kernels(looked_up, jnp.bfloat16) == few
  assert kernels(packed(8, 256), jnp.bfloat16, codes=jnp.int8) == few
  assert not kernels(packed(8, 64), jnp.bfloat16, codes=jnp.int8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["NVIDIA A100", "NVIDIA H100", "NVIDIA B200"])
@pytest.mark.parametrize(("bits", "codes"), [(4, None), (8, None), (8, "int8")])
@pytest.mark.cover(1)
def test_kernels_run_on_each_devices_shard(kind, bits, codes):
  """Under a `shard_map`, where results differ between devices."""
  device = jax.sharding.AbstractDevice(kind, None, platform="gpu")
  mesh = jax.sharding.AbstractMesh(
    (2, 2), ("i", "o"), (jax.sharding.AxisType.Auto,) * 2,
    abstract_device=device,
  )  # fmt: skip
  w = packed(bits, 128, outputs=256)

  def run(x, w):
    w = dataclasses.replace(w, inputs=w.padded[0], outputs=w.padded[1])
    y, pull = jax.vjp(
      lambda x: jax.lax.psum(quantized_matmul(x, w, activations=codes), "i"), x
    )
    return y, pull(y)[0]

  parts = P(None, "i"), P("i", "o")
  f = jax.shard_map(run, in_specs=parts, out_specs=(P(None, "o"), parts[0]))
  x = jax.ShapeDtypeStruct((9, I), jnp.bfloat16)
  with jax.sharding.use_abstract_mesh(mesh):
    lowered = jax.jit(f).trace(x, w).lower(lowering_platforms=("cuda",))
  assert "mosaic_gpu" in lowered.as_text()


def test_zero_rows_give_zero_rows():
  w, x = packed(8, 256), jnp.zeros((0, I), jnp.float16)
  for codes in (None, jnp.int8):
    assert mosaic_gpu.product(x, w, activations=codes).shape == (0, O)
  assert mosaic_gpu.input_gradient(x[:, :O], w).shape == (0, I)


@pytest.mark.parametrize("inputs", [132_104, 132_105])
def test_sums_of_codes_do_not_overflow(inputs):
  def pack():
    codes = jnp.zeros((inputs, O), jnp.int8)
    return planar.in_words(planar.pack(codes, jnp.ones((1, O), jnp.float32)))

  w = jax.eval_shape(pack)
  fits = inputs * 127 * 128 <= np.iinfo(np.int32).max
  assert (support.unsupported(jnp.bfloat16, w, jnp.int8) is None) == fits
  assert support.unsupported(jnp.bfloat16, w) is None


def test_unsupported_calls_raise():
  w, x = packed(4, 64), jnp.zeros((2, I), jnp.float16)
  call = functools.partial(quantized_matmul, backend="mosaic_gpu")
  with pytest.raises(ValueError, match="x: found float32, expected bfloat16"):
    call(x.astype(jnp.float32), w)
  with pytest.raises(ValueError, match="codebook.*what float16 has"):
    call(x, dataclasses.replace(w, codebook=(*LOOKED_UP[:-1], 1e5)))
  raw = planar.pack(np.zeros((I, O), np.int8), jnp.ones((1, O), jnp.float32))
  with pytest.raises(ValueError, match="codes: found int8.*in_words"):
    call(x, raw)
  with pytest.raises(ValueError, match="groups of 64.*a scale for each output"):
    call(x, packed(8, 64), activations=jnp.int8)
  with pytest.raises(ValueError, match="int8 with 4-bit codes"):
    mosaic_gpu.product(x, w, activations=jnp.int8)
  with pytest.raises(ValueError, match="3 groups and 1 splits, expected a"):
    mosaic_gpu.product(x, w, Tile(8, 3))
  with pytest.raises(ValueError, match="at most 2 splits"):
    mosaic_gpu.product(x, w, Tile(8, 2, splits=3))
  with pytest.raises(ValueError, match="mma, and rows in multiples of 32"):
    mosaic_gpu.product(x, packed(8, 256), TILE, activations=jnp.int8)
  with pytest.raises(ValueError, match="8 bits in words, expected int8"):
    quantized_matmul(
      x.astype(jnp.bfloat16), planar.in_words(raw), backend="mosaic_tpu"
    )
  with pytest.raises(ValueError, match="operand='shared'"):
    mosaic_gpu.product(x, w, interpret=plgpu.InterpretGPUParams())


@pytest.mark.parametrize(
  ("bad", "match"),
  [
    ({"rows": 12}, "multiples of 8"),
    ({"rows": 72}, "multiples of 8"),
    ({"rows": 320}, "up to 256"),
    ({"stages": 0}, "at least 1"),
    ({"operand": "memory"}, "operand"),
    ({"cores": "tcgen05"}, "cores"),
    ({"cores": "mma", "rows": 8}, "multiples of 16"),
    ({"cores": "mma", "rows": 16, "stages": 1}, "2 stages"),
    ({"cores": "mma", "rows": 16, "operand": "shared"}, "takes registers"),
  ],
)
def test_invalid_tiles_raise(bad, match):
  with pytest.raises(ValueError, match=match):
    Tile(**bad)
