"""GaLore: full-parameter training with moments of projected gradients.

Zhao et al. 2024 (arXiv:2403.03507), algorithm 2. Every `every` updates each
matrix gets a projector P from its gradient's strongest directions; moments are
kept of R (see `subspace`), and what they give, N, moves the matrix:

  w <- w - rate (scale P N + decay w)

What is no matrix of a layer moves as by the same moments in full. The rank
bounds each update, not their sum: over several projectors it grows.

The moments inside are any optax transformation of R: Adam, Adam in 8 bits,
momentum. With `Gaussian` bases, moments that turn with them (`mean="rotate"`)
and plain momentum this is FLORA (Hao et al. 2024, arXiv:2402.03293).

By hand, since `optax.contrib.scale_by_galore` (0.2.8) refuses stacked layers,
and projects by SVD alone (`test_galore.py` compares one matrix).
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research import ranges, tree
from research.optim import muon, optim
from research.optim.low_rank import projected
from research.optim.low_rank.compressing import Compressing, followed_by
from research.optim.low_rank.subspace import Projection
from research.typing import Array, UserError

MEANS = ("mu", "trace", "momentum")
"""Fields of optimizers' states that are means of R."""

SQUARES = ("nu",)
"""And those that are means of its square."""

Mean = Literal["keep", "rotate", "reset"]
Square = Literal["keep", "reset"]


class SubspaceState(NamedTuple):
  """Updates done, the projectors, and the state over projected gradients."""

  count: Array
  projector: Any
  inner: Any


def in_subspace(
  inner: optax.GradientTransformation,
  projection: Projection,
  *,
  scale: optim.Number = 0.25,
  matrices: str = muon.MATRICES,
  mean: Mean = "keep",
  square: Square = "keep",
) -> Compressing:
  """Returns `inner`, applied to projected gradients.

  Args:
    inner: any transformation that treats arrays one by one, or by their norm.
    projection: how, and how often, matrices are projected.
    scale: of what goes back to a matrix.
    matrices: regular expression of the paths of what is projected.
    mean: what a new projector does to means: nothing, as published; turns them
      to the new basis, `M <- P_newᵀ P_old M`; or sets them to 0.
    square: what it does to means of squares, which cannot be turned.
  """

  def init(params):
    projectors = projected.zeros(projection, matrices, params)
    small = jax.tree.map(
      jnp.zeros_like, projected.shrunk(projection, params, projectors)
    )
    moments = inner.init(small)
    _check_fields(moments, projectors, "mean", mean, MEANS)
    _check_fields(moments, projectors, "square", square, SQUARES)
    return SubspaceState(jnp.zeros((), jnp.int32), projectors, moments)

  def renew(updates, state):
    fresh = projected.renewed(projection, updates, state.projector, state.count)
    moved = _turned(state, fresh, projection, updates, mean, square)
    return SubspaceState(state.count, fresh, moved)

  def prepare(updates, state):
    due = state.count % projection.every == 0
    return jax.lax.cond(due, renew, lambda _, state: state, updates, state)

  def compress(updates, state):
    return projected.shrunk(projection, updates, state.projector)

  def apply(small, state, params=None):
    if params is None:
      raise ValueError("galore: the update needs the parameters' shapes")
    moves, moments = inner.update(small, state.inner)
    shapes = dict(tree.flatten_paths(params))
    projectors = dict(tree.flatten_paths(state.projector))

    def back(path, n):
      if path not in projectors:
        return n
      like = shapes[path]
      up = scale * projection.up(n, projectors[path], like.shape)
      return up.astype(like.dtype)

    count = optax.safe_increment(state.count)
    done = SubspaceState(count, state.projector, moments)
    return tree.map_paths(back, moves), done

  return Compressing(init, prepare, compress, apply)


def _field(path: str, projectors: Any) -> tuple[str, str] | None:
  """Returns (field, parameter) of a state's array, None if it has no R."""
  for name in projectors:
    if path == name or path.endswith("/" + name):
      before = path[: len(path) - len(name)].rstrip("/")
      return before.rpartition("/")[2], name
  return None


def _check_fields(
  inner: Any, projectors: Any, option: str, value: str, fields: Sequence[str]
) -> None:
  """Raises UserError unless each matrix has what a new projector changes.

  Moments in 8 bits, say, are in fields of other names.
  """
  matrices = {path for path, _ in tree.flatten_paths(projectors)}
  found = [_field(path, matrices) for path, _ in tree.flatten_paths(inner)]
  missing = matrices - {x[1] for x in found if x and x[0] in fields}
  if value != "keep" and missing:
    raise UserError(
      f"{option}: {value!r} finds none of {', '.join(fields)} in the moments'"
      f' state, for {min(missing)}.\nExpected "keep" for such moments.'
    )


def _turned(state, fresh, projection, updates, mean, square):
  """Returns the inner state after a change of projectors."""
  new, old = (dict(tree.flatten_paths(x)) for x in (fresh, state.projector))
  shapes = {path: x.shape for path, x in tree.flatten_paths(updates)}

  def one(path, x):
    found = _field(path, new)
    if found is None:
      return x
    field, name = found
    if field in MEANS and mean == "rotate":
      full = projection.up(x, old[name], shapes[name])
      return projection.down(full, new[name]).astype(x.dtype)
    reset = (field in MEANS and mean == "reset") or (
      field in SQUARES and square == "reset"
    )
    return jnp.zeros_like(x) if reset else x

  return tree.map_paths(one, state.inner)


def galore(
  learning_rate: optim.Number | optim.Schedule,
  projection: Projection,
  *,
  moments: optax.GradientTransformation | None = None,
  scale: optim.Number = 0.25,
  matrices: str = muon.MATRICES,
  mean: Mean = "keep",
  square: Square = "keep",
  weight_decay: optim.Number = 0.0,
  decayed: str = ".*",
  clip: optim.Number | None = None,
) -> Compressing:
  """Returns the optimizer of the module's docstring.

  Args:
    learning_rate: a number, or a schedule of the updates done.
    projection: how, and how often, matrices are projected.
    moments: of projected gradients; None for Adam with eps 1e-6, as published.
    scale: of what goes back to a matrix.
    matrices: regular expression of the paths of what is projected.
    mean: what a new projector does to means, see `in_subspace`.
    square: what it does to means of squares.
    weight_decay: share of a parameter taken off at rate 1.
    decayed: regular expression of the paths that decay.
    clip: bound of the projected gradients' global norm, or None.
  """
  ranges.check("optimizer", ranges.NonNegativeFloat, scale=scale)
  inner = optax.scale_by_adam(eps=1e-6) if moments is None else moments
  if clip is not None:
    inner = optax.chain(optim.clipped(clip), inner)
  rest = optax.chain(
    optim.decaying(weight_decay, optim.decay_mask(decayed)),
    optim.scale_by_rate(learning_rate),
  )
  first = in_subspace(
    inner,
    projection,
    scale=scale,
    matrices=matrices,
    mean=mean,
    square=square,
  )
  return followed_by(first, rest)
