"""Gated feed-forward layers (Shazeer 2020, arXiv:2002.05202)."""

import functools
from typing import Literal

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from research import sharding, weights
from research.typing import Array, Float

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"]

ACTIVATIONS = {
  "silu": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP's
  "relu": jax.nn.relu,
}


class Mlp(nn.Module):
  """`(act(x gate) * (x up)) down`.

  Attributes:
    hidden: inner width `F`.
    activation: activation function of the gate.
    bias: whether all three projections have a bias.
  """

  hidden: int
  activation: Activation = "silu"
  bias: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    sizes = {"gate": self.hidden, "up": self.hidden}
    gate, up = weights.project_all(self, x, sizes, self.bias)
    gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
    product = ACTIVATIONS[self.activation](gate) * up
    product = sharding.constrain(product, "batch", "length", "hidden")
    return weights.project(self, product, "down", x.shape[-1], self.bias)


class PlainMlp(nn.Module):
  """`act(x up) down`, without a gate, as in most vision encoders.

  Attributes:
    hidden: inner width `F`.
    activation: activation function.
    bias: whether both projections have a bias.
  """

  hidden: int
  activation: Activation = "gelu"
  bias: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    y = weights.project(self, x, "up", self.hidden, self.bias)
    y = ACTIVATIONS[self.activation](checkpoint_name(y, "up"))
    y = sharding.constrain(y, "batch", "length", "hidden")
    return weights.project(self, y, "down", x.shape[-1], self.bias)
