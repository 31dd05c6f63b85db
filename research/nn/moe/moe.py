"""Mixture of experts as a feed-forward (Shazeer et al. 2017, arXiv:1701.06538).

Modules that hold the weights; `research.nn.moe.mixture` computes with them.
"""

from flax import linen as nn

from research import weights
from research.nn.mlp import Activation, Mlp
from research.nn.moe import mixture
from research.nn.moe.routing import Load, Routing
from research.typing import Array, Bool, Float
from research.weights import AnyWeight


class Experts(nn.Module):
  """The matrices of `E` gated feed-forwards, stacked.

  Attributes:
    experts, hidden: `E`, `F`.
  """

  experts: int
  hidden: int

  @nn.compact
  def __call__(self, width: int) -> dict[str, AnyWeight]:
    """Returns `gate` and `up` `[E, D, F]`, and `down` `[E, F, D]`."""

    def read(name, *size):
      # The leading axis counts matrices; it is no part of their fan-in.
      init = nn.initializers.lecun_normal(batch_axis=(0,))
      return weights.weight(self, name, init, (self.experts, *size))

    return {
      "gate": read("gate", width, self.hidden),
      "up": read("up", width, self.hidden),
      "down": read("down", self.hidden, width),
    }


class Moe(nn.Module):
  """`sum_c weight_c expert_c(x)`, and shared experts that every token uses.

  Attributes:
    routing: which experts, and how they are weighed.
    hidden: inner width `F` of each.
    activation: of the gates.
    shared: a feed-forward added to the experts', or None. DeepSeek's s shared
      experts are one of s times the width.
  """

  routing: Routing
  hidden: int
  activation: Activation = "silu"
  shared: Mlp | None = None

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], real: Bool[Array, "B T"] | None = None
  ) -> tuple[Float[Array, "B T D"], Load]:
    """Returns the output, and what the router did with the `real` tokens.

    The router computes in fp32 whatever the dtype of `x`.

    Args:
      x: activations.
      real: false at padding, which is computed but does not count.
    """
    experts = Experts(self.routing.experts, self.hidden, name="experts")
    held = self._router(x.shape[-1]) | experts(x.shape[-1])
    y, load = mixture.mixture(self.routing, self.activation, held, x, real)
    if self.shared is not None:
      y += self.shared(x)
    return y, load

  def _router(self, width):
    """Returns the router's weights, by name."""
    size = self.routing.experts
    init = nn.initializers.lecun_normal()
    held = {"router": weights.weight(self, "router", init, (width, size))}
    if self.routing.biased:
      zeros = nn.initializers.zeros
      held["router_bias"] = weights.weight(self, "router_bias", zeros, (size,))
    return held
