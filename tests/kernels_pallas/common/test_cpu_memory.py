"""Arrays in huge pages: equal values, contiguous."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.common import cpu_memory


@pytest.fixture(name="small", autouse=True)
def _small(monkeypatch):
  """Lowers the minimum size, and assumes the system has huge pages."""
  monkeypatch.setattr(cpu_memory, "MIN_BYTES", 1000)
  if not cpu_memory._can_have(1000):
    pytest.skip("this system has no huge pages")


def tree():
  rng = np.random.default_rng(0)
  shared = jnp.asarray(rng.standard_normal((3, 50)), jnp.bfloat16)
  return {
    "a": jnp.asarray(rng.standard_normal((7, 11)), jnp.float32),
    "b": [shared, jnp.arange(1000, dtype=jnp.uint32), shared],
    "codes": jnp.asarray([-8, 7, 3], jnp.int4),
    "empty": jnp.zeros((0, 3)),
    "one": jnp.float32(3),
    "weak": jnp.asarray(3.0),
    "key": jax.random.key(3),
    "name": "x",
    "numbers": np.arange(3),
  }


def address(x):
  return x.unsafe_buffer_pointer()


def test_values_are_equal_and_contiguous():
  before = tree()
  found = cpu_memory.in_huge_pages(before)
  assert jax.tree.structure(found) == jax.tree.structure(before)
  for x, y in zip(*map(jax.tree.leaves, (found, before)), strict=True):
    if any(y is before[n] for n in ("key", "weak", "codes", "name", "numbers")):
      assert x is y
      continue
    assert x is not y
    assert (x.dtype, x.shape, x.committed) == (y.dtype, y.shape, False)
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
  a, (b, c, again) = found["a"], found["b"]
  assert again is b
  places = [address(x) for x in (a, b, c)]
  assert places[0] % (2 << 20) == 0
  # Whole lines of 64 bytes, in the order of leaves.
  assert np.diff(places).tolist() == [320, 320]


def test_copies_outlive_their_sources():
  before = tree()
  wanted = np.array(before["b"][1])
  found = cpu_memory.in_huge_pages(before)["b"][1]
  del before
  again = jax.jit(lambda x: x + 1)(found)
  np.testing.assert_array_equal(np.asarray(found), wanted)
  np.testing.assert_array_equal(np.asarray(again), wanted + 1)


def test_committed_arrays_stay_committed():
  device = jax.devices()[1]
  x = jax.device_put(jnp.ones((40, 50)), device)
  found = cpu_memory.in_huge_pages(x)
  assert found is not x and found.committed and found.devices() == {device}


def test_arrays_on_other_devices_stay_there():
  device = jax.devices()[1]
  with jax.default_device(device):
    x = jnp.ones((40, 50))
  found = cpu_memory.in_huge_pages(x)
  assert found is not x and not found.committed and found.devices() == {device}


def test_arrays_can_be_donated():
  """Memory that a program may donate does not overlap its neighbours."""
  x, y = cpu_memory.in_huge_pages([jnp.ones((40, 50)), jnp.ones((40, 50))])
  changed = jax.jit(lambda x: x + 1, donate_argnums=0)(x)
  np.testing.assert_array_equal(np.asarray(changed), np.full((40, 50), 2.0))
  np.testing.assert_array_equal(np.asarray(y), np.ones((40, 50)))


def test_a_failing_allocation_leaves_arrays_unchanged(monkeypatch):
  def none(*_):
    raise OSError(12, "Cannot allocate memory")

  monkeypatch.setattr(cpu_memory.mmap, "mmap", none)
  x = [jnp.ones((40, 50))]
  assert cpu_memory.in_huge_pages(x) is x


@pytest.mark.parametrize(
  ("most", "now", "moves"),
  [
    ("max", "9", True),
    ("9000000", "1000000", True),
    ("4000000", "3000000", False),
  ],
)
def test_the_memory_limit_of_a_container_counts(
  most, now, moves, monkeypatch, tmp_path
):
  (tmp_path / "memory.max").write_text(f"{most}\n")
  (tmp_path / "memory.current").write_text(f"{now}\n")
  monkeypatch.setattr(cpu_memory, "_GROUP", tmp_path)
  x = [jnp.ones((40, 50))]
  assert (cpu_memory.in_huge_pages(x) is not x) == moves


def test_arrays_on_several_devices_stay():
  mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
  spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  x = jax.device_put(jnp.ones((40, 50)), spec)
  assert cpu_memory.in_huge_pages(x) is x
  found = cpu_memory.in_huge_pages([x, jnp.ones((40, 50))])
  assert found[0] is x and found[1] is not x


@pytest.mark.parametrize(
  ("file", "text"),
  [
    ("_ENABLED", "always madvise [never]\n"),
    ("_ENABLED", None),
    ("_MEMORY", "MemTotal: 9 kB\nMemAvailable:       2060 kB\n"),
    ("_MEMORY", "MemTotal: 9 kB\n"),
  ],
)
def test_without_huge_pages_or_memory_nothing_is_copied(
  file, text, monkeypatch, tmp_path
):
  path = tmp_path / "file"
  if text is not None:
    path.write_text(text)
  monkeypatch.setattr(cpu_memory, file, path)
  x = [jnp.ones((40, 50))]
  assert cpu_memory.in_huge_pages(x) is x


def test_small_trees_stay(monkeypatch):
  monkeypatch.setattr(cpu_memory, "MIN_BYTES", 10**6)
  x = [jnp.ones((40, 50))]
  assert cpu_memory.in_huge_pages(x) is x
  assert cpu_memory.in_huge_pages([]) == []
