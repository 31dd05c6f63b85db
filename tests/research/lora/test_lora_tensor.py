"""Tests LoRA against the dense formula, in value and gradient."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import weights
from tests.support_lora import lora, with_arrays

IN, OUT, RANK, SCALE = 5, 7, 3, 1.5
# fp32 sums of at most a few dozen products of size about 1.
TOL = dict(rtol=1e-5, atol=1e-5)


def draw(*shape, seed=0):
  generator = np.random.default_rng([seed, *shape])
  return jnp.asarray(generator.standard_normal(shape), jnp.float32)


def make(w, lead=(), **options):
  a, b = draw(*lead, RANK, IN, seed=1), draw(*lead, RANK, OUT, seed=2)
  return lora(w, a, b, scale=SCALE, **options)


def summed(w, base=None):
  """Returns the merged matrix in fp64 NumPy."""
  a, b = (
    np.asarray(w.trained["a"], np.float64),
    np.asarray(w.trained["b"], np.float64),
  )
  base = np.asarray(w.w if base is None else base, np.float64)
  return base + SCALE * np.swapaxes(a, -1, -2) @ b


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Halves(weights.Weight):
  """A toy packed weight: twice its value is stored, in int8."""

  codes: Any

  shape = property(lambda self: self.codes.shape)
  dtype = property(lambda self: jnp.dtype("float32"))

  def dense(self):
    return self.codes.astype(jnp.float32) / 2

  def einsum(self, eq, x):
    return jnp.einsum(eq, x, self.dense().astype(x.dtype))

  def take(self, ids):
    return jnp.take(self.dense(), ids, axis=0)

  def ragged_dot(self, x, sizes):
    return jax.lax.ragged_dot(x, self.dense(), sizes)

  def axes(self, names):
    return Halves(names)

  def bind(self, *, key, ids):
    return self


def halves(*shape):
  generator = np.random.default_rng(3)
  return Halves(jnp.asarray(generator.integers(-9, 9, shape), jnp.int8))


BASES = {"array": lambda *s: draw(*s), "packed": halves}


@pytest.fixture(params=BASES)
def base(request):
  return BASES[request.param]


def test_golden_of_the_specification():
  # research/lora/MATH.md 4, worked out by hand in the torch layout.
  w = jnp.array([[1.0, 2.0, -1.0], [0.5, -1.0, 3.0]]).T
  a, b = jnp.array([[1.0, 0.0, 2.0]]), jnp.array([[0.5, -1.0]])
  t = lora(w, a, b, scale=2.0)
  y = weights.einsum("i,io->o", jnp.array([1.0, -1.0, 2.0]), t)
  chex.assert_trees_all_close(y, jnp.array([2.0, -2.5]))
  update = jnp.array([[1.0, 0.0, 2.0], [-2.0, 0.0, -4.0]]).T
  chex.assert_trees_all_close(weights.dense(t) - w, update)


@pytest.mark.parametrize(
  "eq, shape, right",
  [
    ("...d,df->...f", (2, 3, IN), lambda x, m: x @ m),
    ("...d,vd->...v", (2, 3, OUT), lambda x, m: x @ m.T),
    ("d,df->f", (IN,), lambda x, m: x @ m),
  ],
)
def test_einsum_on_either_side(base, eq, shape, right):
  t, x = make(base(IN, OUT)), draw(*shape, seed=9)
  want = right(np.asarray(x, np.float64), summed(t, weights.dense(t.w)))
  got = jax.jit(lambda t, x: weights.einsum(eq, x, t))(t, x)
  np.testing.assert_allclose(got, want, **TOL)


def test_take_dense_and_ragged_dot(base):
  t = make(base(IN, OUT))
  whole = summed(t, weights.dense(t.w))
  np.testing.assert_allclose(weights.dense(t), whole, **TOL)
  ids = jnp.array([[4, 0], [4, 2]])
  np.testing.assert_allclose(weights.take(t, ids), whole[ids], **TOL)
  experts, sizes = make(base(2, IN, OUT), lead=(2,)), jnp.array([1, 3])
  x = draw(4, IN, seed=9)
  whole = summed(experts, weights.dense(experts.w))
  want = np.concatenate([x[:1] @ whole[0], x[1:] @ whole[1]])
  got = weights.ragged_dot(x, experts, sizes)
  np.testing.assert_allclose(got, want, **TOL)


@pytest.mark.parametrize("eq, size", [("td,df->tf", IN), ("td,vd->tv", OUT)])
def test_gradients_are_those_of_the_dense_formula(base, eq, size):
  t, x = make(base(IN, OUT)), draw(4, size, seed=9)
  m = weights.dense(t.w)

  def ours(x, a, b):
    y = weights.einsum(eq, x, with_arrays(t, a=a, b=b))
    return jnp.sum(jnp.sin(y / 8))

  def formula(x, a, b):
    return jnp.sum(jnp.sin(jnp.einsum(eq, x, m + SCALE * a.T @ b) / 8))

  chex.assert_trees_all_close(
    jax.jit(jax.grad(ours, (0, 1, 2)))(x, t.trained["a"], t.trained["b"]),
    jax.jit(jax.grad(formula, (0, 1, 2)))(x, t.trained["a"], t.trained["b"]),
    **TOL,
  )


def test_gradients_under_scan_and_checkpoint(base):
  n = 3
  t, x = make(base(n, IN, OUT), lead=(n,)), draw(4, IN, seed=9)
  back = draw(OUT, IN, seed=8) / 4

  def stacked(a, b):
    @jax.checkpoint
    def body(x, w):
      return jnp.sin(weights.einsum("td,df->tf", x, w)) @ back, None

    return jnp.sum(jax.lax.scan(body, x, with_arrays(t, a=a, b=b))[0])

  def looped(a, b):
    y = x
    for k in range(n):
      m = weights.dense(t.w)[k] + SCALE * a[k].T @ b[k]
      y = jnp.sin(y @ m) @ back
    return jnp.sum(y)

  chex.assert_trees_all_close(
    jax.jit(jax.grad(stacked, (0, 1)))(t.trained["a"], t.trained["b"]),
    jax.jit(jax.grad(looped, (0, 1)))(t.trained["a"], t.trained["b"]),
    rtol=1e-4,
    atol=1e-4,
  )


def test_zero_b_is_bitwise_the_base(base):
  t = make(base(IN, OUT))
  t = with_arrays(t, b=jnp.zeros_like(t.trained["b"]))
  x = draw(4, IN, seed=9)
  got, want = (
    jax.jit(lambda w, x: weights.einsum("td,df->tf", x, w))(w, x)
    for w in (t, t.w)
  )
  chex.assert_trees_all_equal(got, want)
  chex.assert_trees_all_equal(weights.dense(t), weights.dense(t.w))


def test_outputs_have_the_dtype_of_activations():
  t = make(draw(IN, OUT).astype(jnp.bfloat16))
  x = draw(4, IN).astype(jnp.bfloat16)
  assert weights.einsum("td,df->tf", x, t).dtype == jnp.bfloat16
  assert weights.take(t, jnp.array([0])).dtype == jnp.bfloat16
  assert weights.dense(t).dtype == jnp.bfloat16
  assert (t.shape, t.dtype) == ((IN, OUT), jnp.bfloat16)


def dropped(t, x, key=None):
  t = weights.bind({"w": t}, key=key)["w"]
  return weights.einsum("td,df->tf", x, t)


def test_dropout_follows_its_key_and_spares_the_base():
  t = make(draw(IN, OUT), dropout=0.5)
  x = draw(4, IN, seed=9)
  one, two = jax.random.split(jax.random.key(0))
  chex.assert_trees_all_equal(dropped(t, x, one), dropped(t, x, one))
  assert (dropped(t, x, one) != dropped(t, x, two)).any()
  np.testing.assert_allclose(dropped(t, x), x @ summed(t), **TOL)
  # What the key changes is the branch alone, by whole inputs, doubled or not.
  branch = np.asarray(dropped(t, x, one) - x @ t.w, np.float64)
  bound = weights.bind({"w": t}, key=one)["w"]
  keep = np.asarray(jax.random.bernoulli(bound.key, 0.5, x.shape))
  assert 0 < keep.mean() < 1
  want = (x * keep * 2) @ (summed(t) - np.asarray(t.w))
  np.testing.assert_allclose(branch, want, **TOL)


def test_dropout_is_unbiased():
  t, x = make(jnp.zeros((IN, OUT)), dropout=0.25), draw(1, IN, seed=9)
  keys = jax.random.split(jax.random.key(1), 4096)
  got = jax.jit(jax.vmap(lambda k: dropped(t, x, k)))(keys)
  error = got.std(0) / len(keys) ** 0.5
  assert (abs(got.mean(0) - x @ summed(t)) < 5 * error).all()


def test_stacked_layers_have_their_own_dropout():
  t = make(jnp.zeros((2, IN, OUT)), lead=(2,), dropout=0.5)
  same = with_arrays(
    t,
    a=t.trained["a"].at[1].set(t.trained["a"][0]),
    b=t.trained["b"].at[1].set(t.trained["b"][0]),
  )
  bound = weights.bind({"w": same}, key=jax.random.key(0))["w"]
  x = draw(4, IN, seed=9)

  def layer(x, w):
    return x, weights.einsum("td,df->tf", x, w)

  _, y = jax.jit(lambda w: jax.lax.scan(layer, x, w))(bound)
  assert (y[0] != y[1]).any()


def test_axes_follow_the_weight(base):
  t = make(base(2, IN, OUT), lead=(2,))
  got = weights.axes(t, ("embed", "heads"))
  assert (got.trained["a"], got.trained["b"]) == (
    (None, None, "embed"),
    (None, None, "heads"),
  )


def test_an_einsum_that_is_not_a_linear_map():
  with pytest.raises(ValueError, match="one contracted and one kept axis"):
    weights.einsum("td,df->tdf", draw(2, IN), make(draw(IN, OUT)))
