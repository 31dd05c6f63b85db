"""The safetensors format: a bounds-checked reader and a writer.

An 8-byte little-endian length, that many bytes of JSON, then the tensors
without holes or overlap. Files may come from strangers: nothing here
allocates what a header merely claims, and every extent is checked against the
file before any tensor is read. A tensor is mapped when it is read, so
opening costs no memory and reading a slice touches only its pages.

Read by hand, since the package `safetensors` (0.8) reads no float8 as NumPy,
takes a header that names a tensor twice, has no slices by arrays or backwards,
names no file in its errors, and copies each tensor out of a mapping of the
whole file, which stays in memory. Both read or refuse damaged files alike, but
for more that is refused here: `test_safetensors.py` compares all of this.
"""

import dataclasses
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from research import progress
from research.io import mapped
from research.typing import UserError, WriteError

Path = str | os.PathLike

MAX_HEADER = 100_000_000
"""Bytes of JSON, as in the reference implementation."""

MAX_NDIM = 8

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_SIZE = 5_000_000_000
"""Bytes of tensors a file holds at most, unless a single one is larger."""

DTYPES: dict[str, np.dtype] = {
  name: np.dtype(t)
  for name, t in {
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
    "F32": "<f4",
    "U32": "<u4",
    "I32": "<i4",
    "BF16": ml_dtypes.bfloat16,
    "F16": "<f2",
    "U16": "<u2",
    "I16": "<i2",
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
  }.items()
}
"""In the order that the reference implementation writes tensors in."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Lazy:
  """A tensor of a file.

  Attributes:
    shape, dtype: as the file states them, checked against its size.
    file: for messages.
    raw: its bytes, unread.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  file: str
  raw: mapped.Bytes = dataclasses.field(repr=False)

  def read(self, index: Any = ...) -> np.ndarray:
    """Returns `tensor[index]`, a read-only view where the index allows it."""
    return self.raw.array().view(self.dtype).reshape(self.shape)[index]


def _check(condition: bool, path: Path, found: str, expected: str) -> None:
  if not condition:
    raise UserError(
      f"{path}: {found}; expected {expected}.\n"
      "The file is damaged or not safetensors: download or convert it again."
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  out = dict(pairs)
  if len(out) != len(pairs):
    raise ValueError("a key occurs twice")
  return out


def _no_constant(name: str) -> None:
  raise ValueError(f"{name} is not JSON")


def read_json(path: Path, raw: bytes | None = None) -> dict[str, Any]:
  """Returns the JSON object in a file, or in `raw`, a part of it.

  Raises:
    UserError: it cannot be read, is not an object, nests too deep, or repeats
      a key.
  """
  try:
    if raw is None:
      if pathlib.Path(path).stat().st_size > MAX_HEADER:
        raise ValueError(f"more than {MAX_HEADER} bytes")
      raw = pathlib.Path(path).read_bytes()
    value = json.loads(
      raw.decode("utf-8"),
      object_pairs_hook=_unique,
      parse_constant=_no_constant,
    )
  except OSError as e:
    raise UserError(f"{path}: cannot be read ({e.strerror})") from e
  except (ValueError, RecursionError) as e:
    reason = str(e).split("\n")[0][:120]
    raise UserError(f"{path}: not valid JSON: {reason}") from e
  if not isinstance(value, dict):
    kind = type(value).__name__
    raise UserError(f"{path}: found a JSON {kind}, expected an object")
  return value


def _opened(path: Path) -> mapped.Bytes:
  try:
    data = mapped.open_bytes(path)
  except OSError as e:
    raise UserError(f"{path}: cannot be read ({e.strerror})") from e
  _check(data.size >= 8, path, f"{data.size} bytes", "at least 8")
  return data


def _naturals(x: Any) -> bool:
  return isinstance(x, list) and all(type(n) is int and n >= 0 for n in x)


def _entry(path: Path, name: str, entry: Any) -> tuple[str, list, list]:
  ok = isinstance(entry, dict) and set(entry) == {
    "dtype",
    "shape",
    "data_offsets",
  }
  found = f"tensor {name[:80]!r} is {str(entry)[:80]}"
  _check(ok, path, found, "dtype, shape and data_offsets")
  dtype, shape, extent = entry["dtype"], entry["shape"], entry["data_offsets"]
  known = isinstance(dtype, str) and dtype in DTYPES
  _check(known, path, found, f"a dtype of {', '.join(DTYPES)}")
  # Past the second bound an empty array's other axes could overflow.
  sane = _naturals(shape) and len(shape) <= MAX_NDIM
  sane = sane and math.prod(max(n, 1) for n in shape) < 2**60
  _check(sane, path, found, f"at most {MAX_NDIM} sizes >= 0")
  pair = _naturals(extent) and len(extent) == 2
  _check(pair, path, found, "two offsets >= 0")
  return dtype, shape, extent


def open_file(path: Path) -> dict[str, Lazy]:
  """Returns the tensors of one file by name.

  Raises:
    UserError: the file cannot be read, or any part of its header disagrees
      with any other part or with the file's size.
  """
  return open_with_metadata(path)[0]


def open_with_metadata(path: Path) -> tuple[dict[str, Lazy], dict[str, str]]:
  """Returns the tensors of one file, and the texts of its header, by name.

  Raises:
    UserError: as `open_file`.
  """
  data = _opened(path)
  length = int.from_bytes(data.part(0, 8).array().tobytes(), "little")
  limit = min(data.size - 8, MAX_HEADER)
  found = f"a header of {length} bytes in a file of {data.size}"
  _check(2 <= length <= limit, path, found, f"2 to {limit}")
  header = read_json(path, data.part(8, 8 + length).array().tobytes())
  metadata = header.pop("__metadata__", {})
  texts = isinstance(metadata, dict) and all(
    isinstance(v, str) for v in metadata.values()
  )
  _check(texts, path, "__metadata__ of another kind", "texts by name")
  body, out, end = data.part(8 + length, data.size), {}, 0
  entries = {name: _entry(path, name, e) for name, e in header.items()}
  for name, (dtype, shape, (begin, stop)) in sorted(
    entries.items(), key=lambda item: (item[1][2], item[0])
  ):
    found = f"tensor {name[:80]!r} at bytes {begin} to {stop} of {body.size}"
    _check(begin == end, path, found, f"it to start at {end}")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    _check(stop - begin == size, path, found, f"{size} bytes for {shape}")
    _check(stop <= body.size, path, found, "it to lie inside the file")
    raw = body.part(begin, stop)
    out[name] = Lazy(tuple(shape), DTYPES[dtype], str(path), raw)
    end = stop
  _check(end == body.size, path, f"{body.size} bytes of data", str(end))
  return {name: out[name] for name in header}, metadata


def _index(path: pathlib.Path) -> dict[str, str]:
  where = read_json(path).get("weight_map")
  if not isinstance(where, dict) or not where:
    raise UserError(f"{path}: weight_map is missing or empty")
  for name, file in where.items():
    plain = isinstance(file, str) and file.endswith(".safetensors")
    if not plain or set(file) & set("/\\\0:") or file.startswith("."):
      raise UserError(
        f"{path}: weight_map places {name[:80]!r} in {str(file)[:80]!r}; "
        "expected the plain name of a .safetensors file beside it"
      )
  return where


def open_directory(directory: Path) -> dict[str, Lazy]:
  """Returns the tensors of a model's directory, sharded or not, by name.

  Raises:
    UserError: there are no safetensors files, or the index and its files
      disagree.
  """
  directory = pathlib.Path(directory)
  if (directory / SINGLE).is_file():
    return open_file(directory / SINGLE)
  index = directory / INDEX
  if not index.is_file():
    pickles = sorted(p.name for p in directory.glob("*.bin"))
    hint = (
      f"{pickles[0]} is a pickle, which can run code and is not read"
      if pickles
      else "expected it or model.safetensors.index.json"
    )
    raise UserError(
      f"{directory}: no {SINGLE}; {hint}.\n"
      "Save the model with transformers' save_pretrained(...) and retry."
    )
  where, out = _index(index), {}
  for file in sorted(set(where.values())):
    tensors = open_file(directory / file)
    claimed = {name for name, f in where.items() if f == file}
    difference = sorted(claimed ^ set(tensors))
    if difference:
      raise UserError(
        f"{directory / file}: {len(difference)} tensors are either in the "
        f"file or in the index, not in both: {', '.join(difference[:10])}"
      )
    out |= tensors
  return out


@dataclasses.dataclass(frozen=True)
class Pending:
  """A tensor to be written: made when its turn comes, and then forgotten.

  Attributes:
    shape, dtype: of what `make` returns.
    make: called once.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray] = dataclasses.field(repr=False)

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def array(self) -> np.ndarray:
    """Returns the values, of the announced shape and type."""
    x = np.asarray(self.make())
    if (x.shape, x.dtype) != (self.shape, self.dtype):
      raise ValueError(f"announced {self.shape} {self.dtype}, made {x.shape}")
    return x


def _pending(x: Any) -> Pending:
  if isinstance(x, Pending):
    return x
  x = np.asarray(x)
  return Pending(x.shape, x.dtype, lambda: x)


def write_file(
  path: Path,
  tensors: Mapping[str, np.ndarray | Pending],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes `tensors`; the file appears whole or not at all.

  Args:
    path: of the file; an existing one is replaced.
    tensors: by name, of any dtype in `DTYPES`; one at a time is in memory.
    metadata: texts; by default `{"format": "pt"}`, which other readers want.

  Raises:
    UserError: it cannot be written.
  """
  arrays = {k: _pending(v) for k, v in tensors.items()}
  order = list(DTYPES)
  names = sorted(
    arrays, key=lambda k: (order.index(_NAMES[arrays[k].dtype]), k)
  )
  header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
  start = 0
  for name in names:
    x = arrays[name]
    extent = [start, start + x.nbytes]
    header[name] = dict(
      dtype=_NAMES[x.dtype], shape=list(x.shape), data_offsets=extent
    )
    start += x.nbytes
  raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
  raw += b" " * (-len(raw) % 8)
  path, temporary = pathlib.Path(path), None
  try:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as f:
      temporary = pathlib.Path(f.name)
      f.write(len(raw).to_bytes(8, "little") + raw)
      for name in progress.track(names, f"writing tensors of {path.name}"):
        x = np.ascontiguousarray(arrays[name].array())
        f.write(x.reshape(-1).view(np.uint8))
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except OSError as e:
    raise WriteError(f"{path}: cannot be written ({e.strerror})") from e
  finally:
    if temporary is not None:
      temporary.unlink(missing_ok=True)


def write_directory(
  directory: Path,
  tensors: Mapping[str, np.ndarray | Pending],
  shard_size: int = SHARD_SIZE,
) -> list[str]:
  """Writes a model's tensors as Hugging Face does; returns the file names.

  Args:
    directory: exists, and holds no model yet.
    tensors: by name; cut into files in this order.
    shard_size: bytes of tensors a file holds at most; more than one file
      brings an index.

  Raises:
    UserError: it cannot be written.
  """
  directory = pathlib.Path(directory)
  shards: list[dict[str, Pending]] = [{}]
  size = 0
  for name, x in ((k, _pending(v)) for k, v in tensors.items()):
    if shards[-1] and size + x.nbytes > shard_size:
      shards.append({})
      size = 0
    shards[-1][name] = x
    size += x.nbytes
  if len(shards) == 1:
    write_file(directory / SINGLE, shards[0])
    return [SINGLE]
  files, where = [], {}
  for i, shard in enumerate(shards):
    file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    write_file(directory / file, shard)
    files.append(file)
    where |= dict.fromkeys(shard, file)
  total = sum(x.nbytes for shard in shards for x in shard.values())
  index = dict(metadata=dict(total_size=total), weight_map=where)
  write_json(directory / INDEX, index)
  return [*files, INDEX]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
  """Writes a JSON object as Hugging Face's files are written.

  Raises:
    UserError: it cannot be written.
  """
  text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
  try:
    pathlib.Path(path).write_text(text, encoding="utf-8")
  except OSError as e:
    raise WriteError(f"{path}: cannot be written ({e.strerror})") from e
