"""Each device reads its own part of a file, and gets what it would have."""

import functools
import math
import os
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from research import sharding, tree
from research.interop import convert, hf, load, sources
from research.interop.gguf import read as gguf_read
from research.interop.hf import config as hf_config
from research.io import mapped, safetensors, unread
from research.nn import presets
from research.quant.formats import ggml
from research.typing import UserError
from tests import support_sparse

MODELS = pathlib.Path(__file__).parents[2] / "golden" / "models"
FAMILIES = sorted(p.parent.name for p in MODELS.glob("*/config.json"))
FILES = sorted(p.parent.name for p in MODELS.glob("gguf_*/model.gguf"))
ADAPTERS = ("peft_lora", "peftfull_bias_all", "peftfull_resized_tied")
LAYOUTS = [
  sharding.Layout(data=1, fsdp=8),
  sharding.Layout(data=1, fsdp=4, tensor=2),
  sharding.Layout(data=2, fsdp=2, expert=2),
]
LARGE = support_sparse.LLAMA_8B | dict(vocab_size=32064, num_hidden_layers=1)


def by(layout):
  mesh = layout.mesh()
  return lambda shapes: layout.shardings(shapes, mesh)


def everywhere(shapes):
  """Cuts as many axes as can be, those of layers and within blocks too."""
  grid = np.asarray(jax.devices()).reshape(2, 2, 2)
  mesh = jax.sharding.Mesh(grid, ("a", "b", "c"))

  def one(x):
    free, spec = ["a", "b", "c"], []
    for dim in x.shape:
      spec.append(free.pop() if free and dim % 2 == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree.map(one, shapes)


@functools.cache
def whole(name, packed=False):
  return load.load_model(name, packed=packed).params


def check(name, packed, shardings):
  got = load.load_model(name, packed=packed, shardings=shardings).params
  same(got, whole(name, packed), shardings)


def same(got, wanted, shardings):
  chex.assert_trees_all_equal(got, wanted)
  want = shardings(unread.abstract(got))
  for (path, x), s in zip(
    tree.flatten_paths(got), jax.tree.leaves(want), strict=True
  ):
    assert x.sharding.is_equivalent_to(s, x.ndim), path


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.sample(7)
def test_hugging_face_directories(name):
  # Opened once: tracing a model's initialisation takes longest.
  model, tensors, _ = hf.open_model(MODELS / name)
  described = hf.unread_params(model, tensors)
  wanted = unread.place(described)
  for shardings in (everywhere, *map(by, LAYOUTS)):
    same(unread.place(described, shardings), wanted, shardings)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.sample(7)
def test_gguf_files(name, packed):
  for shardings in (everywhere, *map(by, LAYOUTS)):
    check(MODELS / name / "model.gguf", packed, shardings)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.sample(2)
def test_adapters(name):
  check(MODELS / name, False, by(LAYOUTS[1]))


@pytest.mark.parametrize(
  "name, packed",
  [
    ("gguf_q4_0/model.gguf", True),
    ("gguf_q4_0/model.gguf", False),
    ("peft_lora", False),
  ],
)
@pytest.mark.sample(3)
def test_our_own_checkpoints(tmp_path, name, packed):
  convert.to_orbax(sources.open_source(MODELS / name), tmp_path / "ours")
  check(tmp_path / "ours", packed, everywhere)
  whole_one = whole(tmp_path / "ours", packed)
  (tmp_path / "ours" / "arrays").rename(tmp_path / "away")
  got = load.load_model(
    tmp_path / "ours", packed=packed, shardings=unread.unplaced
  )
  # Shapes alone, of what is not even there.
  chex.assert_trees_all_equal(got.params, unread.abstract(whole_one))


def test_narrower_types_are_rounded_alike():
  for name in ("gguf_q4_0/model.gguf", "llama"):
    got = load.load_model(MODELS / name, "bfloat16", shardings=everywhere)
    want = load.load_model(MODELS / name, "bfloat16")
    chex.assert_trees_all_equal(got.params, want.params)


def test_an_array_that_cannot_be_cut_is_an_error():
  mesh = LAYOUTS[0].mesh()

  def by_eight(shapes):
    cut = NamedSharding(mesh, PartitionSpec("fsdp"))
    return jax.tree.map(lambda x: cut, shapes)

  with pytest.raises(
    UserError, match=r"/down: shape \[3, 44, 40\] cannot be cut"
  ):
    load.load_model(MODELS / "llama", shardings=by_eight)


@pytest.mark.parametrize("width", [8, 2048])
def test_values_stay_where_a_step_may_donate_them(width):
  # What JAX has not allocated itself it cannot reuse: it would copy.
  x = unread.stacked(
    [lambda index, out: out.fill(1)], (1,), (512, width), np.dtype("f4")
  )
  for shardings in (None, everywhere):
    [y] = jax.tree.leaves(unread.place({"x": x}, shardings))
    before = y.addressable_shards[0].data.unsafe_buffer_pointer()
    z = jax.jit(lambda y: y + 1, donate_argnums=0)(y)
    assert z.addressable_shards[0].data.unsafe_buffer_pointer() == before


# Who reads what --------------------------------------------------------------


def sparse_model(folder: pathlib.Path, config: dict) -> tuple:
  """Writes a model of zeros in bfloat16 that takes no room; returns it."""
  support_sparse.write(folder, config, layers=1)
  model = presets.transformer(*hf_config.sizes_from_config(config))
  return model, safetensors.open_directory(folder)


@pytest.fixture
def counted(monkeypatch):
  """Returns the list of how many bytes each read has given."""
  found = []
  read, blocks = safetensors.Lazy.read, gguf_read._Matrix.blocks

  def counting(f):
    def wrapped(*args):
      out = f(*args)
      found.append(out.nbytes)
      return out

    return wrapped

  monkeypatch.setattr(safetensors.Lazy, "read", counting(read))
  monkeypatch.setattr(gguf_read._Matrix, "blocks", counting(blocks))
  return found


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.sample(2)
def test_a_sixty_fourth_of_large_matrices(tmp_path, counted, last):
  model, tensors = sparse_model(tmp_path, LARGE)
  assert sum(f.stat().st_blocks * 512 for f in tmp_path.iterdir()) < 2**20
  described = hf.unread_params(model, tensors, "bfloat16")
  matrices = [x for x in jax.tree.leaves(described) if math.prod(x.shape) > 1e6]
  size = sum(2 * math.prod(x.shape) for x in matrices)
  assert size > 9e8
  for x in matrices:
    axis = len(x.shape) - (1 if last else 2)
    index = [slice(0, n) for n in x.shape]
    n = x.shape[axis] // 64
    index[axis] = slice(5 * n, 6 * n)
    assert not x.read(tuple(index)).any()
  assert sum(counted) == size // 64


# A part of decoded blocks reads the whole of those that it cuts.
@pytest.mark.parametrize(
  "name, packed", [("gguf_q8_0", True), ("gguf_f32", False)]
)
def test_all_devices_together_read_a_gguf_file_once(counted, name, packed):
  path = MODELS / name / "model.gguf"
  whole_size = _read_size(path, packed, None, counted)
  layout = sharding.Layout(data=1, fsdp=2, tensor=4)
  assert _read_size(path, packed, by(layout), counted) == whole_size
  # Copies of a part are read once.
  layout = sharding.Layout(data=4, fsdp=2)
  assert _read_size(path, packed, by(layout), counted) == whole_size


def _read_size(path, packed, shardings, counted) -> int:
  counted.clear()
  load.load_model(path, packed=packed, shardings=shardings)
  return sum(counted)


def test_all_devices_together_read_a_directory_once(counted):
  path = MODELS / "llama"
  whole_size = _read_size(path, False, None, counted)
  for layout in LAYOUTS:
    assert _read_size(path, False, by(layout), counted) == whole_size


# Pages of files --------------------------------------------------------------


def resident(field: str = "RssFile") -> int:
  """Returns how much of files the process holds, in bytes."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith(field + ":"):
      return int(line.split()[1]) * 1024
  return pytest.skip(f"no {field} here")


def test_pages_are_let_go_with_the_last_view_of_them(tmp_path):
  file = tmp_path / "file"
  file.touch()
  os.truncate(file, 64 << 20)
  piece = mapped.open_bytes(file).part(5, (64 << 20) - 7)
  start = resident()
  x = piece.array()
  assert resident() - start < 4 << 20
  row = x.reshape(4, -1)[1:]
  del x
  assert not row.any()
  assert resident() - start > 30 << 20
  del row
  assert resident() - start < 4 << 20


def test_a_file_that_has_become_shorter(tmp_path):
  file = tmp_path / "file"
  file.write_bytes(bytes(9000))
  piece = mapped.open_bytes(file).part(8000, 9000)
  assert piece.array().size == 1000
  os.truncate(file, 8500)
  with pytest.raises(UserError, match="bytes 8000 to 9000 cannot be read any"):
    piece.array()
  assert mapped.open_bytes(file).part(7, 7).array().size == 0
  with pytest.raises(ValueError, match="of 1000"):
    piece.part(0, 1001)


def test_an_open_file_survives_its_replacement(tmp_path):
  file = tmp_path / "model.safetensors"
  safetensors.write_file(file, {"x": np.arange(6.0)})
  opened = safetensors.open_file(file)
  safetensors.write_file(file, {"y": np.zeros(3)})
  np.testing.assert_array_equal(opened["x"].read(), np.arange(6.0))


def test_the_largest_array_is_read_first():
  order = []

  def array(n):
    def read(index):
      order.append(n)
      return np.zeros(n, np.float32)

    return unread.LazyArray((n,), np.dtype(np.float32), read)

  got = unread.place({"a": array(3), "b": array(9), "c": array(5)})
  assert order == [9, 5, 3]
  assert jax.tree.map(jnp.size, got) == {"a": 3, "b": 9, "c": 5}


@pytest.mark.parametrize("axis", [0, 1])
def test_in_pieces_is_the_whole_a_mebibyte_at_a_time(axis):
  x, asked = np.arange(60.0).reshape(6, 10), []

  def read(index):
    asked.append(unread.sizes(index)[axis])
    return x[index]

  index = (slice(1, 6), slice(2, 9))
  for nbytes, most in ((1 << 19, 2), (3 << 19, 1), (1, 7), (0, 7)):
    out = np.zeros(unread.sizes(index))
    asked.clear()
    unread.in_pieces(read, axis, nbytes)(index, out)
    np.testing.assert_array_equal(out, x[index])
    assert max(asked) <= most and sum(asked) == unread.sizes(index)[axis]


def test_a_files_rows_are_looked_at_a_few_at_a_time(tmp_path, monkeypatch):
  """Of scales alone, and of numbers that become another type."""
  looks = []

  def look(rows, blocks):
    made = np.zeros((rows.stop - rows.start, 20 * (blocks.stop - blocks.start)))
    looks.append(made.size)
    return made.astype(np.uint8)

  w = ggml.from_ggml_unread("Q4_1", [look], (2048, 64), -1)
  for x in jax.tree.leaves(w):
    x.read(tuple(slice(0, n) for n in x.shape))
  assert max(looks) <= 1 << 20 < sum(looks)

  looks.clear()
  file, x = tmp_path / "x.safetensors", np.ones((4096, 256), np.float32)
  safetensors.write_file(file, {"x": x})
  tensor = safetensors.open_file(file)["x"]
  whole = safetensors.Lazy.read

  def read(self, index=...):
    looks.append(whole(self, index).nbytes)
    return whole(self, index)

  monkeypatch.setattr(safetensors.Lazy, "read", read)
  for flip in (False, True):
    shape = x.shape[::-1] if flip else x.shape
    out = np.zeros(shape, np.float16)
    hf.filler(tensor, flip)(tuple(slice(0, n) for n in shape), out)
    assert out.all()
  assert max(looks) <= 1 << 20 and sum(looks) == 2 * x.nbytes
