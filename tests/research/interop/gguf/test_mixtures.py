"""Mixtures, against sizes that llama.cpp publishes and a file it has made."""

import re

import pytest

from research.interop.gguf import mixtures
from research.quant.formats import ggml
from research.typing import UserError


def llama_8b():
  """Yields (path, layer, rows, columns) of Llama 3.1 8B's matrices."""
  yield "embed", None, 128256, 4096
  yield "head", None, 128256, 4096
  for layer in range(32):
    for name in ("q", "o"):
      yield f"attention/{name}", layer, 4096, 4096
    for name in ("k", "v"):
      yield f"attention/{name}", layer, 1024, 4096
    for name in ("gate", "up"):
      yield f"mlp/{name}", layer, 14336, 4096
    yield "mlp/down", layer, 4096, 14336


# research/quant/MATH.md 3: llama.cpp's own table of Llama 3.1 8B.
PUBLISHED = {
  "Q2_K": 3.16,
  "Q3_K_M": 4.00,
  "Q4_K_S": 4.67,
  "Q4_K_M": 4.89,
  "Q5_K_M": 5.70,
  "Q6_K": 6.56,
  "IQ4_XS": 4.46,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_bits_a_weight_are_those_published(name):
  shape = mixtures.Shape(depth=32, group=4, tied=False)
  # Norms stay in float32.
  size, count = 32 * 65 * 4096, 65 * 4096
  for path, layer, rows, columns in llama_8b():
    format = ggml.TYPES[mixtures.target_type(name, path, layer, shape)]
    size += 8 * format.nbytes * rows * columns // format.block
    count += rows * columns
  assert abs(size / count - PUBLISHED[name]) < 0.006


def test_more_bits_go_to_both_ends_and_every_third_layer_between():
  more = [i for i in range(32) if mixtures.more_bits(i, 32)]
  assert more == [*range(4), 6, 9, 12, 15, 18, 21, 24, 27, *range(28, 32)]


MIXTRAL = mixtures.Shape(32, 4, False, experts=8)


@pytest.mark.parametrize(
  ("name", "path", "layer", "shape", "kind"),
  [
    ("Q4_K_M", "embed", None, mixtures.Shape(4, 1, True), "Q6_K"),
    ("Q4_K_M", "embed", None, mixtures.Shape(4, 1, False), "Q4_K"),
    ("TQ2_0", "embed", None, mixtures.Shape(4, 1, False), "Q4_K"),
    # Live for all mixtures: peers/test_llama_cpp_types.
    ("Q4_K_M", "attention/k", 9, MIXTRAL, "Q8_0"),
    ("Q6_K", "attention/v", 9, MIXTRAL, "Q8_0"),
    ("Q2_K", "attention/o", 9, MIXTRAL, "Q5_K"),
    ("Q3_K_L", "attention/o", 9, MIXTRAL, "Q3_K"),
    ("Q4_K_M", "mlp/down", 31, MIXTRAL, "Q6_K"),
    ("TQ2_0", "mlp/up", 0, mixtures.Shape(4, 1, False), "TQ2_0"),
    ("Q2_K", "attention/v", 3, mixtures.Shape(32, 1, False), "Q3_K"),
    ("Q2_K", "attention/v", 3, mixtures.Shape(32, 4, False), "Q4_K"),
    ("Q3_K_L", "attention/o", 9, mixtures.Shape(32, 4, False), "Q5_K"),
    ("Q3_K_S", "attention/v", 9, mixtures.Shape(80, 8, False), "Q5_K"),
    ("IQ4_XS", "mlp/down", 1, mixtures.Shape(32, 4, False, False), "Q5_K"),
    ("IQ4_XS", "mlp/down", 1, mixtures.Shape(32, 4, False, True), "IQ4_XS"),
    ("Q2_K_S", "mlp/down", 4, mixtures.Shape(32, 4, False), "Q2_K"),
  ],
)
def test_what_a_matrix_is_stored_in(name, path, layer, shape, kind):
  assert mixtures.target_type(name, path, layer, shape) == kind


@pytest.mark.parametrize(
  ("kind", "columns", "taken"),
  [
    ("Q4_K", 576, "Q5_0"),
    ("Q5_K", 576, "Q5_1"),
    ("Q6_K", 576, "Q8_0"),
    ("Q2_K", 576, "Q4_0"),
    ("IQ4_XS", 576, "IQ4_NL"),
    ("Q4_K", 80, "F16"),
    ("Q4_0", 80, "F16"),
    ("Q4_K", 1536, "Q4_K"),
    ("F32", 5, "F32"),
  ],
)
def test_rows_that_are_no_whole_blocks(kind, columns, taken):
  assert mixtures.stored_type("x", kind, columns, True) == taken
  if taken == kind:
    assert mixtures.stored_type("x", kind, columns, False) == kind
    return
  block = ggml.TYPES[kind].block
  message = (
    f"blk.0.x has rows of {columns} weights, which {kind} cannot hold: "
    f"expected a multiple of {block}"
  )
  with pytest.raises(UserError, match=re.escape(message)) as e:
    mixtures.stored_type("blk.0.x", kind, columns, False)
  assert f"--fallback, for {taken} there" in str(e.value)
