"""Scalar heads: what a reward or value model has in place of a vocabulary.

They map final hidden states to one or two logits a token, in float32. Their
parameters are the entry `score` of a Transformer's tree, so adapters,
quantizers, shardings and checkpoints treat them like any other matrix outside
of the layers: `all-linear` leaves them alone, `score/out` names one.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from research import weights
from research.typing import Array, Float, PRNGKey

SCORE = "score"
"""The head's entry in a tree of parameters."""


class LinearHead(nn.Module):
  """One linear map, after dropout.

  With two outputs it is transformers' head for token classification, with one
  TRL's value head (Skywork's process reward models).

  Attributes:
    outputs: logits of a token; of two, the second one is of a right step.
    bias: whether the map has one.
    dropout: share of a hidden state's numbers that training leaves out.
  """

  outputs: int = 1
  bias: bool = True
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self, hidden: Float[Array, "B T D"], key: PRNGKey | None = None
  ) -> Float[Array, "B T K"]:
    """Returns logits.

    Args:
      hidden: states after the final norm.
      key: random key of dropout; None for none.
    """
    x = hidden.astype(jnp.float32)
    if key is not None and self.dropout > 0:
      kept = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
      x = jnp.where(kept, x / (1 - self.dropout), 0.0)
    return weights.project(self, x, "out", self.outputs, self.bias)


class MlpHead(nn.Module):
  """`relu(x up) out`, both with a bias: the head of Qwen2.5-Math-PRM.

  Attributes:
    outputs: logits of a token; of two, the second one is of a right step.
  """

  outputs: int = 2

  @nn.compact
  def __call__(
    self, hidden: Float[Array, "B T D"], key: PRNGKey | None = None
  ) -> Float[Array, "B T K"]:
    """Returns logits; there is no dropout."""
    del key
    x = hidden.astype(jnp.float32)
    x = jax.nn.relu(weights.project(self, x, "up", x.shape[-1], bias=True))
    return weights.project(self, x, "out", self.outputs, bias=True)


Head = LinearHead | MlpHead
