"""GGUF containers, read without trusting a byte of them, and written.

Versions 2 and 3, little endian. Every length and offset is checked against
what is left of the file before anything is sized by it, so a truncated or
hostile file costs milliseconds and ends in one clear error.
"""

import dataclasses
import math
import os
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np

from research import progress
from research.interop.gguf.tensor_types import BY_ID, TYPES, decode
from research.io import mapped
from research.typing import UserError, WriteError

MAGIC = b"GGUF"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""ggml's types that are plain numbers -> their names here."""

_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 16
_MAX_NAME = 1 << 16
_SCALARS = {
  0: "<u1",
  1: "<i1",
  2: "<u2",
  3: "<i2",
  4: "<u4",
  5: "<i4",
  6: "<f4",
  7: "?",
  10: "<u8",
  11: "<i8",
  12: "<f8",
}
_IDS = {np.dtype(v): k for k, v in _SCALARS.items()}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One stored tensor.

  Attributes:
    type: ggml's name of its type.
    shape: outermost axis first, as numpy has it (GGUF's dims reversed).
    stored: its bytes: uint8 of one dimension, or unread in a file.
  """

  type: str
  shape: tuple[int, ...]
  stored: np.ndarray | mapped.Bytes = dataclasses.field(repr=False)

  @property
  def data(self) -> np.ndarray:
    """Its bytes, uint8 of one dimension; mapped while the view exists."""
    if isinstance(self.stored, mapped.Bytes):
      return self.stored.array()
    return self.stored

  def rows(self) -> np.ndarray:
    return self.data.reshape(math.prod(self.shape[:-1]), -1)

  def decode(self) -> np.ndarray:
    return decode(self.type, self.data, self.shape)

  def expert(self, number: int) -> "Tensor":
    """Returns one matrix of a stack; no byte is read."""
    count, *shape = self.shape
    size = self.stored.size // count
    start, stop = number * size, (number + 1) * size
    if isinstance(self.stored, mapped.Bytes):
      stored = self.stored.part(start, stop)
    else:
      stored = self.stored[start:stop]
    return Tensor(self.type, tuple(shape), stored)


@dataclasses.dataclass(frozen=True)
class Pending:
  """A tensor to be written: made when its turn comes, and then forgotten.

  Attributes:
    type, shape: as `Tensor`'s.
    make: returns its bytes, uint8 of one dimension; called once.
  """

  type: str
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray] = dataclasses.field(repr=False)

  @property
  def data(self) -> np.ndarray:
    return self.make()


@dataclasses.dataclass(frozen=True)
class GGUF:
  """A file's contents.

  Attributes:
    metadata: key to Python value; an array of numbers is a numpy array, one
      of strings a list.
    tensors: name to tensor, in the file's order.
  """

  metadata: dict[str, Any]
  tensors: dict[str, Tensor]


class _Reader:
  """A cursor over mapped bytes that never leaves them."""

  def __init__(self, path: pathlib.Path, source: mapped.Bytes):
    self.path, self.source, self.size = path, source, source.size
    self.buffer, self.at = memoryview(source.array()), 0

  def fail(self, where: str, found: str, expected: str) -> NoReturn:
    raise UserError(
      f"{self.path}: {where}: found {found}, expected {expected}\n"
      "the file is damaged or not a GGUF file; download or convert it again"
    )

  def skip(self, count: int, where: str) -> int:
    """Returns where `count` bytes start, after checking that they exist."""
    start, left = self.at, self.size - self.at
    if count > left:
      self.fail(where, f"{count} bytes", f"at most the {left} that are left")
    self.at += count
    return start

  def number(self, form: str, where: str) -> Any:
    start = self.skip(struct.calcsize(form), where)
    return struct.unpack_from(form, self.buffer, start)[0]

  def string(self, where: str, limit: int | None = None) -> str:
    length = self.number("<Q", where)
    if limit is not None and length > limit:
      self.fail(where, f"a name of {length} bytes", f"at most {limit}")
    start = self.skip(length, where)
    try:
      return str(self.buffer[start : start + length], "utf-8")
    except UnicodeDecodeError:
      self.fail(where, "bytes that are not UTF-8", "text")

  def array(self, form: np.dtype, count: int, where: str) -> np.ndarray:
    start = self.skip(count * form.itemsize, where)
    return np.frombuffer(self.buffer, form, count, start)

  def value(self, where: str) -> Any:
    kind = self.number("<I", where)
    if kind == _STRING:
      return self.string(where)
    if kind == _ARRAY:
      return self._array_value(where)
    if kind not in _SCALARS:
      self.fail(where, f"value type {kind}", "one of 0 to 12")
    return self._numbers(kind, 1, where)[0].item()

  def _array_value(self, where: str) -> Any:
    kind, count = self.number("<I", where), self.number("<Q", where)
    if kind != _STRING and kind not in _SCALARS:
      self.fail(where, f"an array of type {kind}", "numbers or strings")
    if kind == _STRING:
      if count * 8 > self.size - self.at:  # each has at least its length
        self.fail(where, f"{count} strings", "as many as the file can hold")
      return self._strings(count, where)
    return self._numbers(kind, count, where)

  def _strings(self, count: int, where: str) -> list[str]:
    """Reads strings without a call for each: a vocabulary has 100,000."""
    length, found = struct.Struct("<Q").unpack_from, []
    try:
      for _ in range(count):
        start = self.at + 8
        end = start + length(self.buffer, self.at)[0]
        if end > self.size:
          break
        found.append(str(self.buffer[start:end], "utf-8"))
        self.at = end
    except (struct.error, UnicodeDecodeError):
      pass
    # What could not be read is read again, by what says why.
    return found + [self.string(where) for _ in range(count - len(found))]

  def _numbers(self, kind: int, count: int, where: str) -> np.ndarray:
    if kind != 7:
      return self.array(np.dtype(_SCALARS[kind]), count, where)
    bits = self.array(np.dtype("u1"), count, where)
    if count and bits.max() > 1:
      self.fail(where, f"{bits.max()} as a truth value", "0 or 1")
    return bits.astype(bool)


def open_gguf(path: str | os.PathLike) -> GGUF:
  """Maps a GGUF file and checks its header; reads no tensor.

  Raises:
    UserError: there is no such file, or any field of it is not as it must be.
  """
  path = pathlib.Path(path)
  try:
    source = mapped.open_bytes(path)
  except OSError as error:
    raise UserError(f"{path}: {error.strerror}; expected a GGUF file") from None
  if source.size < 24:
    raise UserError(f"{path}: shorter than a GGUF header; expected 24 bytes")
  read = _Reader(path, source)
  magic = bytes(read.buffer[: read.skip(4, "magic") + 4])
  if magic != MAGIC:
    read.fail("magic", repr(magic), repr(MAGIC))
  version = read.number("<I", "version")
  if version not in (2, 3):
    read.fail("version", f"{version:#x}", "2 or 3, little endian")
  tensors, keys = read.number("<Q", "header"), read.number("<Q", "header")
  metadata: dict[str, Any] = {}
  for i in range(keys):
    key = read.string(f"key {i} of {keys}", _MAX_NAME)
    if key in metadata:
      read.fail(f"key {i}", f"{key!r} again", "a new name")
    metadata[key] = read.value(f"value of {key!r}")
  infos = [_tensor_info(read, i, tensors) for i in range(tensors)]
  return GGUF(metadata, _place(read, infos, _alignment(read, metadata)))


def _alignment(read: _Reader, metadata: Mapping[str, Any]) -> int:
  found = metadata.get("general.alignment", _ALIGNMENT)
  if (
    not isinstance(found, int)
    or not 8 <= found <= _MAX_ALIGNMENT
    or found & (found - 1)
  ):
    read.fail("general.alignment", repr(found)[:40], "a power of 2 from 8 on")
  return found


def _tensor_info(read: _Reader, i: int, count: int):
  name = read.string(f"name of tensor {i} of {count}", _MAX_NAME)
  where = f"tensor {name!r}"
  rank = read.number("<I", where)
  if not 1 <= rank <= 4:
    read.fail(where, f"{rank} dimensions", "1 to 4")
  shape = tuple(read.number("<Q", where) for _ in range(rank))[::-1]
  kind_id = read.number("<I", where)
  offset = read.number("<Q", where)
  if kind_id not in BY_ID:
    read.fail(where, f"ggml type {kind_id}", f"one of {', '.join(TYPES)}")
  kind = BY_ID[kind_id]
  if 0 in shape or shape[-1] % kind.block:
    read.fail(
      where,
      f"shape {shape} in {kind.name}",
      f"rows of a multiple of {kind.block} weights",
    )
  nbytes = math.prod(shape) // kind.block * kind.nbytes
  if nbytes > read.size:
    read.fail(where, f"{nbytes} bytes", f"a part of the file's {read.size}")
  return name, kind, shape, nbytes, offset


def _place(read: _Reader, infos: list, alignment: int) -> dict[str, Tensor]:
  """Returns the tensors, unread, having checked where they lie."""
  start = read.at + -read.at % alignment
  tensors: dict[str, Tensor] = {}
  for name, kind, shape, nbytes, offset in infos:
    where = f"tensor {name!r}"
    if name in tensors:
      read.fail(where, "the name again", "a new name")
    if offset % alignment:
      read.fail(where, f"offset {offset}", f"a multiple of {alignment}")
    if start + offset + nbytes > read.size:
      read.fail(
        where,
        f"its end at byte {start + offset + nbytes}",
        f"at most the file's {read.size}",
      )
    data = read.source.part(start + offset, start + offset + nbytes)
    tensors[name] = Tensor(kind.name, shape, data)
  end, last = 0, ""
  for name, _, _, nbytes, offset in sorted(infos, key=lambda info: info[4]):
    if offset < end:
      read.fail(f"tensor {name!r}", f"it overlaps {last!r}", "bytes of its own")
    end, last = offset + nbytes, name
  return tensors


def _string_bytes(text: str) -> bytes:
  data = text.encode("utf-8")
  return struct.pack("<Q", len(data)) + data


def _typed(value: Any) -> np.ndarray:
  """Returns numbers in the type GGUF files use for Python's own."""
  x = np.asarray(value)
  if isinstance(value, np.generic | np.ndarray) or x.dtype == bool:
    return x
  if x.dtype.kind == "f":
    return x.astype("<f4")
  preferred = ("<i4", "<i8") if x.ndim else ("<u4", "<i4", "<u8", "<i8")
  for form in preferred:
    if x.dtype.kind in "iu" and np.array_equal(x.astype(form), x):
      return x.astype(form)
  raise UserError(f"{value!r} is not a value that GGUF metadata can hold")


def _value_bytes(value: Any) -> bytes:
  if isinstance(value, str):
    return struct.pack("<I", _STRING) + _string_bytes(value)
  if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
    head = struct.pack("<IIQ", _ARRAY, _STRING, len(value))
    return head + b"".join(map(_string_bytes, value))
  x = _typed(value)
  form = x.dtype.newbyteorder("<")
  if form not in _IDS or x.ndim > 1:
    raise UserError(f"{value!r} is not a value that GGUF metadata can hold")
  data = x.astype(form).tobytes()
  if x.ndim == 0:
    return struct.pack("<I", _IDS[form]) + data
  return struct.pack("<IIQ", _ARRAY, _IDS[form], x.size) + data


def nbytes(kind: str, shape: tuple[int, ...]) -> int:
  """Returns how many bytes a tensor of a type and shape has."""
  return math.prod(shape) // TYPES[kind].block * TYPES[kind].nbytes


def write_gguf(
  path: str | os.PathLike,
  metadata: Mapping[str, Any],
  tensors: Mapping[str, Tensor | Pending],
) -> None:
  """Writes a version 3 file, whole or not at all.

  Args:
    metadata: key to str, bool, int (stored as uint32 where it fits), float
      (float32), a list of one of these (ints as int32), or numpy values,
      which keep their own type.
    tensors: name to tensor; one pending one at a time is in memory.

  Raises:
    UserError: a value that GGUF cannot hold, or a path that cannot be written.
  """
  path = pathlib.Path(path)
  alignment = int(metadata.get("general.alignment", _ALIGNMENT))
  head = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
  for key, value in metadata.items():
    head += [_string_bytes(key), _value_bytes(value)]
  offset = 0
  for name, t in tensors.items():
    rank = len(t.shape)
    head += [
      _string_bytes(name),
      struct.pack(f"<I{rank}QI", rank, *t.shape[::-1], TYPES[t.type].id),
      struct.pack("<Q", offset),
    ]
    size = nbytes(t.type, t.shape)
    offset += size + -size % alignment
  header = b"".join(head)
  partial = path.with_name(path.name + ".partial")
  try:
    with partial.open("wb") as file:
      file.write(header + bytes(-len(header) % alignment))
      what = f"writing tensors of {path.name}"
      for name, t in progress.track(tensors.items(), what):
        data = np.ascontiguousarray(t.data)
        if data.nbytes != nbytes(t.type, t.shape):
          raise ValueError(f"{name}: {data.nbytes} bytes for {t}")
        file.write(data)
        file.write(bytes(-data.nbytes % alignment))
    partial.replace(path)
  except OSError as error:
    raise WriteError(f"{path}: cannot write: {error.strerror}") from None
  finally:
    partial.unlink(missing_ok=True)
