"""Per-layer embeddings: every layer gets a small vector of each token.

Gemma 3n's and Gemma 4's, as transformers computes them. A vector has a part
that depends on the token alone, out of a table, and one that depends on the
input of the first layer, which for an image is what the encoder made of it.
"""

import math

import jax.numpy as jnp
from flax import linen as nn

from research import sharding, weights
from research.nn.mlp import ACTIVATIONS, Activation
from research.nn.norm import RMSNorm
from research.typing import Array, Float, Int


class PerLayerInputs(nn.Module):
  """What each of L layers gets of each token.

  Attributes:
    depth: L.
    size: of a vector, `P`.
    vocab: rows of the table.
    norm: of the part that depends on the input.
    padding: the row of tokens that stand for an image.
  """

  depth: int
  size: int
  vocab: int
  norm: RMSNorm
  padding: int = 0

  @nn.compact
  def __call__(
    self, ids: Int[Array, "B T"], x: Float[Array, "B T D"]
  ) -> Float[Array, "B T L P"]:
    """Returns the vectors of all layers.

    Args:
      ids: tokens.
      x: input of the first layer.
    """
    init, size = nn.initializers.normal(0.02), self.depth * self.size
    table = weights.weight(self, "embed", init, (self.vocab, size))
    words = weights.take(table, ids).astype(x.dtype) * math.sqrt(self.size)
    y = weights.project(self, x, "project", size) / math.sqrt(x.shape[-1])
    words, y = (t.reshape(*x.shape[:2], self.depth, -1) for t in (words, y))
    return (self.norm(y) + words) / math.sqrt(2)


class PerLayerUpdate(nn.Module):
  """`norm(down(act(gate(x)) * vector))`, which a layer adds to its output.

  Attributes:
    norm: of the result.
    activation: of the gate.
  """

  norm: RMSNorm
  activation: Activation = "gelu_tanh"

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], vector: Float[Array, "B T P"]
  ) -> Float[Array, "B T D"]:
    """Returns the change.

    Args:
      x: the layer's output.
      vector: what the layer gets of each token.
    """
    gate = weights.project(self, x, "gate", vector.shape[-1])
    y = ACTIVATIONS[self.activation](gate) * vector
    y = sharding.constrain(y, "batch", "length", None)
    return self.norm(weights.project(self, y, "down", x.shape[-1]))


def of_run(
  vectors: Float[Array, "B T L P"], start: int, repeats: int, period: int
) -> list[Float[Array, "N B T P"]]:
  """Returns the vectors of a run's layers, for each layer of its period.

  Args:
    vectors: of all layers.
    start: number of the run's first layer.
    repeats: N, how often its period repeats.
    period: layers of the period.
  """
  end = start + repeats * period
  return [
    jnp.moveaxis(vectors[:, :, start + j : end : period], 2, 0)
    for j in range(period)
  ]
