"""Which operations on inputs work row by row, and what follows for a model.

A scale of a whole tensor is that of all rows of a call. So a call may not drop
rows that it needs no result for, and other rows, padding and chunks are no
business of operations that say they are row-wise.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree, weights
from research.quant import ops, qtensor
from research.quant.activations import (
  Inputs,
  InputTensor,
  Op,
  Round,
  RoundFloat,
)
from research.quant.algorithms.rotate import Hadamard
from research.quant.llm_int8 import INT8, Outliers
from tests import support

ROWS = {  # operation, static scale
  "none": (Op(), None),
  "rotated": (Hadamard(), None),
  "token": (Round(), None),
  "group": (Round(bits=4, group=8, symmetric=False), None),
  "token fp8": (RoundFloat(), None),
  "static": (Round(bits=4, per="tensor"), 0.2),
  "static fp8": (RoundFloat(per="tensor"), 0.01),
  "no outliers": (Outliers(threshold=0.0), None),
}
TENSORS = {
  "8 bits": (Round(per="tensor", integer=True), None),
  "4 bits": (Round(bits=4, per="tensor", full=True), None),
  "zeros": (Round(bits=4, per="tensor", symmetric=False), None),
  "fp8": (RoundFloat(per="tensor"), None),
  "outliers": (Outliers(threshold=1.5), None),
}
EVERY = ROWS | TENSORS


def test_all_operations_are_here():
  assert {type(op) for op, _ in EVERY.values()} == set(ops.OPS.values())


@pytest.mark.parametrize("name", EVERY)
def test_an_operation_says_whether_it_is_row_wise(name):
  """Its product, packed or not, with rows alone and between larger ones."""
  op, scale = EVERY[name]
  x = np.random.default_rng(0).standard_normal((2, 6, 32)).astype("f4")
  x[:, 2:4] *= 8  # which the result is not wanted for
  w = jax.random.normal(jax.random.key(1), (32, 12))
  apart = []
  for leaf in (w, qtensor.pack(w, INT8)):
    tensor = InputTensor(leaf, scale, op)
    multiply = functools.partial(weights.einsum, "...d,df->...f", w=tensor)
    want = np.asarray(multiply(x=jnp.asarray(x)))[:, :2]
    off = np.abs(np.asarray(multiply(x=jnp.asarray(x[:, :2]))) - want).max()
    # Sums of 32 products in fp32, against one step of 8 bits.
    apart.append(off / np.abs(want).max() > 1e-5)
    assert weights.row_wise({"w": tensor}) == (name in ROWS)
  assert apart == [name in TENSORS] * 2


@functools.cache
def network():
  model = support.model(depth=2, hidden=48)
  return model, tree.unroll(support.params(model))


def rounded(name):
  """Returns the parameters with an operation on all inputs of matrices."""
  op, scale = EVERY[name]
  params = Inputs(op=op)(network()[1])

  def fixed(w):
    if not isinstance(w, InputTensor) or scale is None:
      return w
    return dataclasses.replace(w, scale=jnp.full(w.shape[:1], scale))

  return jax.tree.map(fixed, params, is_leaf=weights.is_weight)


@functools.partial(jax.jit, static_argnums=(0,))
def states(model, params, tokens, keep=None, lengths=None):
  return model.apply({"params": params}, tokens, lengths=lengths, keep=keep)[0]


SLOW = "zeros", "group", "static fp8", "none", "rotated", "token fp8"


@pytest.mark.parametrize(
  "name",
  [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in EVERY],
)
def test_some_states_are_those_of_the_whole_pass(name):
  model, params = network()[0], rounded(name)
  tokens = support.tokens(2, 12, model.vocab_size)
  keep = jnp.array([[2, 9], [11, 0]])
  every = np.asarray(states(model, params, tokens))
  some = states(model, params, tokens, keep)
  want = np.take_along_axis(every, np.asarray(keep)[..., None], axis=1)
  np.testing.assert_allclose(some, want, atol=1e-4 * np.abs(want).max())
  # A row between others, and before padding, is the row alone for operations
  # that are row-wise, and for no other.
  alone = np.asarray(states(model, params, tokens[:1, :8]))
  off = np.abs(alone - every[:1, :8]).max()
  assert (off > 1e-4 * np.abs(alone).max()) == (name in TENSORS)
