"""Expert routing, load statistics and load-balancing losses.

All functions are pure functions of the router's logits. The statistics for
balance losses and bias updates are summed over non-padding tokens (`Load`) and
returned next to the model's output; there is no hidden state.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from research.typing import Array, Bool, Float, Int, UserError

Score = Literal["softmax", "sigmoid"]
GroupScore = Literal["max", "top2"]

_SCORES = {
  "softmax": lambda logits: jax.nn.softmax(logits, axis=-1),
  "sigmoid": jax.nn.sigmoid,
}
_GROUP_SCORES = {
  "max": lambda scores: scores.max(-1),
  "top2": lambda scores: jax.lax.top_k(scores, 2)[0].sum(-1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
  """How router logits select experts and weight their outputs.

  Mixtral (Jiang et al. 2024, arXiv:2401.04088, section 2.1) and Qwen3 use the
  top `active` experts of a softmax. DeepSeek-V2 (arXiv:2405.04434, section
  2.2.2) restricts the choice to the best `active_groups` groups of experts. V3
  (arXiv:2412.19437, equations 12 to 16) scores by a sigmoid and adds a bias
  to the scores for the selection, but not for the weighting.

  Attributes:
    experts, active: `E`, and the number of experts per token.
    score: score function of the logits.
    normalised: whether the selected scores are divided by their sum.
    scale: multiplies the weights.
    biased: whether the selection adds a bias, which balances the load without a
      loss (Wang et al. 2024, arXiv:2408.15664).
    groups, active_groups: number of groups of neighbouring experts, and of
      groups that a token may use; 1 and 1 for no grouping.
    group_score: score of a group: its best expert (V2) or the sum of its best
      two (V3).
  """

  experts: int
  active: int
  score: Score = "softmax"
  normalised: bool = True
  scale: float | int = 1.0
  biased: bool = False
  groups: int = 1
  active_groups: int = 1
  group_score: GroupScore = "max"

  def __post_init__(self) -> None:
    if self.groups < 1 or self.experts % self.groups:
      raise UserError(
        f"Routing: {self.groups} groups do not divide {self.experts} experts"
      )
    if not 1 <= self.active_groups <= self.groups:
      raise UserError(
        f"Routing: active_groups is {self.active_groups}, expected 1 to "
        f"{self.groups}"
      )
    size = self.experts // self.groups
    reach = size * self.active_groups
    if not 1 <= self.active <= reach:
      raise UserError(
        f"Routing: active is {self.active}, expected 1 to {reach}, the experts "
        "of the active groups"
      )
    if self.group_score == "top2" and size < 2:
      raise UserError(
        f"Routing: group_score is 'top2', expected 'max': {self.groups} groups "
        f"of {self.experts} experts have one each"
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Load:
  """Router statistics of a layer, summed over non-padding tokens, in fp32.

  Loads of several batches can be added. Those of a run of layers are stacked
  along a leading axis.

  Attributes:
    tokens: number of tokens.
    counts: `[E]`, number of tokens that use each expert.
    scores: `[E]`, sum of the tokens' scores, normalised to 1 per token.
    z: sum of the squared log-normalisers of the logits.
  """

  tokens: Any
  counts: Any
  scores: Any
  z: Any


def scores(
  routing: Routing, logits: Float[Array, "*B E"]
) -> Float[Array, "*B E"]:
  """Returns the experts' scores in fp32."""
  return _SCORES[routing.score](logits.astype(jnp.float32))


def select_experts(
  routing: Routing,
  logits: Float[Array, "T E"],
  bias: Float[Array, "E"] | None = None,
) -> tuple[Int[Array, "T C"], Float[Array, "T C"]]:
  """Returns each token's experts, best first, and their weights in fp32.

  Args:
    routing: the selection rule; `C` is its `active`.
    logits: of the router.
    bias: added to the scores for the selection only; gets no gradient.
  """
  weighing = scores(routing, logits)
  choosing = jax.lax.stop_gradient(weighing)
  if bias is not None:
    choosing += jax.lax.stop_gradient(bias.astype(jnp.float32))
  if routing.active_groups < routing.groups:
    choosing = jnp.where(_in_best_groups(routing, choosing), choosing, -jnp.inf)
  ids = jax.lax.top_k(choosing, routing.active)[1]
  chosen = jnp.take_along_axis(weighing, ids, axis=-1)
  if routing.normalised:
    # All sigmoids may underflow; then all weights are 0.
    chosen /= chosen.sum(-1, keepdims=True) + 1e-20
  return ids, chosen * routing.scale


def _in_best_groups(routing, choosing):
  grouped = choosing.reshape(len(choosing), routing.groups, -1)
  best = _GROUP_SCORES[routing.group_score](grouped)  # [T, groups]
  kept = jax.lax.top_k(best, routing.active_groups)[1]
  inside = jax.nn.one_hot(kept, routing.groups, dtype=bool).any(1)
  return jnp.repeat(inside, grouped.shape[-1], axis=-1)


def load(
  routing: Routing,
  logits: Float[Array, "T E"],
  ids: Int[Array, "T C"],
  real: Bool[Array, "T"],
) -> Load:
  """Returns the load of the tokens that are `real`, not padding."""
  real = real.astype(jnp.float32)[:, None]
  used = jax.nn.one_hot(ids, routing.experts, dtype=jnp.float32).sum(1)
  share = scores(routing, logits)
  if routing.score == "sigmoid":
    share /= share.sum(-1, keepdims=True) + 1e-20
  z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1, keepdims=True)
  return Load(
    tokens=real.sum(),
    counts=jax.lax.stop_gradient((used * real).sum(0)),
    scores=(share * real).sum(0),
    z=(z**2 * real).sum(),
  )


def find_loads(tree: Any) -> list[Load]:
  """Lists the loads in the third output of `Transformer.with_router_loads`."""
  found = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Load))
  return [x for x in found if isinstance(x, Load)]


def balance_loss(load: Load) -> Float[Array, "*L"]:
  """Returns each layer's `E sum_i f_i P_i`: 1 if all experts are used equally.

  `f_i` is the share of all choices that fall on expert i, `P_i` its mean score.
  Fedus et al. 2021 (arXiv:2101.03961), equations 4 to 6, for one expert per
  token; DeepSeek-V3, equations 17 to 20, over the batch, for several. The loss
  of transformers is the same times `active`.
  """
  counts, experts = load.counts, load.counts.shape[-1]
  share = counts / jnp.maximum(counts.sum(-1, keepdims=True), 1)
  mean = load.scores / jnp.maximum(load.tokens, 1)[..., None]
  return experts * (share * mean).sum(-1)


def z_loss(load: Load) -> Float[Array, "*L"]:
  """Returns each layer's mean squared log-normaliser of the router's logits.

  Zoph et al. 2022 (ST-MoE, arXiv:2202.08906), equation 5.
  """
  return load.z / jnp.maximum(load.tokens, 1)


def max_violation(load: Load) -> Float[Array, "*L"]:
  """Returns each layer's `max_i c_i / mean_i c_i - 1`, 0 if balanced.

  MaxVio of Wang et al. 2024 (arXiv:2408.15664), equation 4.
  """
  mean = load.counts.mean(-1)
  return load.counts.max(-1) / jnp.maximum(mean, 1e-9) - 1


def update_bias(
  bias: Float[Array, "*L E"], counts: Float[Array, "*L E"], rate: float
) -> Float[Array, "*L E"]:
  """Lowers the bias of overloaded experts and raises that of underloaded ones.

  Wang et al. 2024 (arXiv:2408.15664), algorithm 1.

  Args:
    bias: of the routers.
    counts: `Load.counts` of the step's batch.
    rate: step size; DeepSeek-V3 used 0.001.
  """
  missing = counts.mean(-1, keepdims=True) - counts
  return bias + rate * jnp.sign(missing).astype(bias.dtype)
