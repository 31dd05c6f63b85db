"""Tests each matrix's errors against explicit products, sizes by counting."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree
from research.quant.formats.affine import Affine
from research.quant.quantize import Quantize
from research.quant.reports import report_errors
from research.typing import UserError
from tests import support

FORMAT = Affine(bits=4, block=4, symmetric=True, scale_dtype="float32")


@pytest.fixture(scope="module", name="pair")
def _pair():
  model = support.model(depth=2)
  params = support.params(model)
  other = Quantize(format=FORMAT, targets=("q", "down"))(params)
  return model, params, other, np.asarray(support.tokens(2, 16))


def test_errors_are_those_of_each_matrix_on_the_base_s_inputs(pair):
  model, params, other, tokens = pair
  found = report_errors.errors(model, params, other, tokens)
  assert list(found) == [
    f"layers/{i}/{name}"
    for i in range(2)
    for name in ("attention/q", "mlp/down")
  ]
  # The first layer's queries read normalised embeddings: by hand.
  layer = next(tree.layers(params))
  x = np.asarray(params["embed"], np.float64)[tokens]
  x = x * model.embed_scale
  x /= np.sqrt((x**2).mean(-1, keepdims=True) + model.norm.eps)
  x = (x * np.asarray(layer["attention_norm"]["scale"])).reshape(-1, 32)
  w, new = (
    np.asarray(
      next(tree.layers(p))["attention"]["q"]
      if p is params
      else other["run0"]["layer0"]["attention"]["q"].dense()[0],
      np.float64,
    )
    for p in (params, other)
  )
  y, e = x @ w, x @ (new - w)
  each = np.linalg.norm(e, axis=-1) / np.linalg.norm(y, axis=-1)
  q = found["layers/0/attention/q"]
  assert q["output"] == pytest.approx(np.median(each), rel=1e-3)
  whole = np.linalg.norm(e) / np.linalg.norm(y)
  assert q["output_all"] == pytest.approx(whole, rel=1e-3)
  size = np.linalg.norm(new - w) / np.linalg.norm(w)
  assert q["weight"] == pytest.approx(size, rel=1e-4)
  assert q["inputs"] == pytest.approx(abs(x).max() / abs(x).mean(), rel=1e-4)
  assert q["weights"] == pytest.approx(abs(w).max() / abs(w).mean(), rel=1e-4)


def test_an_error_does_not_depend_on_errors_before_it(pair):
  model, params, other, tokens = pair
  whole = report_errors.errors(model, params, other, tokens)
  last = Quantize(format=FORMAT, targets=("down",))(params)
  alone = report_errors.errors(model, params, last, tokens)
  assert len(alone) == 2
  for address, row in alone.items():
    assert row == pytest.approx(whole[address], rel=1e-4)


def test_trees_in_other_runs_are_matched_by_layer(pair):
  model, params, other, tokens = pair
  want = report_errors.errors(model, params, other, tokens)
  found = report_errors.errors(model, params, tree.unroll(other), tokens)
  assert found.keys() == want.keys()
  for address, row in want.items():
    assert found[address] == pytest.approx(row, rel=1e-4)


def test_equal_trees_are_refused(pair):
  model, params, _, tokens = pair
  with pytest.raises(UserError, match="two equal trees"):
    report_errors.errors(model, params, params, tokens)


def test_a_probe_does_not_change_the_model(pair):
  _, params, other, _ = pair
  w = params["run0"]["layer0"]["attention"]["q"][0]
  new = jax.tree.map(lambda x: x[0], other["run0"]["layer0"]["attention"]["q"])
  x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 32)), "f4")
  probe = report_errors.Probe(
    w, new, jnp.zeros((2, 5, report_errors.NUM_STATS))
  )
  y = probe.einsum("...d,df->...f", x)
  np.testing.assert_array_equal(y, jnp.einsum("...d,df->...f", x, w))
  np.testing.assert_array_equal(probe.dense(), w)


def test_sizes_count_everything(pair):
  _, params, other, _ = pair
  found = report_errors.sizes(other)
  # Of 32 x 32 queries and 44 x 32 of down, two layers: 4 bits and a float32
  # scale for each four.
  count = 2 * (32 * 32 + 44 * 32)
  assert found.packed_weights == count
  assert found.bits_per_weight == 4 + 32 / 4
  assert found.packed_bytes == count * 12 // 8
  assert found.nbytes == tree.nbytes(other)
  whole = tree.count(params)
  assert found.model_bits == pytest.approx(8 * found.nbytes / whole)
  plain = report_errors.sizes(params)
  assert plain.packed_weights == 0 and np.isnan(plain.bits_per_weight)
  assert plain.model_bits == 32
  shapes = jax.eval_shape(lambda: other)
  assert dataclasses.astuple(
    report_errors.sizes(shapes)
  ) == dataclasses.astuple(found)
