"""Muon: the momentum of each matrix, made orthogonal.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
A matrix w [in, out] moves by `-rate u`, where

  m <- b m + (1 - b) g
  u  = newton_schulz(b m + (1 - b) g) sqrt(max(1, out / in))

All directions of its gradient count alike. What is no matrix of a layer
(embeddings, heads, norms, biases) moves by Adam. A step costs fifteen products
of each matrix with itself, whatever the batch, and takes the place of several
of Adam's where batches are small.

By hand, since `optax.contrib.scale_by_muon` (0.2.8) corrects m and g for their
bias apart, so that m counts 0.68 times in the second update, and saves another
state (`test_muon.py` compares both).
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research import ranges, tree
from research.optim import matching, optim
from research.typing import Array, Float

MATRICES = r"^run\d+/.*/(q|k|v|o|gate|up|down)$"
"""Paths of what is multiplied with activations inside a layer."""

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial of degree five, as published: steep at 0."""


def newton_schulz(
  x: Float[Array, "*B I O"], steps: int = 5
) -> Float[Array, "*B I O"]:
  """Returns about the nearest matrix with orthonormal rows or columns.

  The singular values of `x`, over its Frobenius norm, go through
  `p(s) = a s + b s^3 + c s^5` that many times and end near 1, between 0.7 and
  1.2 but for those that begin below a thousandth; its singular vectors stay.

  Args:
    x: matrices behind any axes in front.
    steps: how often.
  """
  a, b, c = COEFFICIENTS
  wide = x.shape[-2] <= x.shape[-1]
  x = x if wide else jnp.swapaxes(x, -1, -2)
  x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)

  def body(_, x):
    square = x @ jnp.swapaxes(x, -1, -2)  # the smaller of the two
    return a * x + (b * square + c * square @ square) @ x

  x = jax.lax.fori_loop(0, steps, body, x)
  return x if wide else jnp.swapaxes(x, -1, -2)


class MuonState(NamedTuple):
  """The momentum."""

  momentum: Any


def scale_by_muon(
  momentum: optim.Number = 0.95, steps: int = 5
) -> optax.GradientTransformation:
  """Returns the transformation `g -> u` of the module's docstring."""
  ranges.check("muon", ranges.Decay, momentum=momentum)
  ranges.check("muon", ranges.PositiveFloat, steps=steps)

  def mix(old, new):
    return momentum * old + (1 - momentum) * new

  def init(params):
    return MuonState(jax.tree.map(jnp.zeros_like, params))

  def update(updates, state, params=None):
    del params
    moved = jax.tree.map(mix, state.momentum, updates)

    def one(m, g):
      inputs, outputs = g.shape[-2:]
      return newton_schulz(mix(m, g), steps) * max(1, outputs / inputs) ** 0.5

    return jax.tree.map(one, moved, updates), MuonState(moved)

  return optax.GradientTransformation(init, update)


def muon(
  learning_rate: optim.Number | optim.Schedule,
  *,
  momentum: optim.Number = 0.95,
  steps: int = 5,
  adam: optim.Number = 0.15,
  b1: optim.Number = 0.9,
  b2: optim.Number = 0.95,
  eps: optim.Number = 1e-8,
  matrices: str = MATRICES,
  clip: optim.Number | None = 1.0,
) -> optax.GradientTransformation:
  """Returns Muon for matrices and Adam for all else, at one schedule.

  Its `init` raises UserError if no trainable array is such a matrix.

  Args:
    learning_rate: a number, or a schedule of the updates done; 0.02 is usual.
    momentum: decay of the mean gradient of a matrix.
    steps: of the Newton-Schulz iteration.
    adam: Adam's rate as a share of `learning_rate`.
    b1: decay of Adam's mean.
    b2: decay of Adam's mean square.
    eps: added to the root of the mean square.
    matrices: regular expression, searched for in the paths of those arrays
      whose last two axes are inputs and outputs of a matrix.
    clip: bound of the gradient's global norm, or None.
  """

  def kinds(params):
    def kind(path, x):
      is_matrix = x.ndim >= 2 and re.search(matrices, path) is not None
      return "matrix" if is_matrix else "other"

    found = tree.map_paths(kind, params)
    if "matrix" not in jax.tree.leaves(found):
      paths = [path for path, _ in tree.flatten_paths(params)]
      raise matching.no_matrix("muon.matrices", matrices, paths)
    return found

  ranges.check("muon", ranges.NonNegativeFloat, adam=adam)
  rest = optax.chain(optim.moments(b1, b2, eps), optax.scale(adam))
  parts = [] if clip is None else [optim.clipped(clip)]
  ways = {"matrix": scale_by_muon(momentum, steps), "other": rest}
  parts.append(optax.partition(ways, kinds))
  return optax.chain(*parts, optim.scale_by_rate(learning_rate))
