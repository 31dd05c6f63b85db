"""Weights whose gradients are seen through a projector, as they are made.

A `ProjectedGradWeight` multiplies as the one inside it does; the cotangent of
its `small` is, by definition, the projected gradient R of its matrix, and that
of its `stub` what is to be kept of the projector. So the backward pass of a
scan makes the gradient of a layer, turns it to R, and forgets it. Cotangents of
what is read twice add up, of which a projector has no sum: `reads` counts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research import weights
from research.optim.low_rank.projectors import Storage
from research.optim.low_rank.subspace import Projection
from research.typing import Array, Float, Int, PRNGKey, Shaped


@dataclasses.dataclass(frozen=True)
class Rule:
  """How G becomes a projector and R.

  Attributes:
    projection: which axis, and which basis.
    storage: the form that projectors are kept in.
  """

  projection: Projection
  storage: Storage

  def fresh(self, g: Array, key: PRNGKey) -> Any:
    """Returns the projector of a gradient, in the floats of its storage."""
    last = jnp.zeros(self.projection.shape(g.shape), g.dtype)
    return self.storage.encode(self.projection.fresh(g, last, key))

  def down(self, g: Array, found: Any) -> Array:
    """Returns R, given the floats of a projector's storage."""
    return self.projection.down(g, self._decode(found, g.shape))

  def up(self, n: Array, stored: Any, shape: tuple[int, ...]) -> Array:
    """Returns what R stands for, given what is kept of a projector."""
    p = self._decode(self.storage.unpack(stored), shape)
    return self.projection.up(n, p, shape)

  def first(self, found: Any, shape: tuple[int, ...]) -> Array:
    """Returns the first vector of each projector, `[..., K]`."""
    p = self._decode(found, shape)
    return p[..., :, 0] if self.projection.projects_in(shape) else p[..., 0, :]

  def _decode(self, found, shape):
    return self.storage.decode(found, self.projection.shape(shape))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProjectedGradWeight(weights.WrappedWeight):
  """A weight `[..., in, out]` whose gradient is seen through a projector.

  Attributes:
    w: the weight, of any kind; it has no gradient.
    small: zeros like R, whose cotangent is R.
    stub: floats whose cotangent says what is to be kept of the projector.
    reads: zeros, whose cotangent is how often the weight is read, `[layers]`.
    stored: what is kept of it.
    due: whether a new one is to be made, `[layers]`.
    key: of its randomness, `[layers]`.
    rule: static.
  """

  w: Any
  small: Any
  stub: Any
  reads: Any
  stored: Any
  due: Any
  key: Any
  rule: Rule = dataclasses.field(metadata=dict(static=True))

  def dense(self) -> Shaped[Array, "..."]:
    """Returns the array, whose cotangent becomes R."""
    w = jax.lax.stop_gradient(weights.dense(self.w))
    more = (self.stored, self.due, self.key)
    return _project_gradient(
      self.rule, w, self.small, self.stub, self.reads, more
    )

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `einsum(eq, x, w)`."""
    return self._recomputed(lambda w: weights.einsum(eq, x, w))

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns rows of `w`."""
    return self._recomputed(lambda w: weights.take(w, ids))

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    """Returns the experts' matmul."""
    return self._recomputed(lambda w: weights.ragged_dot(x, w, sizes))

  def _recomputed(self, use: Callable[[Array], Array]) -> Array:
    """Returns `use(dense)`; what is kept of it is the weight itself.

    A scan would keep the output of `_project_gradient`, a copy of each layer's
    weight.
    """
    return jax.checkpoint(lambda w: use(w.dense()))(self)

  def axes(self, names: tuple[str | None, ...]) -> "ProjectedGradWeight":
    """The weight's names; what belongs to a projector is whole."""

    def whole(name):
      return jax.tree.map(lambda x: (None,) * x.ndim, getattr(self, name))

    parts = ("small", "stub", "reads", "stored", "due", "key")
    return dataclasses.replace(
      self, w=weights.axes(self.w, names), **{f: whole(f) for f in parts}
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project_gradient(rule, w, small, stub, reads, more):
  """Returns `w`; its cotangent goes to `small` and `stub`, projected."""
  return w


def _project_gradient_fwd(rule, w, small, stub, reads, more):
  return w, more


def _project_gradient_bwd(rule, more, g):
  stored, due, key = more
  g = g.astype(jnp.promote_types(g.dtype, jnp.float32))
  found = jax.lax.cond(
    due, lambda: rule.fresh(g, key), lambda: rule.storage.unpack(stored)
  )
  once = jnp.ones(due.shape, jnp.float32)
  return None, rule.down(g, found), found, once, None


_project_gradient.defvjp(_project_gradient_fwd, _project_gradient_bwd)
