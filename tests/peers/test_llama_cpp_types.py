"""Every type of GGUF files, beside llama.cpp's own quantizer and arithmetic.

Both programs store one random model in fp32 as every type and mixture; the
files have to be the same, tensor by tensor and byte by byte. llama.cpp is not
compiled with contracted products, so nothing rounds in another way.
"""

import dataclasses
import hashlib
import json
import pathlib
import zlib

import families
import gguf
import llama
import make_models
import numpy as np
import pytest
import support

# Every matrix of one type, which llama.cpp calls pure.
PURE = (
  *("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"),
  *("Q3_K", "Q4_K", "Q5_K"),
)
MIXED = (
  *("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S"),
  *("Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0"),
)
KINDS = (*PURE, *MIXED)
# llama.cpp takes Q2_K_S with importances alone, and others ignore them.
WEIGHED = (
  *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K_S"),
  *(kind for kind in MIXED if not kind.startswith("TQ")),
)
DEEP = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_M", "IQ4_XS")
# llama.cpp reads it, but its quantizer has no number for it.
READ_ALONE = "NVFP4"
ROWS = np.random.default_rng(5).integers(3, families.VOCAB, (2, 24))


def family(width, heads, kv_heads, head, hidden, layers, tied=False):
  return families.Family(
    families._llama(
      width=width,
      heads=heads,
      kv_heads=kv_heads,
      head_dim=head,
      intermediate_size=hidden,
      num_hidden_layers=layers,
      tie_word_embeddings=tied,
    )
  )


SHAPES = {
  "wide": family(256, 8, 2, 32, 256, 16),  # four queries a key
  "odd": family(320, 4, 2, 80, 200, 8, tied=True),  # blocks do not fit
  "deep": family(256, 4, 1, 8, 32, 80),  # what llama.cpp takes for 70B
}


def weights(shape: families.Family) -> dict[str, np.ndarray]:
  """Returns matrices with long tails, that keep a signal's size."""
  out = {}
  for name, x in make_models.weights(shape).items():
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    if x.ndim == 2:
      x = generator.laplace(scale=(2 * x.shape[1]) ** -0.5, size=x.shape)
    out[name] = x.astype(np.float32)
  return out


def importances(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns some of every matrix but both ends'."""
  out = {}
  for tensor in gguf.GGUFReader(path).tensors:
    if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
      generator = np.random.default_rng(zlib.crc32(tensor.name.encode()))
      columns = int(tensor.shape[0])
      out[tensor.name] = 10 * generator.random(columns, np.float32) ** 4
  return out


STORE = """
import json, pathlib, sys
import numpy as np
from research.interop import convert, gguf_recipe, sources
for job in json.loads(sys.argv[1]):
  weights = None
  if job["importances"]:
    with np.load(job["importances"]) as file:
      weights = dict(file)
  recipe = gguf_recipe.Recipe(job["kind"], True, weights)
  source = sources.open_source(job["source"])
  convert.to_gguf(source, pathlib.Path(job["to"]), recipe)
"""


@dataclasses.dataclass(frozen=True)
class Files:
  """Where one model lies, in fp32 and as what both programs made of it."""

  folder: pathlib.Path

  @property
  def plain(self) -> pathlib.Path:
    return self.folder / "F32.gguf"

  def ours(self, kind: str, weighed: bool = False) -> pathlib.Path:
    return self.folder / f"{kind}{'.i' * weighed}.gguf"

  def theirs(self, kind: str, weighed: bool = False) -> pathlib.Path:
    """Returns the file that llama.cpp makes of the fp32 one's."""
    to = self.folder / f"{kind}{'.i' * weighed}.theirs.gguf"
    if not to.exists():
      ours = gguf.GGUFReader(self.ours(kind, weighed))
      number = ours.get_field("general.file_type")
      given = importances(self.plain) if weighed else None
      llama.quantize(
        self.plain, to, number.contents(), kind in PURE, importances=given
      )
    return to


@pytest.fixture(scope="module")
def stored(shared_heptad, tmp_path_factory) -> dict[str, Files]:
  """Returns every model, of which we have written all files."""
  root, first, jobs = tmp_path_factory.mktemp("stored"), [], []
  found = {name: Files(root / name) for name in SHAPES}

  def job(source, kind, to, importances=""):
    return dict(
      source=str(source), kind=kind, to=str(to), importances=str(importances)
    )

  for name, files in found.items():
    hf = files.folder / "hf"
    make_models.save(hf, SHAPES[name], weights(SHAPES[name]))
    first.append(job(hf, "F32", files.plain))
    kinds = DEEP if name == "deep" else (*KINDS, READ_ALONE)
    jobs += [job(files.plain, kind, files.ours(kind)) for kind in kinds]
  shared_heptad.script(STORE, json.dumps(first))
  wide = found["wide"]
  given = wide.folder / "importances.npz"
  np.savez(given, **importances(wide.plain))
  for kind in WEIGHED:
    jobs.append(job(wide.plain, kind, wide.ours(kind, True), given))
  shared_heptad.script(STORE, json.dumps(jobs))
  return found


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


CASES = [
  (name, kind)
  for name in SHAPES
  for kind in (DEEP if name == "deep" else KINDS)
]


@pytest.mark.parametrize(("name", "kind"), CASES)
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


# Decoded, and computed with ---------------------------------------------------

BOTH = [(name, kind) for name, kind in CASES if name != "deep"]
BOTH += [("wide", READ_ALONE), ("odd", READ_ALONE)]
# What rounding an input leaves of it: halves of 11 and 8 bits; else integers
# of 8 bits for 32 or 256 numbers, the largest about three times their size.
ROUNDING = {"F16": 2**-11 / 3**0.5, "BF16": 2**-8 / 3**0.5}
INTEGERS = 3 / 127 / 12**0.5


def opened(files: Files, kind: str) -> pathlib.Path:
  """Returns what is read here: their file, if there is one."""
  return files.ours(kind) if kind == READ_ALONE else files.theirs(kind)


READ = """
import hashlib, json, sys
import numpy as np
sys.path.insert(0, "tests/peers")
import ours
from research.interop import gguf, gguf_model, gguf_types
paths, out = json.loads(sys.argv[1]), {}
with np.load(sys.argv[2]) as file:
  rows = file["rows"]
for path in paths:
  for name, t in gguf.open_gguf(path).tensors.items():
    x = gguf_types.decode(t.type, t.data, t.shape)
    out[f"{path}:{name}"] = hashlib.sha1(x.tobytes()).hexdigest()
  it = gguf_model.load_gguf(path)
  out[path] = np.asarray(ours.forward(it.model, it.params, rows))
np.savez(sys.argv[3], **out)
"""


@pytest.fixture(scope="module")
def read(stored, shared_heptad, tmp_path_factory) -> dict:
  """Returns our logits of their files, and digests of the decoded tensors."""
  folder = tmp_path_factory.mktemp("read")
  np.savez(folder / "rows.npz", rows=ROWS.astype(np.int32))
  paths = [str(opened(stored[name], kind)) for name, kind in BOTH]
  shared_heptad.script(
    READ, json.dumps(paths), folder / "rows.npz", folder / "out.npz"
  )
  return dict(np.load(folder / "out.npz"))


@pytest.mark.parametrize(("name", "kind"), BOTH)
def test_each_reads_the_others_file(name, kind, stored, read, tmp_path):
  files, decoded = stored[name], tmp_path / "decoded.gguf"
  source = opened(files, kind)
  llama.quantize(source, decoded, 0)
  for tensor in gguf.GGUFReader(decoded).tensors:
    x = np.asarray(tensor.data, np.float32)
    digest = hashlib.sha1(x.tobytes()).hexdigest()
    assert str(read[f"{source}:{tensor.name}"]) == digest, tensor.name
  exact = llama.logits(llama.opened(decoded), ROWS)
  assert support.relative_error(read[str(source)], exact) < 1e-5
  # Of the file itself it rounds the inputs of matrices, four times in series
  # in a layer; these errors are independent and stay as they are.
  rounded = llama.logits(llama.opened(files.ours(kind)), ROWS)
  error = np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(exact**2))
  depth = SHAPES[name].config["num_hidden_layers"]
  assert error < ROUNDING.get(kind, INTEGERS) * (4 * depth) ** 0.5
