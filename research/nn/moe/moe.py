"""Mixture of experts as a feed-forward (Shazeer et al. 2017, arXiv:1701.06538).

These modules own the weights; `research.nn.moe.mixture` computes with them.
"""

from flax import linen as nn

from research import weights
from research.nn.mlp import Activation, Mlp
from research.nn.moe import mixture
from research.nn.moe.routing import Load, Routing
from research.typing import Array, Bool, Float
from research.weights import AnyWeight


class Experts(nn.Module):
  """The stacked matrices of `E` gated feed-forward experts.

  Attributes:
    experts, hidden: `E`, `F`.
  """

  experts: int
  hidden: int

  @nn.compact
  def __call__(self, width: int) -> dict[str, AnyWeight]:
    """Returns `gate` and `up` `[E, D, F]`, and `down` `[E, F, D]`."""

    def read(name, *size):
      # The leading axis is the expert; it is not part of the fan-in.
      init = nn.initializers.lecun_normal(batch_axis=(0,))
      return weights.weight(self, name, init, (self.experts, *size))

    return {
      "gate": read("gate", width, self.hidden),
      "up": read("up", width, self.hidden),
      "down": read("down", self.hidden, width),
    }


class Moe(nn.Module):
  """`sum_c weight_c expert_c(x)`, plus shared experts that every token uses.

  Attributes:
    routing: how experts are selected and weighted.
    hidden: inner width `F` of each expert.
    activation: activation function of the gates.
    shared: a feed-forward added for every token, or None. DeepSeek's s shared
      experts are a single one of s times the width.
  """

  routing: Routing
  hidden: int
  activation: Activation = "silu"
  shared: Mlp | None = None

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], real: Bool[Array, "B T"] | None = None
  ) -> tuple[Float[Array, "B T D"], Load]:
    """Returns the output, and the router load of the `real` tokens.

    The router always computes in fp32.

    Args:
      x: activations.
      real: false at padding, which is computed but excluded from the load.
    """
    experts = Experts(self.routing.experts, self.hidden, name="experts")
    params = self._router(x.shape[-1]) | experts(x.shape[-1])
    y, load = mixture.mixture(self.routing, self.activation, params, x, real)
    if self.shared is not None:
      y += self.shared(x)
    return y, load

  def _router(self, width):
    """Returns the router's weights, by name."""
    size = self.routing.experts
    init = nn.initializers.lecun_normal()
    params = {"router": weights.weight(self, "router", init, (width, size))}
    if self.routing.biased:
      zeros = nn.initializers.zeros
      params["router_bias"] = weights.weight(
        self, "router_bias", zeros, (size,)
      )
    return params
