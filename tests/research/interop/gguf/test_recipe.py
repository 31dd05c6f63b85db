"""Models of every block type, mixtures, and importances, in GGUF files."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree, weights
from research.interop import convert, gguf, sources
from research.interop.gguf import imatrix, mixtures, tensor_types
from research.interop.gguf.read import load_gguf
from research.interop.gguf.recipe import FILE_TYPES, Recipe
from research.quant import qtensor
from research.quant.formats import ggml
from research.typing import UserError
from tests import support, support_gguf


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  path = tmp_path_factory.mktemp("gguf") / "model.gguf"
  support_gguf.write(path)
  return path


@pytest.fixture(scope="module")
def source(file):
  return sources.open_source(file)


def tensors(path):
  return gguf.open_gguf(path).tensors


def test_packed_weights_keep_their_types_and_numbers(file):
  dense, packed = (load_gguf(file, packed=p) for p in (False, True))
  leaves = jax.tree.leaves(packed.params, is_leaf=weights.is_weight)
  found = [w.format.name for w in leaves if isinstance(w, qtensor.QTensor)]
  want = [k for _, *kinds in support_gguf.MATRICES.values() for k in kinds]
  assert sorted(found) == sorted([*want, "Q6_K"])
  decode = jax.jit(
    lambda p: jax.tree.map(weights.dense, p, is_leaf=weights.is_weight)
  )
  got = decode(packed.params)
  chex.assert_trees_all_equal(
    jax.tree.leaves(tree.unroll(got)),
    jax.tree.leaves(tree.unroll(dense.params)),
  )
  stored = tensors(file)
  np.testing.assert_array_equal(
    dense.params["embed"], stored["token_embd.weight"].decode()
  )
  up = stored["blk.1.ffn_up.weight"].decode()
  layer = list(tree.layers(dense.params))[1]
  np.testing.assert_array_equal(layer["mlp"]["up"], up.T)


@pytest.mark.slow
def test_a_packed_model_computes_what_the_decoded_one_does(file):
  dense, packed = (load_gguf(file, packed=p) for p in (False, True))
  tokens = jnp.arange(3, 19)[None]

  @jax.jit
  def logits(params):
    hidden, _ = dense.model.apply({"params": params}, tokens)
    return dense.model.apply({"params": params}, hidden, method="logits")

  want = logits(dense.params)
  # Only the order of float32 sums differs.
  chex.assert_trees_all_close(
    logits(packed.params), want, atol=1e-5 * float(np.ptp(want))
  )


def test_every_byte_comes_back(file, source, tmp_path):
  log, reason, written = convert.to_gguf(source, tmp_path / "again.gguf")
  assert (log.summary()["changed"], reason) == (0, "")
  got, want = tensors(tmp_path / "again.gguf"), tensors(file)
  assert got.keys() == want.keys()
  for name, tensor in want.items():
    assert got[name].type == tensor.type
    assert got[name].data.tobytes() == tensor.data.tobytes(), name
  size = sum(t.data.size for t in want.values())
  count = sum(np.prod(t.shape) for t in want.values())
  assert written.bits_per_weight == pytest.approx(8 * size / count)
  assert not written.otherwise


@pytest.mark.slow
def test_our_checkpoint_keeps_every_byte(source, file, tmp_path):
  convert.to_orbax(source, tmp_path / "ours")
  again = sources.open_source(tmp_path / "ours")
  convert.to_gguf(again, tmp_path / "again.gguf")
  got, want = tensors(tmp_path / "again.gguf"), tensors(file)
  assert {k: (t.type, t.data.tobytes()) for k, t in got.items()} == {
    k: (t.type, t.data.tobytes()) for k, t in want.items()
  }


@pytest.mark.parametrize("kind", ["IQ2_XXS", "IQ3_S", "IQ1_M", "Q8_1", "I8"])
def test_types_that_are_not_known_are_named(kind, file, tmp_path):
  found = gguf.open_gguf(file)
  name = "blk.0.attn_q.weight"
  raw = np.zeros(gguf.nbytes(kind, found.tensors[name].shape), np.uint8)
  bad = {**found.tensors}
  bad[name] = gguf.Tensor(kind, bad[name].shape, raw)
  gguf.write_gguf(tmp_path / "bad.gguf", found.metadata, bad)
  with pytest.raises(
    UserError, match=f"{name}' has type {kind}; supported: F32"
  ):
    load_gguf(tmp_path / "bad.gguf")


def test_blocks_along_another_axis_are_no_rows_of_a_file():
  w = qtensor.pack(np.ones((256, 256), np.float32), ggml.TYPES["Q4_K"])
  assert ggml.is_stored(w, -2)
  assert not ggml.is_stored(w, -1)
  moved = dataclasses.replace(w, order=jnp.arange(256, dtype=jnp.int32))
  assert not ggml.is_stored(moved, -2)


# Mixtures --------------------------------------------------------------------


def test_a_mixture_is_refused_where_rows_are_no_whole_blocks(source, tmp_path):
  message = (
    "GGUF: blk.0.attn_output.weight has rows of 32 weights, which Q4_K "
    "cannot hold: expected a multiple of 256"
  )
  with pytest.raises(UserError, match=re.escape(message)):
    convert.to_gguf(source, tmp_path / "x.gguf", Recipe("Q4_K_M"))
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Q4_K_M", "IQ4_XS"])
@pytest.mark.sample(2, 1)
def test_fallbacks_are_listed_and_all_else_is_the_mixture(
  name, source, tmp_path
):
  to = tmp_path / "x.gguf"
  _, _, written = convert.to_gguf(source, to, Recipe(name, fallback=True))
  shape = mixtures.Shape(depth=2, group=2, tied=True)
  base = mixtures.MIXTURES[name].base
  for layer in (0, 1):
    for part in ("attn_output", "ffn_down"):
      want, have = written.otherwise.pop(f"blk.{layer}.{part}.weight")
      assert have == mixtures.FALLBACKS[want]
  assert not written.otherwise
  found = {k: t.type for k, t in tensors(to).items() if len(t.shape) > 1}
  assert found["token_embd.weight"] == "Q6_K"
  assert found["blk.1.ffn_up.weight"] == base
  assert found["blk.1.attn_v.weight"] == mixtures.target_type(
    name, "attention/v", 1, shape
  )
  assert gguf.open_gguf(to).metadata["general.file_type"] == FILE_TYPES[name]


def test_names_of_mixtures_are_checked():
  with pytest.raises(UserError, match="gguf:Q9_K: expected one of .*Q4_K_M"):
    Recipe("Q9_K")
  with pytest.raises(UserError, match="gguf:Q8_K: expected one of"):
    Recipe("Q8_K")


# Importances -----------------------------------------------------------------


@pytest.fixture(scope="module")
def collected():
  model = support.model(depth=2, width=32, hidden=48, head_dim=8, vocab=64)
  params = support.params(model)
  tokens = np.asarray(support.tokens(3, 10, 64))
  return model, params, tokens, imatrix.collect(model, params, tokens, batch=2)


def test_importances_are_sums_of_squares(collected):
  model, params, tokens, found = collected
  assert set(found.squares) == {
    f"blk.{i}.{name}" for i in (0, 1) for name in imatrix.NAMES.values()
  }
  assert set(found.counts.values()) == {float(tokens.size)}
  first = next(iter(tree.layers(params)))
  x = np.asarray(params["embed"], np.float64)[tokens] * model.embed_scale
  mean = np.mean(x**2, -1, keepdims=True) + model.norm.eps
  x = x / np.sqrt(mean) * np.asarray(first["attention_norm"]["scale"])
  want = (x.reshape(-1, x.shape[-1]) ** 2).sum(0)
  for name in ("attn_q", "attn_k", "attn_v"):
    got = found.squares[f"blk.0.{name}.weight"]
    np.testing.assert_allclose(got, want, rtol=1e-5)
  assert found.squares["blk.1.ffn_down.weight"].shape == (48,)


def test_a_file_of_importances_comes_back(collected, tmp_path):
  found = collected[-1]
  imatrix.write(tmp_path / "i.gguf", found)
  again = imatrix.read(tmp_path / "i.gguf")
  assert (again.windows, again.length) == (3, 10)
  assert again.counts == found.counts
  chex.assert_trees_all_equal(again.squares, found.squares)
  name = "blk.0.attn_q.weight"
  np.testing.assert_allclose(
    again.means()[name], found.squares[name] / 30, rtol=1e-6
  )


def importances(source, rng):
  return {
    name: rng.random(t.shape[-1]).astype(np.float32) ** 4
    for name, t in tensors(source.origin["path"]).items()
    if name.startswith("blk.") and len(t.shape) > 1
  }


@pytest.mark.slow
def test_importances_weigh_the_encoding(source, tmp_path):
  given = importances(source, np.random.default_rng(1))
  recipe = Recipe("Q3_K_S", True, given)
  convert.to_gguf(source, tmp_path / "x.gguf", recipe)
  plain = source.parts
  found = tensors(tmp_path / "x.gguf")
  for name, path in (("ffn_up", "mlp/up"), ("attn_output", "attention/o")):
    whole = f"blk.1.{name}.weight"
    part = next(p for a, p in plain.items() if (a.layer, a.path) == (1, path))
    x = np.asarray(part.read().dense()).T
    kind = found[whole].type
    raw = tensor_types.encode(kind, x, given[whole])
    assert found[whole].data.tobytes() == raw.tobytes()
    assert (raw != tensor_types.encode(kind, x)).any()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda i: i.pop("blk.1.ffn_up.weight"), "has no entry for blk.1.ffn_up"),
    (
      lambda i: i.update({"blk.1.ffn_up.weight": np.ones(5, np.float32)}),
      r"ffn_up.weight has importances of shape \[5\], expected \[256\]",
    ),
  ],
)
def test_importances_of_another_model_are_refused(
  change, message, source, tmp_path
):
  given = importances(source, np.random.default_rng(1))
  change(given)
  recipe = Recipe("Q3_K_S", True, given)
  with pytest.raises(UserError, match=message):
    convert.to_gguf(source, tmp_path / "x.gguf", recipe)


GOOD = {"a.in_sum2": [1.0, 2.0], "a.counts": [2.0]}


@pytest.mark.parametrize(
  ("metadata", "arrays", "message"),
  [
    ({}, GOOD, "general.type is None, expected 'imatrix'"),
    (None, {}, "no tensors, expected sums of squares"),
    (None, {"a.in_sum2": [1.0]}, "'a' has sums or counts, expected both"),
    (None, GOOD | {"a.in_sum2": [1, -1.0]}, "expected numbers from 0 on"),
    (None, GOOD | {"a.counts": [np.nan]}, "expected numbers from 0 on"),
    (None, GOOD | {"b": [1.0]}, r"neither \*.in_sum2 nor"),
    (None, GOOD | {"a.in_sum2": np.ones((2, 3))}, "experts are not supported"),
    (
      {"general.type": "imatrix", "imatrix.chunk_size": "x"},
      GOOD,
      "imatrix.chunk_size is x, expected a number",
    ),
  ],
)
def test_bad_files_of_importances(metadata, arrays, message, tmp_path):
  found = {}
  for name, x in arrays.items():
    x = np.asarray(x, np.float32)
    found[name] = gguf.Tensor("F32", x.shape, tensor_types.encode("F32", x))
  if metadata is None:
    metadata = {"general.type": "imatrix"}
  gguf.write_gguf(tmp_path / "i.gguf", metadata, found)
  with pytest.raises(UserError, match=message):
    imatrix.read(tmp_path / "i.gguf")
