"""Direct preference optimisation (DPO).

Rafailov et al. 2023 (arXiv:2305.18290).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.masks import Mask
from research import weights
from research.nn.transformer import Transformer
from research.ranges import PositiveFloat, Ranged, Real
from research.training import positions
from research.training.objectives.objective import Batch, Sums
from research.typing import Array, Float, Params, PRNGKey, UserError

Select = Callable[[Any], Any]
"""Selects the parameters of one model from a tree that may contain several."""


def all_params(params: Params) -> Any:
  """Selects the whole tree, for a tree that contains a single model."""
  return params


@dataclasses.dataclass(frozen=True)
class Part:
  """Selects one of several models in a tree."""

  name: str

  def __call__(self, params: Params) -> Any:
    if self.name not in params:
      raise UserError(
        f"params: found {', '.join(params)}, expected {self.name!r}.\n"
        "Put it there with a transform, e.g. preference.Copies."
      )
    return params[self.name]


@dataclasses.dataclass(frozen=True)
class Copies:
  """A weight transform: puts the same weights under several names.

  The arrays are shared, not copied. Train one of the copies
  (`trainable = '^policy/'`) and the others stay fixed.
  """

  names: tuple[str, ...] = ("policy", "reference")

  def __call__(self, params: Params, key: PRNGKey) -> dict[str, Any]:
    return {name: params for name in self.names}


@dataclasses.dataclass(frozen=True)
class KeepPart:
  """A weight transform: keeps one of several models, the inverse of `Copies`.

  After training (`Experiment.after`) the reference is of no more use.
  """

  name: str = "policy"

  def __call__(self, params: Params, key: PRNGKey) -> Any:
    del key
    return Part(self.name)(params)


@dataclasses.dataclass(frozen=True)
class DPO(Ranged):
  """DPO loss: -log sigmoid(b [log-ratio(chosen) - log-ratio(rejected)]).

  Equation 7 of the paper. A log-ratio is
  log policy(answer | prompt) - log reference(answer | prompt), summed over the
  answer's tokens. Batches come from `sources.pairs`.

  Attributes:
    model: the network of policy and reference; the experiment sets it.
    beta: b, the strength of the KL regularisation towards the reference.
    smoothing: probability that a label is wrong (conservative DPO, Mitchell
      2023, equation 3).
    reference: selects the parameters of the reference, which get no gradient.
      If the policy is an adapted model, this can be the base model.
    rows: rows of logits materialised at a time.
  """

  model: Transformer | None = None
  beta: PositiveFloat = 0.1
  smoothing: Real(at_least=0, below=0.5) = 0.0
  policy: Select = all_params
  reference: Select = Part("reference")
  rows: int = 256

  @property
  def rearranged(self) -> str:
    return "pairs of answers"

  def __call__(self, params: Params, batch: Batch, key: PRNGKey | None) -> Sums:
    """Returns sums over pairs; a pair without answer tokens is padding.

    The metrics are `accuracy` (whether the chosen answer has the larger
    reward), `margin`, and both rewards, b times the log-ratio.
    """
    policy = weights.bind(self.policy(params), key=key)
    reference = jax.lax.stop_gradient(self.reference(params))
    ratios = self._scores(policy, batch) - self._scores(reference, batch)
    rewards = self.beta * ratios
    margin = rewards[:, 0] - rewards[:, 1]
    loss = -(1 - self.smoothing) * jax.nn.log_sigmoid(margin)
    loss -= self.smoothing * jax.nn.log_sigmoid(-margin)
    real = (batch["weights"] > 0).any((1, 2)).astype(jnp.float32)
    metrics = {
      "accuracy": (margin > 0).astype(jnp.float32),
      "margin": margin,
      "reward_chosen": rewards[:, 0],
      "reward_rejected": rewards[:, 1],
    }
    sums = {k: (v * real).sum() for k, v in metrics.items()}
    return (loss * real).sum(), real.sum(), sums

  def _scores(self, params: Params, batch: Batch) -> Float[Array, "B 2"]:
    flat = {
      k: v.reshape(-1, v.shape[-1]) for k, v in batch.items() if v.ndim == 3
    }
    mask = Mask.causal(segments=flat["segments"])
    params = weights.with_tokens(params, flat["tokens"], flat["segments"])
    hidden, _ = self.model.apply(
      {"params": params}, flat["tokens"], flat["positions"], mask
    )
    scores = positions.log_probs(
      self.model, params, hidden, flat["targets"], self.rows
    )
    # Chosen and rejected are rows of one batch: a single forward pass.
    return (scores * flat["weights"]).sum(-1).reshape(-1, 2)
