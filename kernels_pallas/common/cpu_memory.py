"""Huge pages for weights, for CPU programs that read all of them each step.

Decoding streams through memory. With 4 KiB pages a core spends a third of that
time on TLB misses (twice as much on a virtual machine), and the hardware
prefetcher stops at each page boundary. `malloc` does not place arrays of a few
megabytes in huge pages, whatever `GLIBC_TUNABLES` says, since they span few
whole ones.
"""

import mmap
import pathlib
import re
from typing import Any

import jax
import numpy as np

MIN_BYTES = 32 << 20
"""Bytes; smaller trees fit into caches."""

_PAGE = 2 << 20
_LINE = 64
"""Alignment in bytes that XLA expects of arrays."""

_PACKED = re.compile("u?int[24]|float4")
"""Sub-byte types that XLA packs: it would misread an aliased buffer."""

_ENABLED = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MEMORY = pathlib.Path("/proc/meminfo")
_GROUP = pathlib.Path("/sys/fs/cgroup")


def in_huge_pages(tree: Any) -> Any:
  """Returns the tree with its arrays copied into one region of huge pages.

  The copies have the same values and device; a reference to one of them keeps
  the whole region alive. Returns the tree unchanged if it is small, if the
  system has no huge pages (only Linux is supported), or if free memory does not
  hold two copies. Leaves unchanged: arrays on other platforms or on several
  devices, with less than a byte per element, or weakly typed.

  Args:
    tree: A pytree of arrays.
  """
  leaves, structure = jax.tree.flatten(tree)
  chosen = {id(x): x for x in leaves if _on_one_cpu(x)}
  ends = np.cumsum([-(-x.nbytes // _LINE) * _LINE for x in chosen.values()])
  size = int(ends[-1]) if chosen else 0
  if size < MIN_BYTES or not _can_have(size):
    return tree
  try:
    region = _region(size)
  except OSError:  # A limit that the checks above cannot see.
    return tree
  starts = [0, *ends[:-1].tolist()]
  moved = {
    key: _copied(x, region[start : start + x.nbytes])
    for start, (key, x) in zip(starts, chosen.items(), strict=True)
  }
  return jax.tree.unflatten(structure, [moved.get(id(x), x) for x in leaves])


def _on_one_cpu(x: Any) -> bool:
  if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
    return False
  if x.is_deleted() or jax.numpy.issubdtype(x.dtype, jax.dtypes.extended):
    return False
  if x.weak_type or _PACKED.match(x.dtype.name):
    return False
  return len(x.devices()) == 1 and next(iter(x.devices())).platform == "cpu"


def _can_have(size: int) -> bool:
  """Whether the system has huge pages and twice `size` bytes free."""
  try:
    if "[never]" in _ENABLED.read_text() or not hasattr(mmap, "MADV_HUGEPAGE"):
      return False
    found = re.search(r"MemAvailable:\s+(\d+) kB", _MEMORY.read_text())
  except OSError:
    return False
  if found is None:
    return False
  return 2 * size + _PAGE < min(int(found[1]) << 10, _left_to_group())


def _left_to_group() -> float:
  """Returns the bytes left in the container's limit; infinity without one."""
  try:
    most, now = (
      (_GROUP / f"memory.{name}").read_text() for name in ("max", "current")
    )
    return float(most) - float(now)
  except (OSError, ValueError):  # No cgroup, or no limit: "max".
    return float("inf")


def _region(size: int) -> np.ndarray:
  """Returns `size` bytes that start at a huge page."""
  memory = mmap.mmap(-1, size + _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  memory.madvise(mmap.MADV_HUGEPAGE)
  found = np.frombuffer(memory, np.uint8)
  first = -found.ctypes.data % _PAGE
  return found[first : first + size]


def _copied(x: jax.Array, place: np.ndarray) -> jax.Array:
  """Copies `x` into `place` and returns a JAX array that aliases it."""
  here = place.view(x.dtype).reshape(x.shape)
  here[...] = np.asarray(x)
  if x.committed:
    return jax.device_put(here, x.sharding, may_alias=True)
  with jax.default_device(next(iter(x.devices()))):
    return jax.device_put(here, may_alias=True)
