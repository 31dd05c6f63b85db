"""Weights in huge pages, for programs on CPUs that read all of them each step.

Decoding reads memory once through. In pages of 4 KiB a core spends a third of
that time on looking pages up (on a virtual machine, twice over), and the CPU's
own prefetching stops at each one's end. `malloc` gives no others to arrays of
some megabytes, whatever `GLIBC_TUNABLES` says: they hold few whole huge pages.
"""

import mmap
import pathlib
import re
from typing import Any

import jax
import numpy as np

SMALLEST = 32 << 20
"""Bytes; less fits in caches."""

_PAGE = 2 << 20
_LINE = 64
"""At whose multiples XLA wants arrays."""

_PACKED = re.compile("u?int[24]|float4")
"""Types that XLA packs: it would read other bytes than it is given."""

_ENABLED = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MEMORY = pathlib.Path("/proc/meminfo")
_GROUP = pathlib.Path("/sys/fs/cgroup")


def in_huge_pages(tree: Any) -> Any:
  """Returns a tree whose arrays lie one after another in huge pages.

  They are copies, of the same values on the same device; what keeps one of
  them keeps the memory of all. The tree itself is returned where it is small,
  where the system has no huge pages (none but Linux has them here), or where
  no more than two copies would fit into free memory. Arrays on other
  platforms, on several devices, of less than a byte a number, or weakly typed
  stay where they are.

  Args:
    tree: A pytree of arrays.
  """
  leaves, structure = jax.tree.flatten(tree)
  chosen = {id(x): x for x in leaves if _on_one_cpu(x)}
  ends = np.cumsum([-(-x.nbytes // _LINE) * _LINE for x in chosen.values()])
  size = int(ends[-1]) if chosen else 0
  if size < SMALLEST or not _can_have(size):
    return tree
  try:
    region = _region(size)
  except OSError:  # A limit that nothing above knows of.
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
  """Whether the system has huge pages, and twice so much memory to spare."""
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
  """Bytes that a container may still take, infinity if nobody says."""
  try:
    most, now = (
      (_GROUP / f"memory.{name}").read_text() for name in ("max", "current")
    )
    return float(most) - float(now)
  except (OSError, ValueError):  # There is no group, or no limit: "max".
    return float("inf")


def _region(size: int) -> np.ndarray:
  """`size` bytes from a huge page's start on."""
  memory = mmap.mmap(-1, size + _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  memory.madvise(mmap.MADV_HUGEPAGE)
  found = np.frombuffer(memory, np.uint8)
  first = -found.ctypes.data % _PAGE
  return found[first : first + size]


def _copied(x: jax.Array, place: np.ndarray) -> jax.Array:
  """An array of the values of `x`, which XLA reads where they are put."""
  here = place.view(x.dtype).reshape(x.shape)
  here[...] = np.asarray(x)
  if x.committed:
    return jax.device_put(here, x.sharding, may_alias=True)
  with jax.default_device(next(iter(x.devices()))):
    return jax.device_put(here, may_alias=True)
