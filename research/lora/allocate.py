"""AdaLoRA's allocator: a falling budget of rank-one terms for a whole model.

Zhang et al. 2023 (arXiv:2303.10512), equations 8 to 13, with PEFT's order of
things: each update is made, then judged by the new values and the gradient
that led to them, then masked. A term that is masked before the last allocation
may come back; afterwards what is left stays.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research import tree, weights
from research.lora.adapted import AdaptedTensor
from research.lora.methods.adalora import AdaLoRA
from research.nn.transformer import Transformer
from research.training.objectives.objective import Batch, Objective, Sums
from research.typing import Array, Params, PRNGKey, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
  """How many terms are left after each update.

  Attributes:
    target: terms a matrix, on average, in the end.
    steps: updates of the whole run.
    warmup: updates before the budget falls.
    final: updates after the last allocation.
    every: updates between allocations.
    b1, b2: decay of a parameter's importance, and of how uncertain that is.
  """

  target: int
  steps: int
  warmup: int = 0
  final: int = 0
  every: int = 1
  b1: float = 0.85
  b2: float = 0.85

  def __post_init__(self) -> None:
    if not 0 <= self.warmup < self.steps - self.final or self.final < 0:
      raise UserError(
        f"Budget: warmup {self.warmup} and final {self.final} of {self.steps} "
        "steps, expected some steps between them"
      )
    if self.target < 1 or self.every < 1:
      raise UserError(
        f"Budget: target is {self.target} and every {self.every}, expected at "
        "least 1"
      )

  @property
  def last(self) -> int:
    """The update of the last allocation."""
    return self.steps - self.final

  def left(self, terms: int, matrices: int) -> np.ndarray:
    """Returns int32 [last + 1]: the budget at each update, counted from 0.

    Args:
      terms: of all matrices at the start.
      matrices: how many.
    """
    goal, rows = self.target * matrices, []
    for step in range(self.last + 1):
      share = 1 - (step - self.warmup) / (self.last - self.warmup)
      falling = int((terms - goal) * share**3 + goal)
      rows.append(terms if step <= self.warmup else falling)
    return np.array(rows, np.int32)


class State(NamedTuple):
  """Of `allocated`; trees of arrays by path.

  Attributes:
    count: updates made.
    importance, uncertainty: of each trained number.
    kept: which terms the last allocation left, by the path of their `e`.
    inner: of the optimizer.
  """

  count: Array
  importance: dict[str, Array]
  uncertainty: dict[str, Array]
  kept: dict[str, Array]
  inner: Any


def allocated(
  inner: optax.GradientTransformation, budget: Budget
) -> optax.GradientTransformationExtraArgs:
  """Returns an optimizer whose updates keep to the budget.

  Args:
    inner: makes the updates.
    budget: of the AdaLoRA adapters among the parameters.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params):
    values = _triples(params)
    zeros = {
      path: jnp.zeros(x.shape, jnp.float32) for path, x in values.items()
    }
    kept = {p: jnp.ones(x.shape, bool) for p, x in values.items() if _is_e(p)}
    count = jnp.zeros((), jnp.int32)
    return State(count, zeros, dict(zeros), kept, inner.init(params))

  def update(updates, state, params=None, **extra):
    if params is None:
      raise ValueError("allocate: the update needs the parameters")
    slopes, old = _triples(updates), _triples(params)
    moves, rest = inner.update(updates, state.inner, params, **extra)
    found = _triples(moves)
    new = {path: old[path] + found[path] for path in old}
    importance, uncertainty = _judged(budget, state, new, slopes)
    step, last = state.count, budget.last
    kept = _kept(budget, step, importance, uncertainty)
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


def _is_e(path: str) -> bool:
  return path.rpartition("/")[2] == "e"


def _triples(params: Any) -> dict[str, Array]:
  """Returns the arrays a, b and e of AdaLoRA's adapters, by path."""
  every = dict(tree.flatten_paths(params))
  stems = [path[:-1] for path in every if _is_e(path)]
  stems = [s for s in stems if s + "a" in every and s + "b" in every]
  if not stems:
    raise UserError(
      "allocate: no AdaLoRA adapter among the trainable parameters.\n"
      "Expected Adapt.method = AdaLoRA, and trainable = '/trained/'."
    )
  return {s + name: every[s + name] for s in stems for name in "abe"}


def _judged(budget, state, new, slopes):
  """Returns the moving averages after an update; they stop at the last one."""
  importance, uncertainty = {}, {}
  learns = state.count < budget.last
  for path, x in new.items():
    found = jnp.abs(x * slopes[path]).astype(jnp.float32)
    mean = budget.b1 * state.importance[path] + (1 - budget.b1) * found
    off = jnp.abs(found - mean)
    spread = budget.b2 * state.uncertainty[path] + (1 - budget.b2) * off
    importance[path] = jnp.where(learns, mean, state.importance[path])
    uncertainty[path] = jnp.where(learns, spread, state.uncertainty[path])
  return importance, uncertainty


def _kept(budget, step, importance, uncertainty):
  """Returns which terms are among the best that the budget allows."""
  score = {path: importance[path] * uncertainty[path] for path in importance}
  terms = {
    path: score[path]
    + score[path[:-1] + "a"].mean(-1)
    + score[path[:-1] + "b"].mean(-1)
    for path in score
    if _is_e(path)
  }
  every = jnp.sort(jnp.concatenate([x.ravel() for x in terms.values()]))
  matrices = sum(x.size // x.shape[-1] for x in terms.values())
  left = budget.left(every.size, matrices)
  cut = every.size - jnp.asarray(left)[jnp.minimum(step, budget.last)]
  # Where nothing is cut there is no threshold.
  bound = jnp.where(cut > 0, every[jnp.maximum(cut - 1, 0)], -jnp.inf)
  return {path: x > bound for path, x in terms.items()}


@dataclasses.dataclass(frozen=True)
class Orthogonal:
  """An objective, and how far AdaLoRA's factors are from orthogonal.

  Added is the mean of `|a aᵀ - 1|` and `|b bᵀ - 1|` over all matrices, not
  squared (PEFT's form; the paper squares).

  Attributes:
    objective: what else is minimised.
    weight: of what is added.
    model: the network of the objective; an experiment fills it in.
  """

  objective: Objective
  weight: float | int = 0.5
  model: Transformer | None = None

  def __call__(self, params: Params, batch: Batch, key: PRNGKey | None) -> Sums:
    """Returns the sums of the objective, the loss with what is added."""
    objective = self.objective
    if self.model is not None:
      objective = dataclasses.replace(objective, model=self.model)
    loss, weight, sums = objective(params, batch, key)
    return loss + self.weight * weight * distance(params), weight, sums


def distance(params: Params) -> Array:
  """Returns how far the factors are from orthogonal, on average."""
  norms: list[Array] = []
  leaves = jax.tree.leaves(params, is_leaf=weights.is_weight)
  for leaf in leaves:
    if isinstance(leaf, AdaptedTensor) and isinstance(leaf.method, AdaLoRA):
      norms += [_off(leaf.arrays[name]).ravel() for name in "ab"]
  if not norms:
    raise UserError("Orthogonal: no AdaLoRA adapter among the parameters")
  return jnp.concatenate(norms).mean()


def _off(x: Array) -> Array:
  gram = jnp.einsum("...rn,...sn->...rs", x, x) - jnp.eye(x.shape[-2])
  square = jnp.sum(jnp.square(gram), (-2, -1))
  # The gradient of a root at 0 is no number.
  return jnp.sqrt(jnp.maximum(square, jnp.finfo(x.dtype).tiny))
