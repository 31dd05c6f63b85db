"""Every block type, decoded and encoded, beside the gguf package."""

import gguf
import numpy as np
import pytest
import support
import torch
import transformers
from gguf import GGMLQuantizationType as Type

# The package encodes these itself.
ENCODED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]
DECODED = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "NVFP4"]
SCRIPT = """
import sys
import numpy as np
from research.interop.gguf import tensor_types
given, to = sys.argv[1:]
out = {}
with np.load(given) as found:
  for name, x in found.items():
    kind, what = name.split('.')
    if what == 'raw':
      out[name] = tensor_types.decode(kind, x.reshape(-1), (len(x), 512))
    else:
      out[name] = tensor_types.encode(kind, x)
np.savez(to, **out)
"""


def matrix() -> np.ndarray:
  rng = np.random.default_rng(3)
  w = 0.1 * rng.standard_normal((24, 512))
  w[0], w[1] = 0, 0.25
  w[2, ::9] *= 40
  w[3] *= 1e-4
  return w.astype(np.float32)


@pytest.fixture(scope="module")
def ours(shared_heptad, tmp_path_factory):
  """Returns what we make of random bytes of each type, and of a matrix."""
  folder = tmp_path_factory.mktemp("types")
  rng, given = np.random.default_rng(0), {}
  for kind in ENCODED + DECODED:
    block, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    raw = rng.integers(0, 256, (64, 512 // block * size), np.uint8)
    given[f"{kind}.raw"] = raw
    given[f"{kind}.matrix"] = matrix()
  np.savez(folder / "given.npz", **given)
  shared_heptad.script(SCRIPT, folder / "given.npz", folder / "ours.npz")
  return given, dict(np.load(folder / "ours.npz"))


@pytest.mark.parametrize("kind", ENCODED + DECODED)
def test_random_bytes_are_decoded_alike(kind, ours):
  given, found = ours
  with np.errstate(all="ignore"):
    want = gguf.quants.dequantize(given[f"{kind}.raw"], Type[kind])
  np.testing.assert_array_equal(found[f"{kind}.raw"], want)


@pytest.mark.parametrize("kind", ENCODED)
def test_a_matrix_is_encoded_alike(kind, ours):
  want = gguf.quants.quantize(matrix(), Type[kind])
  np.testing.assert_array_equal(ours[1][f"{kind}.matrix"], want.reshape(-1))


@pytest.mark.parametrize("kind", DECODED)
def test_the_package_decodes_our_encoding(kind, ours):
  w = matrix()
  raw = ours[1][f"{kind}.matrix"].reshape(len(w), -1)
  got = gguf.quants.dequantize(raw, Type[kind])
  # research/quant/MATH.md 1.1: of a normal distribution, for the coarsest type.
  worst = {"Q2_K": 0.35, "Q3_K": 0.2}.get(kind, 0.11)
  rows = slice(4, None)
  error = np.sqrt(np.mean((got - w)[rows] ** 2)) / w[rows].std()
  assert 0 < error < worst


WRITE = """
import pathlib
import sys
from tests import support_gguf
support_gguf.write(pathlib.Path(sys.argv[1]))
"""


def test_transformers_reads_a_model_of_every_type_alike(heptad, tmp_path):
  heptad.script(WRITE, tmp_path / "model.gguf")
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path,
    gguf_file="model.gguf",
    attn_implementation="eager",
    dtype=torch.float32,
  ).eval()
  rows = np.arange(3, 35, dtype=np.int32).reshape(2, 16)
  with torch.no_grad():
    want = model(torch.from_numpy(rows).long()).logits.numpy()
  got = heptad.bridge(
    "logits", tmp_path / "model.gguf", packed=True, tokens=rows
  )
  assert support.relative_error(got, want) < 1e-5
