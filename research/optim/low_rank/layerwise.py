"""GaLore layer by layer: gradients of one layer at a time, and updates too.

The gradient of a scanned stack has the size of its weights, and so has its
update. Here the backward scan turns G of a layer to R and forgets it
(`projected_grad_weight`); where a projector is due it is made there, from that
G. Weights then move layer by layer, in the memory that they are in:

  backward scan    G_i -> P_i if due -> R_i = P_i^T G_i
  stack            moments of R -> N
  loop over i      w_i <- w_i - rate (scale P_i N_i + decay w_i)

What is added up over microbatches is R, and what is clipped is its norm; so,
unlike an optimizer that steps in the middle of the backward pass (as GaLore's
authors do), this one accumulates and clips (research/lora/MATH.md 5). A model
reads each matrix once in a call, by `research.weights`: projectors of two reads
have no sum, and one of none is lost. Reads are counted, and where they are
others the loss is NaN.
"""

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research import ranges, tree, weights
from research.optim import matching, muon, optim
from research.optim.low_rank.projected_grad_weight import (
  ProjectedGradWeight,
  Rule,
)
from research.optim.low_rank.projectors import FixedInterval, Float32, Storage
from research.optim.low_rank.subspace import Projection
from research.typing import Array, UserError

Loss = Callable[[Any, Callable[[Any], Any]], tuple[Array, Any]]
"""(trainable, what to do to the whole tree of weights) -> (loss, more)."""


class LayerwiseState(NamedTuple):
  """Updates done, projectors, when they are due, and the inner states."""

  count: Array
  projector: Any
  pace: Any
  inner: Any
  rest: Any


def movable(w: Any) -> bool:
  """Whether a leaf is no array, and can be stored anew: 8-bit weights."""
  return weights.is_renewable(w)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parts:
  rule: Rule
  pace: FixedInterval
  inner: optax.GradientTransformation
  rest: optax.GradientTransformation
  scale: float
  matrices: str

  def projected(self, params: Any) -> dict[str, Any]:
    """Returns the matrices that are projected, by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=movable)
    found = [(tree.path_name(path), w) for path, w in leaves]
    out = {
      path: w
      for path, w in found
      if w.ndim >= 2 and re.search(self.matrices, path)
    }
    if not out:
      paths = [path for path, _ in found]
      raise matching.no_matrix("matrices", self.matrices, paths)
    for path, w in found:
      if movable(w) and path not in out:
        raise UserError(
          f"matrices: {self.matrices!r} does not match {path}, a trainable"
          f" {type(w).__name__}.\nExpected all weights that are trained in"
          " codes: others have no gradient."
        )
    return out

  def small(self, w: Any) -> Array:
    """Returns zeros like R of a matrix."""
    shape = self.rule.projection.shape(w.shape)
    small = list(w.shape)
    axis = self.rule.projection.rank_axis(w.shape)
    small[axis] = shape[-1] if axis == -2 else shape[-2]
    return jnp.zeros(small, jnp.promote_types(w.dtype, jnp.float32))

  def stub(self, w: Any) -> Any:
    """Returns zeros of what a projector's storage has."""
    shape = self.rule.projection.shape(w.shape)
    dtype = jnp.promote_types(w.dtype, jnp.float32)
    found = jax.eval_shape(
      self.rule.storage.encode, jax.ShapeDtypeStruct(shape, dtype)
    )
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found)


class Layerwise(optax.GradientTransformation):
  """An optimizer that makes its gradients itself; of `galore`, below.

  `research.training.step` calls `gradients` for each microbatch and `move`
  once. `update` cannot be called: there are no gradients to give it.
  """

  parts: _Parts

  def __new__(cls, parts: _Parts) -> "Layerwise":
    def update(updates, state, params=None):
      raise UserError(
        "layerwise: found gradients of all layers at once, expected updates"
        " during the backward pass.\nUse"
        " research.training.step.make_train_step, or galore.galore."
      )

    made = super().__new__(cls, functools.partial(_init, parts), update)
    made.parts = parts
    return made

  def gradients(
    self, loss: Loss, trainable: Any, state: LayerwiseState, first: Any
  ) -> tuple[tuple[Array, Any], Any, LayerwiseState, Array]:
    """Returns (loss, more), gradients with R for matrices, the state, misread.

    `misread` is the number of matrices, each layer's for itself, that `loss`
    did not read exactly once; the loss is NaN if there are any.

    Args:
      loss: what is differentiated.
      trainable: arrays, or weights that are `movable`.
      state: the optimizer's.
      first: whether projectors may be made; of microbatches, at the first with
        a gradient.
    """
    return _gradients(self.parts, loss, trainable, state, first)

  def move(
    self, small: Any, state: LayerwiseState, params: Any
  ) -> tuple[Any, LayerwiseState]:
    """Returns the parameters after an update, and the state.

    Args:
      small: sums, or means, of what `gradients` returned.
      state: the optimizer's.
      params: trainable ones; donate them.
    """
    return _move(self.parts, small, state, params)


def _lead(path: str, w: Any) -> tuple[int, ...]:
  """Returns `(layers,)` of a stacked matrix, else `()`."""
  return w.shape[:1] if re.match(r"run\d+/", path) else ()


def _at(node: Any, path: str) -> Any:
  for name in path.split("/"):
    node = node[name] if isinstance(node, Mapping) else getattr(node, name)
  return node


def _placed(params: Any, found: Mapping[str, Any]) -> Any:
  """Returns a tree like `params` with `found` by path, None elsewhere."""
  return tree.map_paths(lambda path, _: found.get(path), params, movable)


def _init(parts: _Parts, params: Any) -> LayerwiseState:
  found, rule = parts.projected(params), parts.rule
  projectors = {p: rule.storage.pack(parts.stub(w)) for p, w in found.items()}
  paces = {}
  for path, w in found.items():
    lead, every = _lead(path, w), rule.projection.every
    vectors = jax.eval_shape(lambda w=w: rule.first(parts.stub(w), w.shape))
    size = math.prod(vectors.shape[len(lead) :])
    paces[path] = parts.pace.init(lead, every, size)
  small = tree.map_paths(
    lambda p, x: parts.small(x) if p in found else x, params, movable
  )
  return LayerwiseState(
    jnp.zeros((), jnp.int32),
    _placed(params, projectors),
    _placed(params, paces),
    parts.inner.init(small),
    parts.rest.init(small),
  )


def _gradients(parts, loss, trainable, state, first):
  found, rule = parts.projected(trainable), parts.rule
  key = jax.random.fold_in(jax.random.key(rule.projection.seed), state.count)
  due = {
    path: first & parts.pace.due(_at(state.pace, path), state.count)
    for path in found
  }

  def attach(slots, params):
    def one(path, w):
      if path not in slots:
        return w
      own = jax.random.fold_in(key, zlib.crc32(path.encode()))
      lead = _lead(path, w)
      keys = jax.random.split(own, lead) if lead else own
      projectors = _at(state.projector, path)
      return ProjectedGradWeight(
        w, *slots[path], projectors, due[path], keys, rule
      )

    return tree.map_paths(one, params, movable)

  def value(free, slots):
    whole = tree.map_paths(
      lambda path, w: found[path] if path in found else free[path],
      trainable,
      movable,
    )
    return loss(whole, functools.partial(attach, slots))

  arrays, _ = jax.tree_util.tree_flatten_with_path(trainable, is_leaf=movable)
  free = {tree.path_name(p): x for p, x in arrays}
  free = {path: x for path, x in free.items() if path not in found}
  slots = {
    path: (parts.small(w), parts.stub(w), jnp.zeros(_lead(path, w)))
    for path, w in found.items()
  }
  valued = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)
  (total, more), (others, seen) = valued(free, slots)
  misread = sum((reads != 1).sum() for *_, reads in seen.values())
  total = jnp.where(misread > 0, jnp.nan, total)
  small = tree.map_paths(
    lambda path, _: seen[path][0] if path in seen else others[path],
    trainable,
    movable,
  )
  fresh = {path: made for path, (_, made, _) in seen.items()}
  state = _renewed(parts, state, found, fresh, due, trainable)
  return (total, more), small, state, misread


def _renewed(parts, state, found, fresh, due, like):
  """Returns the state with the projectors that the backward pass made."""
  storage, paces = parts.rule.storage, {}
  for path, w in found.items():
    vectors = parts.rule.first(fresh[path], w.shape)
    lead = _lead(path, w)
    # Experts of a layer share a pace: their vectors count as one.
    vectors = vectors.reshape(*lead, -1)
    pace = _at(state.pace, path)
    paces[path] = parts.pace.after(pace, due[path], vectors)
  projectors = {path: storage.pack(made) for path, made in fresh.items()}
  return state._replace(
    projector=_placed(like, projectors), pace=_placed(like, paces)
  )


def _move(parts, small, state, params):
  moves, inner = parts.inner.update(small, state.inner)
  found = parts.projected(params)
  key = jax.random.key(parts.rule.projection.seed + 1)
  key = jax.random.fold_in(key, state.count)

  def moved(params, moves, projectors, key):
    """Returns some parameters after their update, and `rest`'s state."""

    def wide(path, n):
      w = _at(params, path)
      if path not in found:
        return n.astype(w.dtype)
      up = parts.rule.up(n, _at(projectors, path), w.shape)
      return (parts.scale * up).astype(w.dtype)

    dense = jax.tree.map(
      lambda w: w.dense() if movable(w) else w, params, is_leaf=movable
    )
    updates = tree.map_paths(wide, moves)
    updates, rest = parts.rest.update(updates, state.rest, dense)
    new = optax.apply_updates(dense, updates)

    def kept(path, w):
      x = _at(new, path)
      own = jax.random.fold_in(key, zlib.crc32(path.encode()))
      return w.renewed(x, own) if movable(w) else x

    return tree.map_paths(kept, params, movable), rest

  names = [n for n in tree.runs(params) if jax.tree.leaves(params[n])]
  outside = [
    {k: v for k, v in x.items() if k not in names}
    for x in (params, moves, state.projector)
  ]
  out, rest = moved(*outside, key)
  for name in names:

    def body(k, run, name=name):
      def row(x):
        return jax.lax.dynamic_index_in_dim(x, k, keepdims=False)

      rows = [
        {name: jax.tree.map(row, x)}
        for x in (run, moves[name], state.projector[name])
      ]
      new, _ = moved(*rows, jax.random.fold_in(key, k))

      def put(x, y):
        return jax.lax.dynamic_update_index_in_dim(x, y, k, 0)

      return jax.tree.map(put, run, new[name])

    run = params[name]
    out[name] = jax.lax.fori_loop(0, tree.run_length(run), body, run)
  count = optax.safe_increment(state.count)
  return out, state._replace(count=count, inner=inner, rest=rest)


def galore(
  learning_rate: optim.Number | optim.Schedule,
  projection: Projection,
  *,
  moments: optax.GradientTransformation | None = None,
  scale: optim.Number = 0.25,
  matrices: str = muon.MATRICES,
  weight_decay: optim.Number = 0.0,
  decayed: str = ".*",
  clip: optim.Number | None = None,
  storage: Storage = Float32(),
  pace: FixedInterval = FixedInterval(),
) -> Layerwise:
  """Returns `research.optim.low_rank.galore.galore`, layer by layer.

  With `storage=Int4()`, `pace=Lazy()`, moments in 8 bits and weights from
  `int8_weights.Pack` this is Q-GaLore (arXiv:2407.08296).

  Args:
    learning_rate: a number, or a schedule of the updates done.
    projection: how, and at first how often, matrices are projected.
    moments: of projected gradients; None for Adam with eps 1e-6.
    scale: of what goes back to a matrix.
    matrices: regular expression of the paths of what is projected.
    weight_decay: share of a parameter taken off at rate 1.
    decayed: regular expression of the paths that decay.
    clip: bound of the projected gradients' global norm, or None.
    storage: the form that projectors are kept in.
    pace: when projectors are made anew.
  """
  ranges.check("optimizer", ranges.NonNegativeFloat, scale=scale)
  inner = optax.scale_by_adam(eps=1e-6) if moments is None else moments
  if clip is not None:
    inner = optax.chain(optim.clipped(clip), inner)
  rest = optax.chain(
    optim.decaying(weight_decay, optim.decay_mask(decayed)),
    optim.scale_by_rate(learning_rate),
  )
  return Layerwise(
    _Parts(
      rule=Rule(projection, storage),
      pace=pace,
      inner=inner,
      rest=rest,
      scale=scale,
      matrices=matrices,
    )
  )
