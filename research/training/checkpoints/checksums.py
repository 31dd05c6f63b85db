"""Checksums: whether what is read is what was written.

Arrays are summed on their devices, one pass and one number a leaf, before they
are written and after they are read. The sum is over the elements in any order,
so that it does not depend on how an array is sharded:

  sum_i mix(bits_i + i * 0x9E3779B9)  mod 2^32

`mix` is a bijection, so one flipped bit always changes the sum; so does any
other change, but for one in 2^32. (Bits times an odd weight would miss a lost
block of equal numbers, such as 32 ones that are read as zeros.)
"""

import contextlib
import functools
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from research import tree
from research.io import folders
from research.sharding import replicated
from research.typing import Array, UserError

SMALL = 1 << 20
"""Bytes up to which a file is listed with a checksum of its own."""

LIST = "files.json"
"""What `list_files` found, beside those files."""


class Damaged(Exception):
  """What was read is not what was saved; the text says in what."""


def kinds(arrays: Any) -> dict[str, str]:
  """Returns path -> type and shape, e.g. `float32[2, 3]`, of every array."""
  return {
    path: f"{np.dtype(x.dtype).name}{list(x.shape)}"
    for path, x in tree.flatten_paths(arrays)
  }


def sums(arrays: Any) -> dict[str, int]:
  """Returns path -> checksum of every array; every process gets all of them.

  Args:
    arrays: a tree of arrays of any type and sharding.
  """
  found = tree.flatten_paths(arrays)
  if not found:
    return {}
  leaves = [x for _, x in found]
  sharding = everywhere(leaves)
  # A program for each shape, which other trees have too; all of them run
  # before the first is waited for.
  numbers = jax.device_get([_summed(x, sharding) for x in leaves])
  return {path: int(n) for (path, _), n in zip(found, numbers, strict=True)}


def everywhere(leaves: Sequence[Any]) -> jax.sharding.Sharding | None:
  """Returns the sharding of a result that every process can read."""
  for x in leaves:
    sharding = getattr(x, "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding):
      return replicated(sharding.mesh)
  return None


@functools.partial(jax.jit, static_argnums=1)
def _summed(x: Array, sharding: jax.sharding.Sharding | None):
  number = _sum(x)
  if sharding is None:
    return number
  return jax.lax.with_sharding_constraint(number, sharding)


def _sum(x: Array) -> Array:
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  info = jnp.finfo if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo
  bits = info(x.dtype).bits
  word = jnp.dtype(f"uint{min(bits, 32)}")
  # Eight bytes become two words, along a last axis.
  words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
  # By axes, not of the flattened array: that one would have to be gathered.
  index = jnp.zeros(words.shape, jnp.uint32)
  for axis, _ in enumerate(words.shape):
    stride = math.prod(words.shape[axis + 1 :]) % (1 << 32)
    place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    index += place * jnp.uint32(stride)
  mixed = _mix(words + index * jnp.uint32(0x9E3779B9))
  return jnp.sum(mixed, dtype=jnp.uint32)


def _mix(h: Array) -> Array:
  """The finalizer of MurmurHash3 (Appleby), a bijection of 32 bits."""
  h ^= h >> 16
  h *= jnp.uint32(0x85EBCA6B)
  h ^= h >> 13
  h *= jnp.uint32(0xC2B2AE35)
  return h ^ (h >> 16)


def list_files(folder: folders.Folder) -> dict[str, list[int]]:
  """Returns path -> [size, CRC-32 or -1] of every file under `folder`.

  Files above `SMALL` have no CRC: they hold arrays, which have sums.

  Args:
    folder: which exists.
  """
  found = {}
  for name, path in _walk(folder, ""):
    stat = path.stat()
    size = stat.length if hasattr(stat, "length") else stat.st_size
    found[name] = [size, zlib.crc32(path.read_bytes()) if size <= SMALL else -1]
  return found


def write_list(folder: folders.Folder) -> None:
  """Leaves the list of a folder's files in it."""
  folders.write_text(folder / LIST, json.dumps(list_files(folder)))


def _walk(folder: folders.Folder, prefix: str):
  for path in sorted(folder.iterdir(), key=lambda p: p.name):
    if path.is_dir():
      yield from _walk(path, f"{prefix}{path.name}/")
    elif prefix + path.name != LIST:
      yield prefix + path.name, path


def damaged_file(folder: folders.Folder) -> str | None:
  """Returns which file under `folder` is not as listed, and what is wrong.

  None if all are, or if there is no list.
  """
  try:
    listed = json.loads((folder / LIST).read_bytes())
  except FileNotFoundError:
    return None
  except (OSError, ValueError):
    return f"{LIST}: cannot be read"
  if not isinstance(listed, Mapping):
    return f"{LIST}: is no list of files"
  found = list_files(folder)
  for name in sorted({*listed, *found}):
    if name not in found:
      return f"{name}: is missing"
    if found[name] != listed.get(name):
      return f"{name}: {_difference(listed.get(name), found[name])}"
  return None


def _difference(listed: Any, found: list[int]) -> str:
  if listed is None:
    return "was not there when it was saved"
  size = listed[0] if isinstance(listed, list) and listed else None
  if size != found[0]:
    return f"has {found[0]} bytes, not {size}"
  return "has other content than what was saved"


@contextlib.contextmanager
def agreed():
  """Makes any process's failure to read one of all of them, `Damaged`."""
  error = None
  try:
    yield
  except (UserError, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
    raise  # no fault of the checkpoint
  except Exception as e:
    error = e
  failed = error is not None
  if jax.process_count() > 1:
    failed = bool(np.any(multihost_utils.process_allgather(np.array(failed))))
  if isinstance(error, Damaged):
    raise error
  if error is not None:
    raise Damaged(_reason(error)) from error
  if failed:
    raise Damaged("another process could not read it")


def _reason(error: BaseException) -> str:
  """Returns the first line of the first cause."""
  while error.__cause__ is not None:
    error = error.__cause__
  words = " ".join(str(error).split())
  return f"{type(error).__name__}: {words[:200]}"
