"""Pre-tokenised data: `.npy` and uncompressed `.npz` files of token ids.

Files are untrusted: nothing is unpickled, and each array's size is checked
against the file before it is memory-mapped.

* `.npy`, 1-D: one document. 2-D: each row is a document.
* `.npz`: `tokens` [N]; `offsets` [M + 1], the document boundaries, increasing
  from 0 to N; optionally `learned` [N] (0 or 1), the loss mask.
"""

import dataclasses
import math
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from research.data.examples import Example
from research.data.sources import files_sha256
from research.typing import UserError

_CHUNK = 1 << 20
_NAMES = ("tokens", "offsets", "learned")


@dataclasses.dataclass(frozen=True)
class Arrays:
  """Documents of token ids in a file.

  Attributes:
    path: a `.npy` or `.npz` file, see the module's docstring.
    vocab: ids must be below it; None for the tokenizer's size, or no limit.
  """

  path: str
  vocab: int | None = None

  @property
  def sha256(self) -> str | None:
    """A hash of the file, to identify it; see `files_sha256`."""
    return files_sha256(self.path)

  def check_files(self) -> None:
    """Raises UserError if the file is missing, malformed or truncated.

    Its ids are compared with the tokenizer's by `examples`.
    """
    found = read(self.path)
    if "offsets" in found:
      _check_offsets(self.path, found["offsets"], found["tokens"].size)

  def examples(self, tokenizer: Any) -> Sequence[Example]:
    """Returns the documents; their tokens are memory-mapped."""
    found = read(self.path)
    tokens = found["tokens"]
    vocab = self.vocab or getattr(tokenizer, "vocab_size", 2**31)
    _check_ids(f"{self.path}: tokens", tokens, vocab)
    flat = tokens.reshape(-1)
    if tokens.ndim == 2 and "offsets" not in found:
      offsets = np.arange(0, flat.size + 1, tokens.shape[1])
    else:
      offsets = found.get("offsets", np.array([0, flat.size]))
    _check_offsets(self.path, offsets, flat.size)
    learned = found.get("learned")
    if learned is not None:
      _check_learned(self.path, learned, flat.size)
    return [
      Example(
        flat[start:stop],
        np.ones(stop - start, bool) if learned is None else learned[start:stop],
      )
      for start, stop in zip(offsets[:-1], offsets[1:], strict=True)
    ]


def read(path: str) -> dict[str, np.ndarray]:
  """Memory-maps the arrays `tokens`, `offsets` and `learned` of a file.

  Raises:
    UserError: the file is malformed or truncated.
  """
  try:
    with pathlib.Path(path).open("rb") as file:
      magic = file.read(4)
      if magic == b"PK\x03\x04":
        return _archive(path, file)
      return {"tokens": _mapped(path, file, 0, _size(file))}
  except OSError as error:
    raise UserError(
      f"{path}: cannot be read ({error.strerror or error}).\n"
      "Expected an .npy or .npz file; check the path."
    ) from error


def _size(file: BinaryIO) -> int:
  return file.seek(0, 2)


def _archive(path: str, file: BinaryIO) -> dict[str, np.ndarray]:
  try:
    members = zipfile.ZipFile(file).infolist()
  except Exception as error:  # fuzzing shows many exception types
    raise _broken(path, f"is not a complete zip archive: {error}") from error
  found = {}
  for member in members:
    name = member.filename.removesuffix(".npy")
    if name not in _NAMES:
      raise _broken(path, f"holds {name[:40]!r}")
    if name in found:
      raise _broken(path, f"holds {name!r} twice")
    if member.compress_type != zipfile.ZIP_STORED:
      raise UserError(
        f"{path}: {name}: is compressed, so it cannot be mapped.\n"
        "Write it with np.savez instead of np.savez_compressed."
      )
    # The local header repeats the name and has its own extra-field length.
    file.seek(member.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
      raise _broken(path, f"has no {name} at the offset in its index")
    lengths = header[26:28], header[28:30]
    start = member.header_offset + 30
    start += sum(int.from_bytes(x, "little") for x in lengths)
    found[name] = _mapped(
      f"{path}: {name}", file, start, start + member.file_size
    )
  if "tokens" not in found:
    raise _broken(path, "holds no array 'tokens'")
  return found


def _mapped(where: str, file: BinaryIO, start: int, stop: int) -> np.ndarray:
  """Returns the array in bytes [start, stop) of a file."""
  if stop > _size(file):
    raise _broken(where, "ends beyond the end of the file")
  file.seek(start)
  try:
    version = np.lib.format.read_magic(file)
    if version != (1, 0):  # later versions are for structured dtypes
      raise ValueError(f"format version {version}")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
  except Exception as error:  # numpy evaluates Python literals in the header
    text = str(error).splitlines()[0][:120] if str(error) else "?"
    raise _broken(where, f"is not an array: {text}") from error
  if dtype.kind not in "iub" or dtype.hasobject or fortran:
    raise _broken(where, f"has type {dtype}" + ", Fortran order" * fortran)
  if not 1 <= len(shape) <= 2 or min(shape) < 0:
    raise _broken(where, f"has shape {shape}")
  size = math.prod(shape) * dtype.itemsize
  place = file.tell()
  if place + size > stop:
    raise _broken(
      where, f"claims {size:,} bytes, found {max(stop - place, 0):,}"
    )
  if not size:
    raise _broken(where, f"is empty, of shape {shape}")
  return np.memmap(file, dtype, "r", offset=place, shape=tuple(shape))


def _broken(where: str, what: str) -> UserError:
  return UserError(
    f"{where}: {what}.\n"
    "Expected token ids: an .npy of integers [N] or [M, T], or an .npz with"
    " tokens [N], offsets [M + 1] and optionally learned [N]."
  )


def _check_ids(where: str, tokens: np.ndarray, vocab: int) -> None:
  if tokens.dtype.kind == "b":
    raise _broken(where, "has type bool")
  flat = tokens.reshape(-1)
  for start in range(0, flat.size, _CHUNK):
    part = flat[start : start + _CHUNK]
    for i in (int(part.argmin()), int(part.argmax())):
      if not 0 <= int(part[i]) < vocab:
        raise UserError(
          f"{where}: found id {part[i]} at index {start + i}, expected ids from"
          f" 0 to {vocab - 1}: are they of this model's tokenizer?"
        )


def _check_offsets(path: str, offsets: np.ndarray, count: int) -> None:
  """Raises UserError unless offsets increase from 0 to `count`."""
  if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or len(offsets) < 2:
    raise _broken(
      f"{path}: offsets", f"has type {offsets.dtype}, shape {offsets.shape}"
    )
  rises = (offsets[1:] > offsets[:-1]).all()
  if not rises or offsets[0] != 0 or offsets[-1] != count:
    raise UserError(
      f"{path}: offsets: found {offsets[0]} ... {offsets[-1]}"
      f"{'' if rises else ', not increasing'}.\n"
      f"Expected numbers that increase from 0 to the {count} tokens."
    )


def _check_learned(path: str, learned: np.ndarray, count: int) -> None:
  if learned.shape != (count,) or not np.isin(learned, (0, 1)).all():
    raise _broken(
      f"{path}: learned",
      f"has shape {learned.shape} for {count} tokens, or values not 0 and 1",
    )
