"""Checksums: every flipped bit is seen, no sharding is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.training.checkpoints import checksums

TYPES = (
  *("float32", "bfloat16", "float16", "float8_e4m3fn"),
  *("int8", "uint8", "int32", "uint32", "bool"),
)


def plain(x):
  """The sum as the docstring has it, in Python's own integers."""
  x = np.asarray(x)
  size = min(x.dtype.itemsize, 4)
  words = np.frombuffer(x.tobytes(), f"<u{size}")
  total = 0
  for i, word in enumerate(words.tolist()):
    h = (word + i * 0x9E3779B9) % 2**32
    h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
    total += h ^ (h >> 16)
  return total % 2**32


def draw(dtype, shape=(3, 5, 2)):
  rng = np.random.default_rng(0)
  if dtype == "bool":
    return jnp.asarray(rng.integers(0, 2, shape), bool)
  return jnp.asarray(rng.normal(size=shape) * 9).astype(dtype)


@pytest.fixture(scope="module")
def drawn():
  return {dtype: draw(dtype) for dtype in TYPES}


def test_sums_are_as_documented(drawn):
  found = checksums.sums(drawn | {"scalar": jnp.float32(3), "none": None})
  assert found == {
    **{dtype: plain(x) for dtype, x in drawn.items()},
    "scalar": plain(np.float32(3)),
  }
  assert checksums.sums({}) == {} == checksums.sums({"a": None})
  assert checksums.sums({"a": jnp.zeros((0, 3))}) == {"a": 0}


def test_eight_bytes_are_two_words():
  with jax.enable_x64(True):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
    assert x.dtype == jnp.float64
    assert checksums.sums({"x": x}) == {"x": plain(x)}


def test_every_flipped_bit_is_seen():
  x = np.random.default_rng(0).normal(size=12).astype(np.float32)
  flipped = np.tile(x.view(np.uint32), (x.size * 32, 1))
  for bit in range(x.size * 32):
    flipped[bit, bit // 32] ^= np.uint32(1 << (bit % 32))
  sums = jax.jit(jax.vmap(checksums._sum))(
    jnp.asarray(flipped.view(np.float32))
  )
  assert not np.any(np.asarray(sums) == checksums.sums({"x": x})["x"])


@pytest.mark.parametrize("size", [16, 32, 64, 4096])
def test_blocks_of_equal_numbers_cannot_be_lost(size):
  """Bits times an odd weight would call 32 ones and 32 zeros equal."""
  ones, zeros = np.ones(size, np.float32), np.zeros(size, np.float32)
  bits, weights = ones.view(np.uint32), 2 * np.arange(size, dtype=np.uint32) + 1
  assert (bits * weights).sum(dtype=np.uint32) == 0 or size == 16
  assert checksums.sums({"x": ones}) != checksums.sums({"x": zeros})
  mixed = np.concatenate([ones, zeros])
  assert checksums.sums({"x": mixed}) != checksums.sums(
    {"x": mixed[::-1].copy()}
  )


@pytest.mark.parametrize(
  "spec", [("a",), (None, "b"), ("b", "a"), (("a", "b"),)]
)
def test_no_sharding_changes_a_sum(spec):
  mesh = jax.make_mesh(
    (4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  x = np.random.default_rng(0).normal(size=(8, 16, 3)).astype(np.float32)
  sharded = jax.device_put(
    x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
  )
  assert checksums.sums({"x": sharded}) == {"x": plain(x)}
  text = checksums._summed.lower(sharded, checksums.everywhere([sharded]))
  # One number is reduced; no weight is gathered for it.
  assert "all-gather" not in text.compile().as_text()


def test_files_are_listed_and_compared(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "small").write_bytes(b"123")
  (tmp_path / "large").write_bytes(bytes(checksums.SMALL + 1))
  assert checksums.damaged_file(tmp_path) is None  # no list, nothing to say
  checksums.write_list(tmp_path)
  assert checksums.damaged_file(tmp_path) is None
  (tmp_path / "a" / "small").write_bytes(b"133")
  assert checksums.damaged_file(tmp_path) == (
    "a/small: has other content than what was saved"
  )
  (tmp_path / "a" / "small").write_bytes(b"123")
  (tmp_path / "large").write_bytes(bytes(checksums.SMALL))
  assert checksums.damaged_file(tmp_path) == (
    f"large: has {checksums.SMALL} bytes, not {checksums.SMALL + 1}"
  )
  (tmp_path / "large").unlink()
  assert checksums.damaged_file(tmp_path) == "large: is missing"
  (tmp_path / checksums.LIST).write_text("[]")
  assert checksums.damaged_file(tmp_path) == "files.json: is no list of files"
