"""Array sources: round trips, and rejection of malformed files."""

import io
import struct
import zipfile

import numpy as np
import pytest

from research.data import examples, pipeline
from research.data.sources import arrays
from research.typing import UserError


@pytest.fixture
def save(tmp_path):
  def save(name="a.npz", write=np.savez, **found):
    path = tmp_path / name
    write(path, **found)
    return str(path)

  return save


def read(path, **options):
  return arrays.Arrays(path, **options).examples(None)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64", ">i4", "uint8"])
def test_documents_come_back(save, dtype):
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 200, 20).astype(dtype)
  learned = rng.integers(0, 2, 20)
  learned[1] = 1
  path = save(tokens=tokens, offsets=[0, 3, 4, 20], learned=learned)
  made = read(path)
  assert [len(e.tokens) for e in made] == [3, 1, 16]
  np.testing.assert_array_equal(
    np.concatenate([e.tokens for e in made]), tokens
  )
  np.testing.assert_array_equal(
    np.concatenate([e.loss_mask for e in made]), learned
  )
  data = pipeline.Pipeline(source=arrays.Arrays(path), length=8, batch_size=1)
  rows = data.rows(None)
  weights = sum(rows[i]["weights"].sum() for i in range(len(rows)))
  assert weights == sum(e.loss_mask[1:].sum() for e in made)


def test_plain_arrays(tmp_path):
  path = str(tmp_path / "a.npy")
  np.save(path, np.arange(12))
  assert [e.tokens.tolist() for e in read(path)] == [list(range(12))]
  np.save(path, np.arange(12).reshape(3, 4))
  assert [e.tokens.tolist() for e in read(path)] == [
    [0, 1, 2, 3],
    [4, 5, 6, 7],
    [8, 9, 10, 11],
  ]
  assert all(
    e.loss_mask.all() for e in examples.read(arrays.Arrays(path), None)
  )


@pytest.mark.parametrize(
  ("found", "words"),
  [
    (dict(tokens=[1.5, 2.5]), "tokens: has type float64"),
    (dict(tokens=[True, False]), "tokens: has type bool"),
    (dict(tokens=np.zeros((2, 2, 2), int)), "tokens: has shape"),
    (dict(tokens=np.zeros(0, int)), "tokens: is empty"),
    (dict(tokens=["a"]), "tokens: has type <U1"),
    (dict(ids=[1]), "holds 'ids'"),
    (dict(offsets=[0, 1]), "holds no array 'tokens'"),
    (dict(tokens=[1, 99]), "found id 99 at index 1, expected ids from 0 to 49"),
    (dict(tokens=[1, -1]), "found id -1 at index 1"),
    (dict(tokens=[1, 2, 3], offsets=[0, 2]), "offsets: found 0 ... 2"),
    (dict(tokens=[1, 2, 3], offsets=[1, 3]), "offsets: found 1 ... 3"),
    (dict(tokens=[1, 2, 3], offsets=[0, 2, 2, 3]), "not increasing"),
    (dict(tokens=[1, 2, 3], offsets=[0, 9, 3]), "not increasing"),
    (dict(tokens=[1, 2], offsets=[0.0, 2.0]), "offsets: has type float64"),
    (dict(tokens=[1, 2], offsets=[2]), "offsets: has type int64, shape"),
    (dict(tokens=[1, 2], learned=[1]), "learned: has shape"),
    (dict(tokens=[1, 2], learned=[1, 2]), "learned: has shape"),
  ],
)
def test_arrays_that_are_no_documents(save, found, words):
  path = save(**found)
  with pytest.raises(UserError, match=words) as error:
    read(path, vocab=50)
  assert str(error.value).startswith(path)
  assert len(str(error.value).splitlines()) <= 3


def test_no_pickle(save):
  class Evil:
    def __reduce__(self):
      return (pytest.fail, ("unpickled",))

  path = save(tokens=np.array([Evil()], object))
  with pytest.raises(UserError, match="has type object"):
    read(path)


def test_compressed_is_explained(save):
  path = save(write=np.savez_compressed, tokens=np.arange(100))
  with pytest.raises(UserError, match="np.savez instead"):
    read(path)


def _claiming(shape):
  """Returns an .npy of 8 numbers whose header claims `shape`."""
  file = io.BytesIO()
  np.lib.format.write_array_header_1_0(
    file, {"descr": "<i8", "fortran_order": False, "shape": shape}
  )
  return file.getvalue() + bytes(64)


@pytest.mark.parametrize(
  "shape", [(1 << 60,), (9,), (3, 3), (1 << 40, 1 << 40)]
)
def test_a_header_that_claims_more_than_there_is(tmp_path, shape):
  path = tmp_path / "a.npy"
  path.write_bytes(_claiming(shape))
  with pytest.raises(UserError, match="claims .* bytes, found 64"):
    read(str(path))
  with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
    file.writestr("tokens.npy", _claiming(shape))
  with pytest.raises(UserError, match="claims .* bytes, found 64"):
    read(str(tmp_path / "a.npz"))


def test_negative_shapes_and_later_versions(tmp_path):
  path = tmp_path / "a.npy"
  path.write_bytes(_claiming((-1,)))
  with pytest.raises(UserError, match="has shape"):
    read(str(path))
  path.write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1))
  with pytest.raises(UserError, match="is not an array: format version"):
    read(str(path))


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_mutations_end_in_arrays_or_in_words(tmp_path, kind):
  """500 seeded bit flips, truncations and splices: UserError at worst."""
  path = tmp_path / f"a.{kind}"
  if kind == "npz":
    np.savez(path, tokens=np.arange(40), offsets=[0, 10, 40])
  else:
    np.save(path, np.arange(40))
  whole, rng = path.read_bytes(), np.random.default_rng(0)
  ends = {"read": 0, "refused": 0}
  for _ in range(500):
    data = bytearray(whole)
    for _ in range(rng.integers(1, 4)):
      place = int(rng.integers(0, len(data)))
      match rng.integers(0, 3):
        case 0:
          data[place] ^= 1 << int(rng.integers(0, 8))
        case 1:
          del data[place:]
          data += b"\0"
        case 2:
          data[place : place + 4] = rng.bytes(4)
    path.write_bytes(data)
    try:
      for e in read(str(path)):
        np.asarray(e.tokens).sum()
      ends["read"] += 1
    except UserError:
      ends["refused"] += 1
  assert min(ends.values()) > 5, ends


def test_missing(tmp_path):
  with pytest.raises(UserError, match="cannot be read"):
    read(str(tmp_path / "none.npz"))
