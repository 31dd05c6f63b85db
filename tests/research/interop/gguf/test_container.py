"""GGUF containers: the gguf package's files, ours, and hostile ones."""

import pathlib
import struct
import time

import numpy as np
import pytest

from research.interop import gguf
from research.interop.gguf import Tensor, open_gguf, write_gguf
from research.typing import UserError

MODELS = pathlib.Path(__file__).parents[3] / "golden" / "models"
FILES = sorted(MODELS.glob("gguf_*/model.gguf"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.parent.name)
def test_a_file_of_the_gguf_package_is_written_again_byte_for_byte(
  path, tmp_path
):
  file = open_gguf(path)
  copy = tmp_path / "copy.gguf"
  write_gguf(copy, file.metadata, file.tensors)
  assert copy.read_bytes() == path.read_bytes()
  assert [p.name for p in tmp_path.iterdir()] == ["copy.gguf"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.parent.name)
def test_values_are_those_of_the_gguf_package(path):
  file = open_gguf(path)
  with np.load(path.with_name("golden.npz")) as golden:
    for name, hf in {
      "token_embd.weight": "model.embed_tokens.weight",
      "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
      "output_norm.weight": "model.norm.weight",
    }.items():
      np.testing.assert_array_equal(
        file.tensors[name].decode(), golden[f"w/{hf}"]
      )


def test_metadata_of_every_type_comes_back(tmp_path):
  metadata = {
    "u8": np.uint8(200),
    "i8": np.int8(-3),
    "u16": np.uint16(60_000),
    "i16": np.int16(-5),
    "u32": 7,
    "i32": -7,
    "u64": 1 << 40,
    "i64": -(1 << 40),
    "f32": 0.5,
    "f64": np.float64(0.1),
    "yes": True,
    "text": "größer",
    "strings": ["a", "", "ß"],
    "ints": [1, -2],
    "floats": np.array([0.5, -1.5], np.float32),
    "bools": np.array([True, False]),
    "empty": np.zeros(0, np.int32),
  }
  write_gguf(tmp_path / "x.gguf", metadata, {})
  back = open_gguf(tmp_path / "x.gguf").metadata
  assert list(back) == list(metadata)
  for key, value in metadata.items():
    got = back[key]
    if isinstance(got, np.ndarray):
      np.testing.assert_array_equal(got, np.asarray(value))
    else:
      want = value.item() if isinstance(value, np.generic) else value
      assert got == want
      assert type(got) is type(want)


def pack(text: bytes) -> bytes:
  return struct.pack("<Q", len(text)) + text


def info(name=b"w", dims=(32, 2), kind=3, offset=0) -> bytes:
  return (
    pack(name)
    + struct.pack("<I", len(dims))
    + struct.pack(f"<{len(dims)}Q", *dims)
    + struct.pack("<IQ", kind, offset)
  )


def build(
  keys=(), infos=(), data=64, version=3, magic=b"GGUF", counts=None
) -> bytes:
  tensors, pairs = counts or (len(infos), len(keys))
  head = magic + struct.pack("<IQQ", version, tensors, pairs)
  head += b"".join(keys) + b"".join(infos)
  return head + bytes(-len(head) % 32) + bytes(data)


def key(name: bytes, kind: int, value: bytes) -> bytes:
  return pack(name) + struct.pack("<I", kind) + value


HUGE = 1 << 62
ALIGNMENT = b"general.alignment"
HOSTILE = {
  "empty": (b"", "shorter than a GGUF header"),
  "magic": (build(magic=b"GGML"), "magic: found b'GGML'"),
  "version 1": (build(version=1), "version: found 0x1"),
  "big endian": (build(version=3 << 24), "version: found 0x3000000"),
  "tensor count": (build(counts=(HUGE, 0)), "'' again|bytes|dimensions"),
  "key count": (build(counts=(0, HUGE)), "key 1"),
  "key length": (build([struct.pack("<Q", HUGE)]), "at most"),
  "string length": (build([key(b"a", 8, struct.pack("<Q", HUGE))]), "'a'"),
  "value type": (build([key(b"a", 13, b"")]), "value type 13"),
  "array count": (
    build([key(b"a", 9, struct.pack("<IQ", 4, HUGE))]),
    "value of 'a'",
  ),
  "string array count": (
    build([key(b"a", 9, struct.pack("<IQ", 8, HUGE))]),
    "strings",
  ),
  "nested array": (
    build([key(b"a", 9, struct.pack("<IQ", 9, 1))]),
    "array of type 9",
  ),
  "not UTF-8": (build([key(b"a", 8, pack(b"\xff"))]), "UTF-8"),
  "bool of 2": (build([key(b"a", 7, b"\x02")]), "truth value"),
  "key twice": (
    build([key(b"a", 7, b"\1"), key(b"a", 7, b"\1")]),
    "'a' again",
  ),
  "alignment 0": (
    build([key(ALIGNMENT, 4, struct.pack("<I", 0))]),
    "general.alignment",
  ),
  "alignment 48": (
    build([key(ALIGNMENT, 4, struct.pack("<I", 48))]),
    "power of 2",
  ),
  "alignment text": (build([key(ALIGNMENT, 8, pack(b"32"))]), "power of 2"),
  "rank 0": (build(infos=[info(dims=())]), "0 dimensions"),
  "rank 5": (build(infos=[info(dims=(32, 1, 1, 1, 1))]), "5 dimensions"),
  "rank huge": (
    build(infos=[pack(b"w") + struct.pack("<I", 1 << 31)]),
    "dimensions",
  ),
  "zero dim": (build(infos=[info(dims=(32, 0))]), r"shape \(0, 32\)"),
  "part of a block": (build(infos=[info(dims=(33, 2))]), "multiple of 32"),
  "overflowing dims": (
    build(infos=[info(dims=(1 << 40, 1 << 40))]),
    "a part of the file",
  ),
  "type": (build(infos=[info(kind=77)]), "ggml type 77"),
  "removed type": (build(infos=[info(kind=4)]), "ggml type 4"),
  "offset unaligned": (build(infos=[info(offset=8)]), "multiple of 32"),
  "offset outside": (build(infos=[info(offset=HUGE)]), "at most the file"),
  "end outside": (build(infos=[info(offset=32)]), "at most the file's"),
  "tensor twice": (build(infos=[info(), info()]), "the name again"),
  "overlap": (
    build(infos=[info(), info(b"v", offset=32)], data=128),
    "overlaps 'w'",
  ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_clear_error_in_milliseconds(name, tmp_path):
  data, message = HOSTILE[name]
  path = tmp_path / "hostile.gguf"
  path.write_bytes(data)
  start = time.monotonic()
  with pytest.raises(UserError, match=message) as error:
    open_gguf(path)
  assert time.monotonic() - start < 0.5
  assert str(path) in str(error.value)
  assert str(error.value).count("\n") <= 2


def test_the_hostile_files_differ_from_a_good_one(tmp_path):
  path = tmp_path / "good.gguf"
  path.write_bytes(build([key(b"a", 7, b"\1")], [info()]))
  file = open_gguf(path)
  assert file.metadata == {"a": True}
  assert file.tensors["w"].shape == (2, 32)
  assert file.tensors["w"].rows().shape == (2, 20)


def test_every_truncation_is_an_error(tmp_path):
  whole = FILES[0].read_bytes()
  file = open_gguf(FILES[0])
  start = len(whole) - sum(
    t.data.size + -t.data.size % 32 for t in file.tensors.values()
  )
  path = tmp_path / "cut.gguf"
  for size in [*range(0, start, 97), start, len(whole) - 4096]:
    path.write_bytes(whole[:size])
    with pytest.raises(UserError):
      open_gguf(path)


def test_random_damage_to_the_header_never_crashes(tmp_path):
  whole = bytearray(build([key(b"a", 8, pack(b"text"))], [info()]))
  rng = np.random.default_rng(0)
  path = tmp_path / "damaged.gguf"
  refused = 0
  for _ in range(300):
    damaged = bytearray(whole)
    damaged[rng.integers(0, 100)] = rng.integers(0, 256)
    path.write_bytes(damaged)
    try:
      open_gguf(path)
    except UserError:
      refused += 1
  assert refused > 100


def test_no_such_file_and_a_directory(tmp_path):
  with pytest.raises(UserError, match="No such file"):
    open_gguf(tmp_path / "none.gguf")
  with pytest.raises(UserError, match="directory"):
    open_gguf(tmp_path)


def test_a_failed_write_leaves_what_was_there(tmp_path):
  path = tmp_path / "x.gguf"
  write_gguf(path, {"a": 1}, {})
  before = path.read_bytes()
  with pytest.raises(UserError, match="cannot write"):
    write_gguf(tmp_path / "none" / "x.gguf", {}, {})
  with pytest.raises(UserError, match="not a value"):
    write_gguf(path, {"a": 1 + 2j}, {})
  tensor = Tensor("F32", (2,), np.arange(2, dtype="<f4").view(np.uint8))
  assert path.read_bytes() == before
  write_gguf(path, {"general.alignment": 64}, {"t": tensor, "u": tensor})
  back = gguf.open_gguf(path).tensors["u"]
  np.testing.assert_array_equal(back.decode(), [0, 1])
