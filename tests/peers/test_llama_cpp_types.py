"""Every type of GGUF files, beside llama.cpp's own quantizer and arithmetic.

Both programs store one random model in fp32 as every type and mixture; the
files have to be the same, tensor by tensor and byte by byte. llama.cpp is not
compiled with contracted products, so nothing rounds in another way.
"""

import hashlib
import json
import pathlib
import shutil

import families
import gguf
import llama
import make_models
import numpy as np
import pytest
import support
from llama_models import (
  CASES,
  KINDS,
  READ_ALONE,
  SHAPES,
  WEIGHED,
  Files,
  importances,
  weights,
)

ROWS = np.random.default_rng(5).integers(3, families.VOCAB, (2, 24))
STORE = """
import json, pathlib, sys
import numpy as np
from research.interop import convert, sources
from research.interop.gguf import recipe as gguf_recipe
for job in json.loads(sys.argv[1]):
  weights = None
  if job["importances"]:
    with np.load(job["importances"]) as file:
      weights = dict(file)
  recipe = gguf_recipe.Recipe(job["kind"], True, weights)
  source = sources.open_source(job["source"])
  convert.to_gguf(source, pathlib.Path(job["to"]), recipe)
"""


def _job(source, kind, to, importances=""):
  return dict(
    source=str(source), kind=kind, to=str(to), importances=str(importances)
  )


@pytest.fixture(scope="module")
def stored(shared_heptad, tmp_path_factory):
  """Returns every model, of which we have written all files; 2 GB."""
  root, first, jobs = tmp_path_factory.mktemp("stored"), [], []
  found = {name: Files(root / name) for name in SHAPES}
  for name, files in found.items():
    hf = files.folder / "hf"
    make_models.save(hf, SHAPES[name], weights(SHAPES[name]))
    first.append(_job(hf, "F32", files.plain))
    more = (READ_ALONE,) if name in ("wide", "odd") else ()
    for kind in (*CASES[name], *more):
      jobs.append(_job(files.plain, kind, files.ours(kind)))
  shared_heptad.script(STORE, json.dumps(first))
  wide = found["wide"]
  given = wide.folder / "importances.npz"
  np.savez(given, **importances(wide.plain))
  for kind in WEIGHED:
    jobs.append(_job(wide.plain, kind, wide.ours(kind, True), given))
  shared_heptad.script(STORE, json.dumps(jobs))
  yield found
  shutil.rmtree(root)


def assert_same_files(ours: pathlib.Path, theirs: pathlib.Path) -> None:
  """Types, shapes and bytes of all tensors are equal, and the metadata."""
  a, b = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
  want = {t.name: t for t in b.tensors}
  assert {t.name for t in a.tensors} == set(want)
  types = {t.name: t.tensor_type.name for t in a.tensors}
  assert types == {name: t.tensor_type.name for name, t in want.items()}
  for tensor in a.tensors:
    np.testing.assert_array_equal(
      np.asarray(tensor.data).view(np.uint8),
      np.asarray(want[tensor.name].data).view(np.uint8),
      err_msg=tensor.name,
    )
  for key, value in b.fields.items():
    # What theirs says of the importances, and of the file itself.
    if not key.startswith(("GGUF.", "quantize.imatrix.")):
      assert a.fields[key].contents() == value.contents(), key


@pytest.mark.parametrize(
  ("name", "kind"), [(name, kind) for name in CASES for kind in CASES[name]]
)
def test_files_are_theirs_byte_for_byte(name, kind, stored):
  files = stored[name]
  assert_same_files(files.ours(kind), files.theirs(kind))


@pytest.mark.parametrize("kind", WEIGHED)
def test_with_importances_too(kind, stored):
  files = stored["wide"]
  assert_same_files(files.ours(kind, True), files.theirs(kind, True))
  if kind in KINDS:
    plain = gguf.GGUFReader(files.theirs(kind)).tensors
    weighed = gguf.GGUFReader(files.theirs(kind, True)).tensors
    assert any(
      not np.array_equal(a.data, b.data)
      for a, b in zip(plain, weighed, strict=True)
    )


# Decoded, and computed with --------------------------------------------------

BOTH = [(n, k) for n in ("wide", "odd") for k in (*CASES[n], READ_ALONE)]
# What rounding an input leaves of it: halves of 11 and 8 bits; else integers
# of 8 bits for 32 or 256 numbers, the largest about three times their size.
ROUNDING = {"F16": 2**-11 / 3**0.5, "BF16": 2**-8 / 3**0.5}
INTEGERS = 3 / 127 / 12**0.5
READ = """
import hashlib, json, sys
import numpy as np
sys.path.insert(0, "tests/peers")
import ours
from research.interop import gguf
from research.interop.gguf import read, tensor_types
paths, out = json.loads(sys.argv[1]), {}
with np.load(sys.argv[2]) as file:
  rows = file["rows"]
for path in paths:
  for name, t in gguf.open_gguf(path).tensors.items():
    x = tensor_types.decode(t.type, t.data, t.shape)
    out[f"{path}:{name}"] = hashlib.sha1(x.tobytes()).hexdigest()
  it = read.load_gguf(path)
  out[path] = np.asarray(ours.forward(it.model, it.params, rows))
np.savez(sys.argv[3], **out)
"""


def read_here(files: Files, kind: str) -> pathlib.Path:
  """Returns their file, if there is one."""
  return files.ours(kind) if kind == READ_ALONE else files.theirs(kind)


@pytest.fixture(scope="module")
def read(stored, shared_heptad, tmp_path_factory) -> dict:
  """Returns our logits of the files, and digests of the decoded tensors."""
  folder = tmp_path_factory.mktemp("read")
  np.savez(folder / "rows.npz", rows=ROWS.astype(np.int32))
  paths = [str(read_here(stored[name], kind)) for name, kind in BOTH]
  shared_heptad.script(
    READ, json.dumps(paths), folder / "rows.npz", folder / "out.npz"
  )
  return dict(np.load(folder / "out.npz"))


@pytest.mark.parametrize(("name", "kind"), BOTH)
def test_each_reads_the_others_file(name, kind, stored, read, tmp_path):
  files, decoded = stored[name], tmp_path / "decoded.gguf"
  source = read_here(files, kind)
  llama.quantize(source, decoded, 0)
  for tensor in gguf.GGUFReader(decoded).tensors:
    x = np.asarray(tensor.data, np.float32)
    digest = hashlib.sha1(x.tobytes()).hexdigest()
    assert str(read[f"{source}:{tensor.name}"]) == digest, tensor.name
  exact = llama.logits(llama.opened(decoded), ROWS)
  decoded.unlink()
  assert support.relative_error(read[str(source)], exact) < 1e-5
  # Of the file itself it rounds the inputs of matrices, four times in series
  # in a layer; these errors are independent and stay as they are.
  rounded = llama.logits(llama.opened(files.ours(kind)), ROWS)
  error = np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(exact**2))
  depth = SHAPES[name].config["num_hidden_layers"]
  assert error < ROUNDING.get(kind, INTEGERS) * (4 * depth) ** 0.5
