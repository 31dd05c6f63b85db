"""Dispatch on leaves: arrays and weights equal the dense array."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree, weights
from research.optim.low_rank import int8_weights
from research.quant.formats.codebook import Codebook
from research.quant.quantize import Quantize
from research.quant.untied_embedding import Untied
from tests.support_lora import lora

RNG = np.random.default_rng(0)


def _draw(*shape):
  return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def _lora(*lead, inside=6, outside=5, rank=2, **fields):
  return lora(
    _draw(*lead, inside, outside),
    _draw(*lead, rank, inside),
    _draw(*lead, rank, outside),
    scale=0.5,
    **fields,
  )


LEAVES = {"array": _draw(6, 5), "lora": _lora()}


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("eq", ["...d,df->...f", "...f,df->...d"])
def test_einsum_is_the_dense_one(leaf, eq):
  w = LEAVES[leaf]
  x = _draw(2, 3, 6 if eq.startswith("...d,") else 5)
  found = weights.einsum(eq, x, w)
  expected = np.einsum(
    eq, np.float64(x), np.float64(weights.dense(w)), optimize=True
  )
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("leaf", LEAVES)
def test_take_is_rows_of_the_dense_one(leaf):
  w, ids = LEAVES[leaf], jnp.asarray([[0, 5], [3, 3]])
  chex.assert_trees_all_close(
    weights.take(w, ids), weights.dense(w)[ids], rtol=1e-6, atol=1e-6
  )


def test_ragged_dot_is_each_expert_on_its_rows():
  w, x = _lora(3), _draw(7, 6)
  sizes = jnp.asarray([2, 0, 5])
  dense = weights.dense(w)
  expected = jnp.concatenate([x[:2] @ dense[0], x[2:] @ dense[2]])
  chex.assert_trees_all_close(
    weights.ragged_dot(x, w, sizes), expected, rtol=1e-5, atol=1e-5
  )


def test_compute_dtype_is_that_of_the_activations():
  x = _draw(2, 6).astype(jnp.bfloat16)
  for w in LEAVES.values():
    assert weights.einsum("...d,df->...f", x, w).dtype == jnp.bfloat16


@pytest.mark.parametrize(
  "eq, shape",
  [
    ("...d,df->...f", (1, 6)),
    ("...f,df->...d", (1, 1, 5)),
    ("td,df->ft", (1, 6)),  # the row's axis is not the output's first
    ("nd,df->f", (1, 6)),  # nor is it kept
  ],
)
def test_a_single_row_in_bfloat16_is_that_row(eq, shape):
  """One row is computed as two where XLA is slow with one."""
  x, w = _draw(*shape).astype(jnp.bfloat16), LEAVES["array"]
  exact = w.astype(jnp.bfloat16).astype(jnp.float32)

  def value(x, w):
    return weights.einsum(eq, x, w).astype(jnp.float32)

  def expected(x, w):
    return jnp.einsum(eq, x.astype(jnp.float32), w)

  # Rounded once, to 8 bits; sums of six products may cancel.
  chex.assert_trees_all_close(
    value(x, w), expected(x, exact), rtol=2**-7, atol=2**-6
  )
  chex.assert_trees_all_close(
    jax.grad(lambda w: value(x, w).sum())(w),
    jax.grad(lambda w: expected(x, w).sum())(exact),
    rtol=2**-7,
    atol=2**-6,
  )


@pytest.mark.parametrize("eq", ["...d,df->...f", "...f,df->...d"])
def test_gradients_are_those_of_the_dense_formula(eq):
  w = _lora()
  x = _draw(4, 3, 6 if eq.startswith("...d,") else 5)

  def by_leaf(x, a, b):
    leaf = lora(w.w, a, b, scale=w.method.scale)
    return jnp.sin(weights.einsum(eq, x, leaf)).sum()

  def by_formula(x, a, b):
    dense = w.w + w.method.scale * jnp.einsum("ri,ro->io", a, b)
    return jnp.sin(jnp.einsum(eq, x, dense)).sum()

  arguments = (x, w.trained["a"], w.trained["b"])
  chex.assert_trees_all_close(
    jax.grad(by_leaf, (0, 1, 2))(*arguments),
    jax.grad(by_formula, (0, 1, 2))(*arguments),
    rtol=1e-5,
    atol=1e-5,
  )


def test_zero_b_is_bitwise_the_base():
  w = _lora()
  zero = lora(w.w, w.trained["a"], jnp.zeros_like(w.trained["b"]), scale=3.0)
  x = _draw(3, 6)
  eq = "...d,df->...f"
  chex.assert_trees_all_equal(
    weights.einsum(eq, x, zero), weights.einsum(eq, x, w.w)
  )
  chex.assert_trees_all_equal(weights.dense(zero), w.w)


def test_adapters_of_adapters_add_up():
  inner = _lora()
  outer = lora(inner, _draw(2, 6), _draw(2, 5), scale=2.0)
  x = _draw(3, 6)
  chex.assert_trees_all_close(
    weights.einsum("...d,df->...f", x, outer),
    x @ weights.dense(outer),
    rtol=1e-5,
    atol=1e-5,
  )


def test_low_rank_refuses_an_equation_without_one_contracted_axis():
  with pytest.raises(ValueError, match="one contracted and one kept"):
    weights.einsum("...d,df->...df", _draw(2, 6), LEAVES["lora"])


def test_dropout_needs_a_bound_key_and_differs_a_layer_and_a_leaf():
  params = {"run0": {"q": _lora(4, dropout=0.5), "k": _lora(4, dropout=0.5)}}
  assert weights.bind(params)["run0"]["q"].key is None
  bound = weights.bind(params, key=jax.random.key(3))["run0"]
  keys = [jax.random.key_data(bound[name].key) for name in "qk"]
  assert keys[0].shape[0] == 4
  assert len({tuple(k) for k in np.concatenate(keys)}) == 8
  again = weights.bind(params, key=jax.random.key(3))["run0"]
  chex.assert_trees_all_equal(keys[0], jax.random.key_data(again["q"].key))


def test_dropout_keeps_the_expectation_and_the_base():
  w, x = _lora(dropout=0.25), _draw(1, 6)
  eq = "...d,df->...f"

  @jax.jit
  @jax.vmap
  def sample(key):
    return weights.einsum(eq, x, w.bind(key=key, ids=None))

  found = sample(jax.random.split(jax.random.key(0), 20_000)).mean(0)
  # Standard error of the branch's mean over 20,000 draws of 6 inputs.
  branch = jnp.abs(
    w.method.scale * x[0, :, None] * (w.trained["a"].T @ w.trained["b"])
  ).sum()
  error = float(branch) * np.sqrt(0.25 / 0.75 / 20_000)
  chex.assert_trees_all_close(
    found, weights.einsum(eq, x, w), atol=5 * error, rtol=0
  )


def test_axes_follow_the_weight():
  w = _lora(4)
  named = weights.axes(w, ("embed", "heads"))
  assert named.w == (None, "embed", "heads")
  assert named.trained["a"] == (None, None, "embed")
  assert named.trained["b"] == (None, None, "heads")


def test_a_single_row_is_doubled_in_programs_for_the_cpu_alone():
  row = jax.ShapeDtypeStruct((1, 1, 8), jnp.bfloat16)
  w = jax.ShapeDtypeStruct((8, 4), jnp.bfloat16)
  traced = jax.jit(lambda x, w: weights.einsum("...d,df->...f", x, w)).trace(
    row, w
  )
  found = {
    platform: "concatenate"
    in traced.lower(lowering_platforms=(platform,)).as_text()
    for platform in ("cpu", "tpu")
  }
  assert found == {"cpu": True, "tpu": False}


def _packed(*lead):
  w = jax.random.normal(jax.random.key(0), (*lead, 64, 8))
  return Quantize(format=Codebook()).pack(w)


COUNTED = {  # makes a weight; its parameters
  "array": (lambda: jnp.zeros((3, 4)), 12),
  "packed": (lambda: _packed(2), 2 * 64 * 8),
  "packed, adapted": (
    lambda: lora(_packed(), jnp.zeros((2, 64)), jnp.zeros((2, 8))),
    64 * 8 + 2 * (64 + 8),
  ),
  "adapted twice": (
    lambda: lora(_lora(), _draw(1, 6), _draw(1, 5)),
    30 + 22 + 11,
  ),
  "in codes": (lambda: int8_weights.encode(_draw(2, 64, 8)), 2 * 64 * 8),
  "two in one": (lambda: Untied(_draw(7, 4), _draw(7, 4)), 2 * 28),
}


@pytest.mark.parametrize("name", COUNTED)
def test_parameters_are_those_that_are_meant(name):
  """Logical, not stored, elements; also for shapes and subtrees."""
  make, want = COUNTED[name]
  w = make()
  assert weights.count({"x": w, "y": jnp.zeros(2)}) == want + 2
  assert weights.count(jax.eval_shape(lambda: w)) == want
  learned, rest = tree.partition({"x": w}, "/trained/")
  assert weights.count(learned) + weights.count(rest) == want
