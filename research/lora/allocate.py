"""AdaLoRA's rank allocator: prunes rank-one terms to a decreasing budget.

Zhang et al. 2023 (arXiv:2303.10512), equations 8 to 13, in PEFT's order of
operations: the optimizer updates a parameter, its importance is computed from
the new value and the gradient of that update, then the mask is applied. A term
masked before the last allocation may return; after it the mask is final.

The gradient is that of the whole batch, microbatches added up, as the wrapper
gets it: before what the wrapped optimizer does to it. PEFT reads what is left
after a trainer's clipping. For that, clip outside:
`optax.chain(optim.clipped(1.0), adalora_optimizer(inner, budget))`, with an
inner optimizer that does not clip.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research import tree, weights
from research.lora.adapted import AdaptedTensor
from research.lora.low_rank import orthonormal_distance
from research.lora.methods.adalora import AdaLoRA
from research.nn.transformer import Transformer
from research.ranges import NonNegativeInt, PositiveInt, Ranged
from research.training.objectives.objective import Batch, Objective, Sums
from research.typing import Array, Params, PRNGKey, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget(Ranged):
  """Schedule of the number of rank-one terms.

  Attributes:
    target: terms per matrix at the end, on average.
    steps: updates of the whole run.
    warmup: updates before the budget decreases.
    final: updates after the last allocation.
    every: updates between allocations.
    b1, b2: decay rates of the averages of importance and of its uncertainty.
  """

  target: PositiveInt
  steps: int
  warmup: NonNegativeInt = 0
  final: NonNegativeInt = 0
  every: PositiveInt = 1
  b1: float = 0.85
  b2: float = 0.85

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.warmup >= self.steps - self.final:
      raise UserError(
        f"Budget: warmup {self.warmup} and final {self.final} of {self.steps} "
        "steps, expected some steps between them"
      )

  @property
  def last_allocation(self) -> int:
    """Index of the update with the last allocation."""
    return self.steps - self.final

  def terms_at_steps(self, terms: int, matrices: int) -> np.ndarray:
    """Returns the budget at updates 0 to `last_allocation`, int32.

    Args:
      terms: number of terms of all matrices at the start.
    """
    goal, rows = self.target * matrices, []
    for step in range(self.last_allocation + 1):
      share = 1 - (step - self.warmup) / (self.last_allocation - self.warmup)
      falling = int((terms - goal) * share**3 + goal)
      rows.append(terms if step <= self.warmup else falling)
    return np.array(rows, np.int32)


class State(NamedTuple):
  """State of `adalora_optimizer`; arrays by path.

  Attributes:
    count: number of updates done.
    importance, uncertainty: moving averages per trained parameter.
    kept: mask of the last allocation, by the path of the terms' `e`.
  """

  count: Array
  importance: dict[str, Array]
  uncertainty: dict[str, Array]
  kept: dict[str, Array]
  inner: Any


def adalora_optimizer(
  inner: optax.GradientTransformation, budget: Budget
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer so that it prunes AdaLoRA's terms to the budget.

  Args:
    inner: the optimizer that computes updates; importance is of the gradient
      before any clipping in it.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params):
    values = _triples(params)
    importance, uncertainty = (
      {path: jnp.zeros(x.shape, jnp.float32) for path, x in values.items()}
      for _ in range(2)
    )  # a step donates each
    kept = {
      p: jnp.ones(x.shape, bool)
      for p, x in values.items()
      if _is_singular_values(p)
    }
    count = jnp.zeros((), jnp.int32)
    return State(count, importance, uncertainty, kept, inner.init(params))

  def update(updates, state, params=None, **extra):
    if params is None:
      raise ValueError("allocate: the update needs the parameters")
    slopes, old = _triples(updates), _triples(params)
    moves, rest = inner.update(updates, state.inner, params, **extra)
    changes = _triples(moves)
    new = {path: old[path] + changes[path] for path in old}
    importance, uncertainty = _update_averages(budget, state, new, slopes)
    step, last = state.count, budget.last_allocation
    kept = _masks(budget, step, importance, uncertainty)
    due = (step > budget.warmup) & (step % budget.every == 0) & (step < last)
    due |= step == last
    kept = {p: jnp.where(due, x, state.kept[p]) for p, x in kept.items()}
    masked = due | (step > last)

    def one(path, move):
      if path not in kept:
        return move
      e = jnp.where(masked & ~kept[path], 0, new[path])
      return (e - old[path]).astype(move.dtype)

    moves = tree.map_paths(one, moves)
    return moves, State(step + 1, importance, uncertainty, kept, rest)

  return optax.GradientTransformationExtraArgs(init, update)


def _is_singular_values(path: str) -> bool:
  return path.rpartition("/")[2] == "e"


def _triples(params: Any) -> dict[str, Array]:
  every = dict(tree.flatten_paths(params))
  stems = [path[:-1] for path in every if _is_singular_values(path)]
  stems = [s for s in stems if s + "a" in every and s + "b" in every]
  if not stems:
    raise UserError(
      "allocate: no AdaLoRA adapter among the trainable parameters.\n"
      "Expected Adapt.method = AdaLoRA, and trainable = '/trained/'."
    )
  return {s + name: every[s + name] for s in stems for name in "abe"}


def _update_averages(budget, state, new, slopes):
  importance, uncertainty = {}, {}
  learns = state.count < budget.last_allocation
  for path, x in new.items():
    sensitivity = jnp.abs(x * slopes[path]).astype(jnp.float32)
    mean = budget.b1 * state.importance[path] + (1 - budget.b1) * sensitivity
    off = jnp.abs(sensitivity - mean)
    spread = budget.b2 * state.uncertainty[path] + (1 - budget.b2) * off
    importance[path] = jnp.where(learns, mean, state.importance[path])
    uncertainty[path] = jnp.where(learns, spread, state.uncertainty[path])
  return importance, uncertainty


def _masks(budget, step, importance, uncertainty):
  score = {path: importance[path] * uncertainty[path] for path in importance}
  terms = {
    path: score[path]
    + score[path[:-1] + "a"].mean(-1)
    + score[path[:-1] + "b"].mean(-1)
    for path in score
    if _is_singular_values(path)
  }
  every = jnp.sort(jnp.concatenate([x.ravel() for x in terms.values()]))
  matrices = sum(x.size // x.shape[-1] for x in terms.values())
  left = budget.terms_at_steps(every.size, matrices)
  cut = (
    every.size - jnp.asarray(left)[jnp.minimum(step, budget.last_allocation)]
  )
  # If the budget prunes nothing, every term passes.
  bound = jnp.where(cut > 0, every[jnp.maximum(cut - 1, 0)], -jnp.inf)
  return {path: x > bound for path, x in terms.items()}


def orthogonality(params: Params) -> Array:
  """Returns the mean Frobenius distance of the factors' Gram matrices from I.

  Raises:
    UserError: no AdaLoRA adapter among the parameters.
  """
  norms: list[Array] = []
  leaves = jax.tree.leaves(params, is_leaf=weights.is_weight)
  for leaf in leaves:
    if isinstance(leaf, AdaptedTensor) and isinstance(leaf.method, AdaLoRA):
      norms += [
        orthonormal_distance(leaf.arrays[name]).ravel() for name in "ab"
      ]
  if not norms:
    raise UserError("Orthogonal: no AdaLoRA adapter among the parameters")
  return jnp.concatenate(norms).mean()


@dataclasses.dataclass(frozen=True)
class Orthogonal:
  """An objective plus AdaLoRA's orthogonality regulariser, or another term.

  The regulariser is the mean of `|a aᵀ - 1|` and `|b bᵀ - 1|` (Frobenius
  norms) over all matrices, not squared (PEFT's form; the paper squares).
  Evaluation, which has no key, reports the objective alone.

  Attributes:
    weight: weight of the regulariser.
    term: parameters -> what is added; KaSA's is `methods.kasa.penalty`, whose
      weight is 1.
  """

  objective: Objective
  weight: float | int = 0.5
  model: Transformer | None = None
  term: Callable[[Params], Array] = orthogonality

  def __call__(self, params: Params, batch: Batch, key: PRNGKey | None) -> Sums:
    objective = self.objective
    if self.model is not None:
      objective = dataclasses.replace(objective, model=self.model)
    loss, weight, sums = objective(params, batch, key)
    if key is None:
      return loss, weight, sums
    return loss + self.weight * weight * self.term(params), weight, sums
