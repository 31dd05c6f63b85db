"""Mixture of experts as a feed-forward (Shazeer et al. 2017, arXiv:1701.06538).

Exact: no capacity, no dropped token. The rows of all (token, expert) pairs are
sorted by expert, so that each projection is one grouped matmul
(`weights.ragged_dot`) over stacked weights `[E, in, out]`; what a token gets
back is summed in the order of its own choices, never by scattered addition, so
it does not depend on its company.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from research import weights
from research.nn import routing as routings
from research.nn.mlp import ACTIVATIONS, Activation, Mlp
from research.nn.routing import Load, Routing
from research.typing import Array, Bool, Float, Int


def by_expert(
  ids: Int[Array, "T C"], experts: int
) -> tuple[Int[Array, "M"], Int[Array, "M"], Int[Array, "E"]]:
  """Returns how (token, choice) pairs are sorted by expert.

  Args:
    ids: each token's experts.
    experts: `E`.

  Returns:
    `(order, inverse, sizes)`: pair `order[i]`, of token `order[i] // C`,
    stands in row i; pair j stands in row `inverse[j]`; and how many rows each
    expert has.
  """
  flat = ids.reshape(-1)
  order = jnp.argsort(flat, stable=True)
  rows = jnp.arange(len(flat), dtype=order.dtype)
  inverse = jnp.zeros_like(order).at[order].set(rows, unique_indices=True)
  sizes = jnp.sum(flat[:, None] == jnp.arange(experts), axis=0)
  return order, inverse, sizes.astype(jnp.int32)


class Experts(nn.Module):
  """`E` gated feed-forwards over rows sorted by expert.

  Attributes:
    experts, hidden: `E`, `F`.
    activation: of the gate.
  """

  experts: int
  hidden: int
  activation: Activation = "silu"

  @nn.compact
  def __call__(
    self, x: Float[Array, "M D"], sizes: Int[Array, "E"]
  ) -> Float[Array, "M D"]:
    def project(name, x, size):
      # The leading axis counts matrices; it is no part of their fan-in.
      init = nn.initializers.lecun_normal(batch_axis=(0,))
      shape = (self.experts, x.shape[-1], size)
      w = weights.weight(self, name, init, shape)
      return weights.ragged_dot(x, w, sizes)

    gate = checkpoint_name(project("gate", x, self.hidden), "gate")
    up = checkpoint_name(project("up", x, self.hidden), "up")
    return project("down", ACTIVATIONS[self.activation](gate) * up, x.shape[-1])


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
    flat = x.reshape(-1, x.shape[-1])
    real = jnp.ones(x.shape[:2], bool) if real is None else real
    logits, bias = self._router(flat.astype(jnp.float32))
    ids, shares = routings.choose(self.routing, logits, bias)
    order, inverse, sizes = by_expert(ids, self.routing.experts)
    rows = flat[order // self.routing.active]
    experts = Experts(
      self.routing.experts, self.hidden, self.activation, name="experts"
    )
    y = experts(rows, sizes).at[inverse].get(unique_indices=True)
    y = y.reshape(*ids.shape, x.shape[-1])
    y = jnp.einsum("tcd,tc->td", y, shares.astype(y.dtype)).reshape(x.shape)
    if self.shared is not None:
      y += self.shared(x)
    return y, routings.load(self.routing, logits, ids, real.reshape(-1))

  def _router(self, x):
    size = self.routing.experts
    init = nn.initializers.lecun_normal()
    w = weights.weight(self, "router", init, (x.shape[-1], size))
    logits = weights.einsum("...d,de->...e", x, w)
    if not self.routing.biased:
      return logits, None
    zeros = nn.initializers.zeros
    return logits, weights.weight(self, "router_bias", zeros, (size,))
