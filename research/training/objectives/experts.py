"""Load balancing of MoE models: auxiliary losses and bias updates.

Router loads (`moe.routing.Load`) are outputs of the forward pass, so a balance
loss is just another term of the objective. DeepSeek's router biases have no
gradient: a transform of the `TrainState` after each step updates them by the
expert counts of that step.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from research import ranges, tree
from research.nn.moe import routing
from research.ranges import NonNegativeFloat, Ranged
from research.training.state import TrainState
from research.typing import Array, UserError

COUNTS = "counts/"
BIAS = "mlp/router_bias"

Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Balance(Ranged):
  """Auxiliary losses for a model with experts.

  Attributes:
    loss: coefficient of `routing.balance_loss`, averaged over layers. Its
      minimum is 1 for any number of experts.
    z: coefficient of `routing.z_loss`, averaged over layers.
    counts: whether training also returns the expert counts of each layer,
      arrays under `counts/<run>/<layer>`, for `rebalance`.
  """

  loss: NonNegativeFloat = 0.01
  z: NonNegativeFloat = 0.001
  counts: bool = False

  def __call__(
    self, loads: Mapping[str, Any], weight: Array, training: bool
  ) -> tuple[Array, Metrics]:
    """Returns `(term to add to the loss sum, metric sums)`.

    Args:
      loads: third output of `Transformer.with_router_loads`.
      training: whether to add the losses; evaluation only reports metrics.

    Raises:
      UserError: the model has no experts.
    """
    layer_loads = routing.find_loads(loads)
    if not layer_loads:
      raise UserError(
        "experts: the model has no experts to balance; leave the objective's "
        "field out"
      )

    def mean(f):
      return jnp.concatenate([f(load) for load in layer_loads]).mean()

    balance, z = mean(routing.balance_loss), mean(routing.z_loss)
    sums = {
      "balance": weight * balance,
      "router_z": weight * z,
      "violation": weight * mean(routing.max_violation),
    }
    if not training:
      return jnp.zeros_like(weight), sums
    if self.counts:
      for run, layers in loads.items():
        for layer, load in layers.items():
          if load is not None:
            sums[f"{COUNTS}{run}/{layer}"] = load.counts
    return weight * (self.loss * balance + self.z * z), sums


def rebalance(
  rate: float,
) -> Callable[[TrainState, Metrics], tuple[TrainState, Metrics]]:
  """Returns a state transform that updates the routers' biases after a step.

  It maps (state, metrics) to (state, metrics) and consumes the arrays under
  `counts/`. The step may have scaled them; only the sign of each count's
  difference from the mean matters (`routing.update_bias`).

  Args:
    rate: step size of the biases; DeepSeek-V3 used 0.001.

  Raises:
    UserError: the bias of a router is not among the trainable parameters.
  """
  ranges.check("rebalance", ranges.NonNegativeFloat, rate=rate)

  def after(state: TrainState, metrics: Metrics) -> tuple[TrainState, Metrics]:
    counts = {
      f"{name.removeprefix(COUNTS)}/{BIAS}": value
      for name, value in metrics.items()
      if name.startswith(COUNTS)
    }
    moved = {path for path, _ in tree.flatten_paths(state.trainable)}
    missing = sorted(set(counts) - moved)
    if missing or not counts:
      raise UserError(
        f"rebalance: found no trainable {missing[0] if missing else BIAS}.\n"
        "Expected Balance.counts, routers that are biased, and `trainable` to "
        "match their biases."
      )

    def nudged(path, bias):
      if path not in counts:
        return bias
      return routing.update_bias(bias, counts[path], rate)

    trainable = tree.map_paths(nudged, state.trainable)
    rest = {k: v for k, v in metrics.items() if not k.startswith(COUNTS)}
    return dataclasses.replace(state, trainable=trainable), rest

  return after
