"""Checksums of checkpoint arrays and files.

The checksum of an array is computed on its devices in one pass, before writing
and after reading. It is an order-independent sum over the elements, so it does
not depend on the sharding:

  sum_i mix(bits_i + i * 0x9E3779B9)  mod 2^32

`mix` is a bijection, so a single flipped bit always changes the sum; any other
change is missed with probability 2^-32. (Bits times an odd weight would miss a
lost block of equal numbers, such as 32 ones that are read as zeros.)
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

MAX_CRC_BYTES = 1 << 20
"""Maximum size in bytes of files that are listed with a CRC-32."""

FILE_LIST = "files.json"
"""Name of the file with the result of `list_files`."""


class Damaged(Exception):
  """A checkpoint differs from what was saved; the message says where."""


def array_types(arrays: Any) -> dict[str, str]:
  """Returns path -> dtype and shape, e.g. `float32[2, 3]`, of every array."""
  return {
    path: f"{np.dtype(x.dtype).name}{list(x.shape)}"
    for path, x in tree.flatten_paths(arrays)
  }


def sums(arrays: Any) -> dict[str, int]:
  """Returns path -> checksum of every array, in every process."""
  arrays_by_path = tree.flatten_paths(arrays)
  if not arrays_by_path:
    return {}
  leaves = [x for _, x in arrays_by_path]
  sharding = replicated_sharding(leaves)
  # One program per shape, which other trees share; all are dispatched before
  # the first result is awaited.
  numbers = jax.device_get([_summed(x, sharding) for x in leaves])
  return {
    path: int(n) for (path, _), n in zip(arrays_by_path, numbers, strict=True)
  }


def replicated_sharding(leaves: Sequence[Any]) -> jax.sharding.Sharding | None:
  """Returns a replicated sharding on the leaves' mesh, or None without one."""
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
  # 64-bit elements become two words, along a new last axis.
  words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
  # Computed per axis: flattening would gather a sharded array.
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

  Files larger than `MAX_CRC_BYTES` have no CRC: they contain arrays, which have
  checksums.
  """
  files = {}
  for name, path in _walk(folder, ""):
    stat = path.stat()
    size = stat.length if hasattr(stat, "length") else stat.st_size
    files[name] = [
      size,
      zlib.crc32(path.read_bytes()) if size <= MAX_CRC_BYTES else -1,
    ]
  return files


def write_list(folder: folders.Folder) -> None:
  """Writes the list of a folder's files into the folder."""
  folders.write_text(folder / FILE_LIST, json.dumps(list_files(folder)))


def _walk(folder: folders.Folder, prefix: str):
  for path in sorted(folder.iterdir(), key=lambda p: p.name):
    if path.is_dir():
      yield from _walk(path, f"{prefix}{path.name}/")
    elif prefix + path.name != FILE_LIST:
      yield prefix + path.name, path


def damaged_file(folder: folders.Folder) -> str | None:
  """Returns the first file under `folder` that differs from the list, and how.

  Returns None if none differs, or if there is no list.
  """
  try:
    listed = json.loads((folder / FILE_LIST).read_bytes())
  except FileNotFoundError:
    return None
  except (OSError, ValueError):
    return f"{FILE_LIST}: cannot be read"
  if not isinstance(listed, Mapping):
    return f"{FILE_LIST}: is not a list of files"
  files = list_files(folder)
  for name in sorted({*listed, *files}):
    if name not in files:
      return f"{name}: is missing"
    if files[name] != listed.get(name):
      return f"{name}: {_difference(listed.get(name), files[name])}"
  return None


def _difference(listed: Any, current: list[int]) -> str:
  if listed is None:
    return "was not there when it was saved"
  size = listed[0] if isinstance(listed, list) and listed else None
  if size != current[0]:
    return f"has {current[0]} bytes, not {size}"
  return "has other content than what was saved"


@contextlib.contextmanager
def raise_together():
  """Context that raises `Damaged` in all processes if reading fails in any."""
  error = None
  try:
    yield
  except (UserError, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
    raise  # not caused by a damaged checkpoint
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
  """Returns the message of the original cause, shortened."""
  while error.__cause__ is not None:
    error = error.__cause__
  words = " ".join(str(error).split())
  return f"{type(error).__name__}: {words[:200]}"
