"""Tests outlier rows: the right ones, exact, and worth their bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree
from research.quant import methods, quantize_by_rules
from research.quant.algorithms import outlier_rows
from research.quant.algorithms.gptq import GPTQ
from research.quant.algorithms.outlier_rows import KeepOutlierRows
from research.quant.formats.affine import Affine
from research.quant.methods import GPTQMethod, RoundToNearest
from research.quant.quantize_by_rules import Quantization, Rule
from research.typing import UserError
from tests import support

FORMAT = Affine(bits=3, block=16)
LARGE = (5, 37, 40)


@functools.cache
def problem():
  """Returns two matrices `[64, 24]` and inputs; three of those are large."""
  rng = np.random.default_rng(0)
  ws = rng.normal(size=(2, 64, 24)).astype(np.float32)
  x = rng.normal(size=(512, 64)) @ (
    np.eye(64) + 0.2 * rng.normal(size=(64,) * 2)
  )
  x[:, LARGE] *= 20
  seen = {
    "xx": jnp.asarray(x.T @ x, jnp.float32),
    "n": jnp.full((64,), 512.0),
  }
  return tuple(jnp.asarray(w) for w in ws), seen, x


def rounded(method, seen=True, format=FORMAT):
  ws, known, _ = problem()
  packed, _, measures = methods.round_matrices(
    ws, known if seen else None, format, method
  )
  return packed, measures


def output_error(w, q):
  x = problem()[2]
  y = x @ np.float64(w)
  return np.sqrt(((x @ np.float64(q.dense()) - y) ** 2).sum() / (y**2).sum())


@pytest.mark.slow
@pytest.mark.parametrize(
  "inner",
  [
    RoundToNearest(),
    GPTQMethod(),
    GPTQMethod(options=GPTQ(order="activations")),
  ],
)
@pytest.mark.sample(3)
def test_the_most_sensitive_rows_are_kept_exactly(inner):
  packed, measures = rounded(KeepOutlierRows(method=inner, rows=3))
  plain, _ = rounded(inner)
  for w, q, p, m in zip(problem()[0], packed, plain, measures, strict=True):
    np.testing.assert_array_equal(q.outliers["rows"], LARGE)
    kept = np.asarray(w)[list(LARGE)].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(q.dense())[list(LARGE)], kept)
    got, was = output_error(w, q), output_error(w, p)
    # Large inputs have most of the error.
    assert got < was / 3
    assert float(m.output_error) == pytest.approx(got, rel=0.02)
    # Of 16 bits a number, and which.
    more = 8 * (3 * 24 * 2 + 3 * 4) / (64 * 24)
    assert q.bits_per_weight == pytest.approx(p.bits_per_weight + more)


def test_costs_are_what_keeping_each_row_would_save():
  ws, seen, x = problem()
  off = np.asarray(FORMAT.decode(FORMAT.encode(ws[0]))) - np.asarray(ws[0])
  want = [
    np.square(x[:, j, None] * off[j]).sum(-1).mean() for j in range(len(off))
  ]
  got = outlier_rows.rounding_costs(ws[0], seen, FORMAT)
  np.testing.assert_allclose(got, want, rtol=1e-4)
  # Without inputs, of rows alone.
  got = outlier_rows.rounding_costs(ws[0], None, FORMAT)
  np.testing.assert_allclose(got, np.square(off).sum(-1), rtol=1e-4)


def test_an_outlier_row_widens_no_grid():
  w = np.random.default_rng(1).normal(size=(64, 24)).astype(np.float32)
  w[9] *= 100
  packed, _, _ = methods.round_matrices(
    (jnp.asarray(w),), None, FORMAT, KeepOutlierRows(rows=1)
  )
  np.testing.assert_array_equal(packed[0].outliers["rows"], [9])
  rest = np.delete(np.asarray(packed[0].dense()), 9, 0)
  want = np.delete(w, 9, 0)
  assert np.sqrt(np.mean((rest - want) ** 2)) < 0.25
  plain = methods.round_matrices(
    (jnp.asarray(w),), None, FORMAT, RoundToNearest()
  )[0][0]
  rest = np.delete(np.asarray(plain.dense()), 9, 0)
  assert np.sqrt(np.mean((rest - want) ** 2)) > 0.4


@pytest.mark.slow
def test_in_a_model_by_rules():
  model = support.model()
  params = support.params(model)
  rule = Rule(
    match="^layers/", format=Affine(block=4), method=KeepOutlierRows(rows=2)
  )
  packed, report = Quantization(rules=(rule,)).run(params)
  assert {row.method for row in report.rows} == {"nearest, 2 rows apart"}
  for layer, old in zip(tree.layers(packed), tree.layers(params), strict=True):
    for path, w in quantize_by_rules.matrices(layer).items():
      rows = np.asarray(w.outliers["rows"])
      want = np.asarray(quantize_by_rules.matrices(old)[path])[rows]
      np.testing.assert_allclose(w.outliers["values"], want, rtol=1e-3)
  read = jax.jit(lambda p: model.apply({"params": p}, support.tokens())[0])
  dense = jax.tree.map(
    lambda w: w.dense() if hasattr(w, "dense") else w,
    packed,
    is_leaf=lambda w: hasattr(w, "dense"),
  )
  np.testing.assert_allclose(read(packed), read(dense), rtol=1e-4, atol=1e-4)


def test_each_expert_has_its_own_rows():
  ws, seen, _ = problem()
  both = jax.tree.map(lambda x: jnp.stack([x, x]), seen)
  both["xx"] = both["xx"].at[1, LARGE].set(0).at[1, :, LARGE].set(0)
  found, _, _ = methods.round_matrices(
    (jnp.stack([ws[0], ws[1]]),), both, FORMAT, KeepOutlierRows(rows=3)
  )
  rows = np.asarray(found[0].outliers["rows"])
  np.testing.assert_array_equal(rows[0], LARGE)
  assert not set(rows[1]) & set(LARGE)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (
      lambda: rounded(KeepOutlierRows(rows=64)),
      "expected fewer than the matrix's 64",
    ),
    (
      lambda: KeepOutlierRows(method=GPTQMethod(options=GPTQ(drift=1.0))),
      "GPTQ.drift moves rows",
    ),
  ],
)
def test_mistakes(make, message):
  with pytest.raises(UserError, match=message):
    make()
