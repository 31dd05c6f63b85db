"""Optimizers, rates and schedules that differ by path.

A group is what a regular expression finds first: an array belongs to the first
pattern, in order, that is found in its path, and each has to belong to one. A
group's optimizer has state for its own arrays alone, and counts its own steps,
so that schedules may differ in kind, not only by a factor (`rates.table`):

  by_path([
    ("^vision/", optim.cosine(2e-6, 900, warmup=100)),
    (".", optim.cosine(2e-5, 900)),
  ])

What is not trained is not here: leave it out of `Experiment.trainable`. At rate
0 it would still cost its gradient, two moments, and a share of the norm that
clipping bounds.
"""

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

from research import ranges, tree
from research.optim import optim
from research.optim.low_rank.layerwise import Layerwise
from research.typing import Params, UserError

Rate = optim.Number | optim.Schedule
Optimizer = Callable[..., optax.GradientTransformation]
"""Makes an optimizer of `learning_rate=`, a number or a schedule."""


class ByPathState(NamedTuple):
  """The states of groups, by their names."""

  groups: dict[str, Any]


def by_path(
  groups: Sequence[tuple[str, optax.GradientTransformation | Rate]],
  *,
  optimizer: Optimizer = optim.adamw,
  clip: optim.Number | None = None,
) -> optax.GradientTransformation:
  """Returns an optimizer of groups of parameters.

  It moves them as `optax.partition` does, whose masks would be leaves of no
  kind to shardings and checkpoints: trees here have None where others have the
  array.

  Args:
    groups: (regular expression, the optimizer of what it finds first), or its
      rate or schedule, of which `optimizer` makes one. Optimizers of ours clip
      by the norm of their own group.
    optimizer: of groups that are rates or schedules.
    clip: bound of the norm of all groups' gradients together, before any group
      sees them, or None.

  Raises:
    UserError: there is no group, or its rate is 0 or below, or a group projects
      gradients layer by layer. On creation of the state: an array belongs to no
      group, or a group has no array.
  """
  patterns = [pattern for pattern, _ in groups]
  if not patterns or len(set(patterns)) < len(patterns):
    raise UserError(
      f"by_path.groups: found {patterns}, expected different patterns"
    )
  names = dict(zip(patterns, _names(patterns), strict=True))
  made = {
    names[pattern]: optax.with_extra_args_support(
      _made(pattern, group, optimizer)
    )
    for pattern, group in groups
  }

  def parts(params: Params) -> dict[str, Params]:
    """Returns each group's arrays; a tree with None elsewhere."""
    labels = {
      path: names[_group(path, patterns)]
      for path, _ in tree.flatten_paths(params)
    }
    return {
      name: tree.map_paths(
        lambda path, x, n=name: x if labels[path] == n else None, params
      )
      for name in made
    }

  def init(params):
    found = parts(params)
    for pattern, name in names.items():
      if not jax.tree.leaves(found[name]):
        raise UserError(
          f"by_path.groups: {pattern!r} has no trained parameter: it matches"
          f" none of {len(tree.flatten_paths(params))}, or an earlier pattern"
          " takes them all.\nExpected the narrower pattern first; leave out"
          " what is not trained."
        )
    return ByPathState({n: tx.init(found[n]) for n, tx in made.items()})

  def update(updates, state, params=None, **extra):
    mine = parts(updates)
    ours = dict.fromkeys(made) if params is None else parts(params)
    moved, states = {}, {}
    for name, tx in made.items():
      moved[name], states[name] = tx.update(
        mine[name], state.groups[name], ours[name], **extra
      )
    return functools.reduce(tree.combine, moved.values()), ByPathState(states)

  tx = optax.GradientTransformationExtraArgs(init, update)
  return tx if clip is None else optax.chain(optim.clipped(clip), tx)


def _made(
  pattern: str,
  group: optax.GradientTransformation | Rate,
  optimizer: Optimizer,
) -> optax.GradientTransformation:
  """Returns a group's optimizer."""
  try:
    re.compile(pattern)
  except re.error as error:
    raise UserError(
      f"by_path.groups: {pattern!r} is no regular expression: {error}"
    ) from error
  match group:
    case Layerwise():
      raise UserError(
        f"by_path.groups: {pattern!r} has a layerwise optimizer, which makes"
        " all gradients itself.\nExpected another, e.g. galore.galore()."
      )
    case optax.GradientTransformation():
      return group
  if group == 0:
    raise UserError(
      f"by_path.groups: {pattern!r} has rate 0, expected a rate above 0.\n"
      "What is not trained has no optimizer: leave it out of"
      " Experiment.trainable."
    )
  ranges.check("by_path", ranges.PositiveFloat, **{pattern: group})
  # By its name, which wins over what gin has bound.
  return optimizer(learning_rate=group)


def _group(path: str, patterns: Sequence[str]) -> str:
  """Returns the first pattern that is found in a path."""
  for pattern in patterns:
    if re.search(pattern, path):
      return pattern
  raise UserError(
    f"by_path.groups: no pattern of {patterns} is found in {path!r}, which"
    " is trained.\nAdd a pattern ('.' takes all that are left), or leave it out"
    " of Experiment.trainable."
  )


def _names(patterns: Sequence[str]) -> list[str]:
  """Returns names of groups, as paths and metrics may have them."""
  names: list[str] = []
  for pattern in patterns:
    name = re.sub(r"\W+", "_", pattern).strip("_") or "rest"
    again = (f"{name}_{i}" for i in itertools.count(2))
    names.append(name if name not in names else next(again))
  return names
