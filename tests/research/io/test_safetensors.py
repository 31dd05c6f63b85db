"""The reader believes nothing; the writer agrees with the reference."""

import json
import pathlib
import random
import re
import time

import chex
import numpy as np
import pytest
import safetensors as package
import safetensors.numpy as reference

from research.io import safetensors
from research.typing import UserError
from tests.fuzz import mutations


def image(header, body=b"", length=None) -> bytes:
  """Returns a file with this header: an object, text, or raw bytes."""
  if not isinstance(header, str | bytes):
    header = json.dumps(header)
  raw = header.encode() if isinstance(header, str) else header
  length = len(raw) if length is None else length
  return length.to_bytes(8, "little") + raw + body


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
  return dict(dtype=dtype, shape=list(shape), data_offsets=list(offsets))


GOOD = image({"a": entry(), "b": entry((1, 3), (8, 14), "BF16")}, bytes(14))

HOSTILE = {
  "empty": b"",
  "short": b"1234567",
  "no header": (0).to_bytes(8, "little"),
  "header past the end": image("{}", length=1000),
  "header of 2**63": image("{}", length=2**63),
  "not json": image("{]"),
  "not an object": image("[1, 2]"),
  "not utf-8": image(b'{"\xff\xfe": 1}'),
  "deep": image("[" * 200_000),
  "deep inside": image('{"a":' * 50_000),
  "huge integer": image('{"a": ' + "9" * 10_000 + "}"),
  "nan": image('{"a": NaN}'),
  "twice": image('{"a": %s, "a": %s}' % ((json.dumps(entry()),) * 2), bytes(8)),
  "metadata of numbers": image({"__metadata__": {"a": 1}}),
  "entry is a list": image({"a": [1]}),
  "entry lacks shape": image({"a": dict(dtype="F32", data_offsets=[0, 4])}),
  "unknown dtype": image({"a": entry(dtype="F31")}, bytes(8)),
  "dtype is a list": image({"a": entry(dtype=["F32"])}, bytes(8)),
  "negative offset": image({"a": entry(offsets=(-8, 0))}, bytes(8)),
  "backwards": image({"a": entry(offsets=(8, 0))}, bytes(8)),
  "three offsets": image({"a": entry(offsets=(0, 4, 8))}, bytes(8)),
  "float offset": image({"a": entry(offsets=(0, 8.0))}, bytes(8)),
  "boolean size": image({"a": entry(shape=(True, 2))}, bytes(8)),
  "negative size": image({"a": entry(shape=(-1, -2))}, bytes(8)),
  "overflowing shape": image({"a": entry(shape=(2**33, 2**33))}, bytes(8)),
  "overflowing empty": image(
    {"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}
  ),
  "too many axes": image({"a": entry(shape=(1,) * 100, offsets=(0, 4))}),
  "extent of another size": image({"a": entry(offsets=(0, 4))}, bytes(4)),
  "overlap": image({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
  "hole": image({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
  "hole in front": image({"a": entry(offsets=(4, 12))}, bytes(12)),
  "truncated": GOOD[:-1],
  "trailing": GOOD + b"x",
}


@pytest.fixture
def file(tmp_path):
  return tmp_path / "x.safetensors"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_once(file, name):
  file.write_bytes(HOSTILE[name])
  start = time.perf_counter()
  with pytest.raises(UserError) as e:
    safetensors.open_file(file)
  assert time.perf_counter() - start < 1.0
  assert str(file) in str(e.value)
  assert len(str(e.value).split("\n")) <= 3


def test_every_truncation_is_refused(file):
  for n in range(len(GOOD)):
    file.write_bytes(GOOD[:n])
    with pytest.raises(UserError):
      safetensors.open_file(file)


def ours(path):
  """Returns what our reader finds in a file, or None if it refuses it."""
  try:
    found = safetensors.open_file(path)
  except UserError:
    return None
  return plain({name: tensor.read() for name, tensor in found.items()})


def theirs(path):
  """Returns what the package finds, or None; some errors are NumPy's."""
  try:
    with package.safe_open(path, "numpy") as file:
      return plain({name: file.get_tensor(name) for name in file.offset_keys()})
  except (package.SafetensorError, ValueError):
    return None


def plain(arrays):
  return {k: (x.dtype, x.shape, x.tobytes()) for k, x in arrays.items()}


def ours_after(file, raw):
  # A file of its own each time: the last one may still be mapped.
  file.unlink(missing_ok=True)
  file.write_bytes(raw)
  return ours(file)


def test_every_single_byte_changed_is_read_or_refused_as_by_the_package(file):
  assert ours_after(file, GOOD) is not None
  for i in range(len(GOOD)):
    for value in (0, 0x7F, 0xFF, GOOD[i] ^ 1):
      changed = GOOD[:i] + bytes([value]) + GOOD[i + 1 :]
      assert ours_after(file, changed) == theirs(file), changed


def test_what_we_read_of_damaged_files_the_package_reads_alike(file):
  folder = pathlib.Path(__file__).parents[2] / "golden" / "models"
  good, other = (
    (folder / name / "model.safetensors").read_bytes()
    for name in ("llama", "smollm2")
  )
  read = 0
  for seed in range(200):
    r = random.Random(seed)
    damage = r.choice((mutations.of_header, mutations.of_bytes))
    more = (other,) if damage is mutations.of_bytes else ()
    found = ours_after(file, damage(r, good, *more))
    read += found is not None
    # It reads more: entries with fields that the format does not have.
    assert found is None or found == theirs(file), seed
  assert 10 < read < 100


@pytest.mark.parametrize("name", HOSTILE)
def test_the_package_reads_one_of_the_hostile_files(file, name):
  file.write_bytes(HOSTILE[name])
  assert (theirs(file) is not None) == (name == "twice")


@pytest.fixture
def tensors():
  generator = np.random.default_rng(0)
  out = {
    f"{name.lower()}é": generator.integers(0, 2, (3, 2)).astype(dtype)
    for name, dtype in safetensors.DTYPES.items()
  }
  return out | {"scalar": np.array(1.5), "empty": np.zeros((0, 3), np.float32)}


def test_written_file_is_the_references_byte_for_byte(tmp_path, tensors):
  safetensors.write_file(tmp_path / "ours", tensors)
  reference.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
  ours, theirs = (tmp_path / n for n in ("ours", "theirs"))
  assert ours.read_bytes() == theirs.read_bytes()


def test_reads_what_the_reference_wrote_and_slices_lazily(file, tensors):
  reference.save_file(tensors, file)
  got = safetensors.open_file(file)
  assert set(got) == set(tensors)
  for name, want in tensors.items():
    assert got[name].dtype == want.dtype
    np.testing.assert_array_equal(got[name].read(), want)
  name = next(n for n in tensors if n.startswith("f32"))
  part = got[name].read((slice(1, 3), 0))
  np.testing.assert_array_equal(part, tensors[name][1:3, 0])
  assert part.base is not None  # a view of the mapping


def test_what_the_package_lacks_is_why_we_read_by_hand(file, tensors):
  """Once this fails, less is left to do by hand."""
  refusals = package.SafetensorError, AttributeError, TypeError
  lacking = {name for name in tensors if not reads(file, tensors, name)}
  assert {name[:4] for name in lacking} == {"f8_e"}
  reference.save_file({"a": np.zeros((3, 2))}, file)
  with package.safe_open(file, "numpy") as held:
    assert held.get_tensor("a").flags.writeable  # a copy
    for index in ((slice(None), [0]), slice(None, None, -1)):
      with pytest.raises(refusals):
        held.get_slice("a")[index]
  file.write_bytes(GOOD[:-1])
  with pytest.raises(package.SafetensorError) as e:
    package.safe_open(file, "numpy")
  assert file.name not in str(e.value)


def reads(file, tensors, name) -> bool:
  reference.save_file({name: tensors[name]}, file)
  with package.safe_open(file, "numpy") as held:
    try:
      found = held.get_tensor(name)
    except (package.SafetensorError, AttributeError, TypeError):
      return False
  np.testing.assert_array_equal(found, tensors[name])
  return True


@pytest.mark.skipif(
  not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's /proc"
)
def test_a_file_passes_through_in_pieces(file):
  """The package's mapping keeps in memory what was read of it."""
  safetensors.write_file(
    file, {f"{i}": np.full((1 << 20,), i, np.float32) for i in range(16)}
  )
  before, found = mapped_mib(), safetensors.open_file(file)
  for tensor in found.values():
    tensor.read().sum()
  assert mapped_mib() - before < 8
  with package.safe_open(file, "numpy") as held:
    for name in held.offset_keys():
      held.get_tensor(name)
    assert mapped_mib() - before > 48


def mapped_mib() -> float:
  """Returns the memory that pages of files take, on disk or in memory."""
  text = pathlib.Path("/proc/self/status").read_text("utf-8")
  found = re.findall(r"Rss(?:File|Shmem):\s*(\d+) kB", text)
  return sum(map(int, found)) / 1024


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
  with pytest.raises(UserError, match="cannot be written"):
    safetensors.write_file(tmp_path / "no" / "x", {"a": np.zeros(2)})
  chex.assert_equal(list(tmp_path.iterdir()), [])


def shard(tmp_path, name, keys):
  tensors = {k: np.zeros(2, np.float32) for k in keys}
  safetensors.write_file(tmp_path / name, tensors)


def index(tmp_path, where):
  text = json.dumps({"weight_map": where})
  (tmp_path / safetensors.INDEX).write_text(text)


def test_sharded_directory(tmp_path):
  shard(tmp_path, "1.safetensors", ["a"])
  shard(tmp_path, "2.safetensors", ["b", "c"])
  where = dict(a="1.safetensors", b="2.safetensors", c="2.safetensors")
  index(tmp_path, where)
  assert set(safetensors.open_directory(tmp_path)) == {"a", "b", "c"}


@pytest.mark.parametrize(
  "where, message",
  [
    (dict(a="../1.safetensors"), "plain name"),
    (dict(a="/etc/1.safetensors"), "plain name"),
    (dict(a="a\\1.safetensors"), "plain name"),
    (dict(a=".safetensors"), "plain name"),
    (dict(a="1.bin"), "plain name"),
    (dict(a=1), "plain name"),
    ({}, "missing or empty"),
    (dict(a="3.safetensors"), "cannot be read"),
    (dict(a="1.safetensors", z="1.safetensors"), "not in both: z"),
    (dict(a="2.safetensors"), "not in both"),
  ],
)
def test_bad_indexes(tmp_path, where, message):
  shard(tmp_path, "1.safetensors", ["a"])
  shard(tmp_path, "2.safetensors", ["a", "b"])
  index(tmp_path, where)
  with pytest.raises(UserError, match=message):
    safetensors.open_directory(tmp_path)


def test_pickles_are_not_read(tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(b"x")
  with pytest.raises(UserError, match="pickle"):
    safetensors.open_directory(tmp_path)
