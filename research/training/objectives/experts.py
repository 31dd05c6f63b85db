"""Training with experts: what keeps them all in use, as plain values.

A model's loads (`moe.routing.Load`) are outputs of its forward pass, so
a balance loss is one more term of an objective's sum. DeepSeek's biases have
no gradient; they move by the counts of the step just done, which is a rewrite
of the `TrainState` after it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from research import tree
from research.nn.moe import routing
from research.optim import ranges
from research.training.state import TrainState
from research.typing import Array, UserError

COUNTS = "counts/"
BIAS = "mlp/router_bias"

Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Balance:
  """The terms that an objective adds for a model with experts.

  Attributes:
    loss: factor of `routing.balance_loss`, the layers' mean. 1 is its least
      value whatever the number of experts.
    z: factor of `routing.z_loss`, the layers' mean.
    counts: whether training returns each layer's counts, too: arrays, under
      `counts/<run>/<layer>`, for `rebalance`.
  """

  loss: float | int = 0.01
  z: float | int = 0.001
  counts: bool = False

  def __post_init__(self):
    ranges.non_negative("Balance", loss=self.loss, z=self.z)

  def __call__(
    self, loads: Mapping[str, Any], weight: Array, training: bool
  ) -> tuple[Array, Metrics]:
    """Returns (what to add to a loss sum, sums to report).

    Args:
      loads: third output of `Transformer.with_router_loads`.
      weight: of the batch; means over layers count as often as it says.
      training: whether anything is added; evaluation only reports.

    Raises:
      UserError: the model has no experts.
    """
    found = routing.find_loads(loads)
    if not found:
      raise UserError(
        "experts: the model has none, so there is nothing to balance; leave "
        "the objective's field out"
      )

    def mean(f):
      return jnp.concatenate([f(load) for load in found]).mean()

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
  """Returns what follows a training step: it moves the routers' biases.

  Takes and returns (state, metrics), the arrays under `counts/` used up. The
  step may have divided them; only which experts had more than the mean counts
  (`routing.nudged`).

  Args:
    rate: what a bias moves by; DeepSeek-V3 used 0.001.

  Raises:
    UserError: a biased router that is not among the trainable parameters,
      where a change would not be kept.
  """
  ranges.non_negative("rebalance", rate=rate)

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
