"""Direct preference optimisation: Rafailov et al. 2023 (arXiv:2305.18290)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.masks import Mask
from research import weights
from research.nn.transformer import Transformer
from research.training import positions
from research.training.objectives.objective import Batch, Sums
from research.typing import Array, Float, Params, PRNGKey, UserError

Select = Callable[[Any], Any]
"""params -> the parameters of one of the models in it."""


def all_params(params: Params) -> Any:
  """Returns `params`: a model that stands alone."""
  return params


@dataclasses.dataclass(frozen=True)
class Part:
  """Selects one of several models in a tree.

  Attributes:
    name: its key.
  """

  name: str

  def __call__(self, params: Params) -> Any:
    """Returns the parameters under the key."""
    if self.name not in params:
      raise UserError(
        f"params: found {', '.join(params)}, expected {self.name!r}.\n"
        "Put it there with a transform, e.g. preference.Copies."
      )
    return params[self.name]


@dataclasses.dataclass(frozen=True)
class Copies:
  """A transform: the same weights under several names, shared, not copied.

  Train one of them (`trainable = '^policy/'`), and the others stay.

  Attributes:
    names: keys of the new tree.
  """

  names: tuple[str, ...] = ("policy", "reference")

  def __call__(self, params: Params, key: PRNGKey) -> dict[str, Any]:
    """Returns `{name: params}`."""
    return {name: params for name in self.names}


@dataclasses.dataclass(frozen=True)
class DPO:
  """Equation 7: -log sigmoid(b [log-ratio(chosen) - log-ratio(rejected)]).

  A log-ratio is log policy(answer | prompt) - log reference(answer | prompt),
  summed over the answer's tokens; the batch is that of `sources.pairs`.

  Attributes:
    model: the network of both; an experiment fills it in.
    beta: b, how dear it is to leave the reference.
    smoothing: probability that a label is wrong (conservative DPO, Mitchell
      2023, equation 3).
    policy: which parameters are the policy's.
    reference: which are the reference's; no gradient flows into them. Where
      the policy is an adapted model, the model without adapters will do.
    rows: rows of logits held at a time.
  """

  model: Transformer | None = None
  beta: float | int = 0.1
  smoothing: float | int = 0.0
  policy: Select = all_params
  reference: Select = Part("reference")
  rows: int = 256

  def __post_init__(self):
    if not self.beta > 0 or not 0 <= self.smoothing < 0.5:
      raise UserError(
        f"DPO: found beta {self.beta} and smoothing {self.smoothing}, expected"
        " beta above 0 and smoothing from 0 to below 0.5."
      )

  def __call__(self, params: Params, batch: Batch, key: PRNGKey | None) -> Sums:
    """Returns sums over pairs; a pair without an answer is padding.

    The metrics are `accuracy` (the chosen answer's reward is larger), `margin`
    and both rewards, b times the log-ratio.
    """
    policy = weights.bind(self.policy(params), key=key)
    reference = jax.lax.stop_gradient(self.reference(params))
    ratios = self._scores(policy, batch) - self._scores(reference, batch)
    rewards = self.beta * ratios
    margin = rewards[:, 0] - rewards[:, 1]
    loss = -(1 - self.smoothing) * jax.nn.log_sigmoid(margin)
    loss -= self.smoothing * jax.nn.log_sigmoid(-margin)
    real = (batch["weights"] > 0).any((1, 2)).astype(jnp.float32)
    found = {
      "accuracy": (margin > 0).astype(jnp.float32),
      "margin": margin,
      "reward_chosen": rewards[:, 0],
      "reward_rejected": rewards[:, 1],
    }
    sums = {k: (v * real).sum() for k, v in found.items()}
    return (loss * real).sum(), real.sum(), sums

  def _scores(self, params: Params, batch: Batch) -> Float[Array, "B 2"]:
    """Returns log p(answer | prompt) of both answers of each pair."""
    flat = {
      k: v.reshape(-1, v.shape[-1]) for k, v in batch.items() if v.ndim == 3
    }
    mask = Mask.causal(segments=flat["segments"])
    params = weights.with_tokens(params, flat["tokens"], flat["segments"])
    hidden, _ = self.model.apply(
      {"params": params}, flat["tokens"], flat["positions"], mask
    )
    found = positions.log_probs(
      self.model, params, hidden, flat["targets"], self.rows
    )
    # Chosen and rejected are rows of one batch: one pass, not two.
    return (found * flat["weights"]).sum(-1).reshape(-1, 2)
