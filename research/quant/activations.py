"""Weights that change what they multiply: rounded or rotated activations.

An `InputTensor` stands in for a weight and holds one, and an `op`, which says
what becomes of activations on their way in: `Round` below, LLM.int8's parts
(`research.quant.llm_int8`), a rotation (`research.quant.rotate`). They nest:
rotated, then rounded, times packed codes. No module knows.
"""

import dataclasses
import re
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from research import tree, weights
from research.typing import (
  Array,
  Float,
  Int,
  Params,
  PRNGKey,
  Shaped,
  UserError,
)

LINEAR = r"/(attention/(q|k|v|o)|mlp/(\w+/)?(gate|up|down))$"
"""Paths of all matrices of a layer but a router's."""


@runtime_checkable
class Op(Protocol):
  """What becomes of a weight's inputs: a pytree, static but for its arrays."""

  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns what takes the place of `x [..., I]`."""

  def einsum(
    self, eq: str, x: Float[Array, "..."], w: weights.Weight
  ) -> Float[Array, "..."]:
    """Returns `einsum(eq, self(x), w)`, by whatever way is exact."""

  def undone(self, w: Float[Array, "*L I O"]) -> Float[Array, "*L I O"]:
    """Returns the matrix that `x` is multiplied by in all, but for rounding."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputTensor:
  """A weight `[..., I, O]` and what becomes of its inputs.

  Attributes:
    w: any weight; it multiplies `op(x)`.
    op: of the inputs.
  """

  w: Any
  op: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return self.w.shape

  @property
  def dtype(self) -> Any:
    return self.w.dtype

  @property
  def ndim(self) -> int:
    return len(self.shape)

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `einsum(eq, op(x), w)`; `eq` contracts the inputs of `w`.

    Raises:
      UserError: it contracts something else.
    """
    left, right = eq.split("->")[0].split(",")
    if left[-1] != right[0] or len(right) != 2:
      raise UserError(
        f"activations: expected x[..., in] times w[in, out], found {eq!r}"
      )
    return self.op.einsum(eq, x, self.w)

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns rows of `w`: looking up has no inputs."""
    return weights.take(self.w, ids)

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    """Returns each row of `op(x)` times its expert's matrix."""
    return weights.ragged_dot(self.op(x), self.w, sizes)

  def dense(self) -> Shaped[Array, "..."]:
    """Returns the matrix that stands for both, activations unrounded."""
    return self.op.undone(weights.dense(self.w))

  def axes(self, names: tuple[str | None, ...]) -> "InputTensor":
    """The weight's names; what the op holds is whole on each device."""
    op = jax.tree.map(lambda x: (None,) * x.ndim, self.op)
    return InputTensor(weights.axes(self.w, names), op)

  def bind(
    self, *, key: PRNGKey | None, ids: Int[Array, "B"] | None
  ) -> "InputTensor":
    """Returns itself with what depends on the batch in the weight."""
    w = self.w
    if weights.is_weight(w):
      w = w.bind(key=key, ids=ids)
    return dataclasses.replace(self, w=w)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
  """Integer activations with a scale for each token, or one for all.

  The scale is `clip max|x| / (2^(bits-1) - 1)`, or with a zero point
  `clip (max - min) / (2^bits - 1)`, of ranges that hold 0. Gradients go
  straight through.

  Attributes:
    static: scale `[...]` from calibration, or None for the tokens' own; with
      `per='tensor'` and `symmetric`.
    bits: 2 to 8.
    per: what shares a scale.
    group: inputs that share a scale within a token, None for all.
    clip: share of the range that is not cut off (QuaRot: 0.9 at 4 bits).
    symmetric: whether there is no zero point.
    integer: whether products are of integers, summed in int32, where the
      weight is integers, too.
  """

  static: Any = None
  bits: int = dataclasses.field(default=8, metadata=dict(static=True))
  per: Literal["token", "tensor"] = dataclasses.field(
    default="token", metadata=dict(static=True)
  )
  group: int | None = dataclasses.field(
    default=None, metadata=dict(static=True)
  )
  clip: float = dataclasses.field(default=1.0, metadata=dict(static=True))
  symmetric: bool = dataclasses.field(default=True, metadata=dict(static=True))
  integer: bool = dataclasses.field(default=False, metadata=dict(static=True))

  def __post_init__(self):
    if not 2 <= self.bits <= 8:
      raise UserError(f"Round.bits: found {self.bits}, expected 2 to 8.")
    if not 0 < self.clip <= 1:
      raise UserError(
        f"Round.clip: found {self.clip}, expected more than 0, at most 1."
      )
    if self.group is not None and (self.per == "tensor" or self.group < 1):
      raise UserError(
        f"Round.group: found {self.group} with per={self.per!r}, expected a"
        " number of inputs with per='token'."
      )
    whole = self.per == "tensor" and self.symmetric
    if self.static is not None and not whole:
      raise UserError(
        "Round.static: a scale from calibration is one a tensor, without zero"
        " point.\nExpected per='tensor' and symmetric=True."
      )
    if self.integer and not self.symmetric:
      raise UserError("Round.integer: expected symmetric=True.")

  def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B I"]:
    """Returns `x` rounded, in its dtype; the gradient is that of `x`."""
    return _straight_through(self, x)

  def codes(
    self, x: Float[Array, "*B I"]
  ) -> tuple[Float[Array, "*B G J"], Float[Array, "*B G 1"], Any]:
    """Returns (codes, scale, zero): `x` is about `(codes - zero) scale`.

    Args:
      x: activations, in G groups of J inputs.

    Raises:
      UserError: `group` does not divide I.
    """
    size = self.group or x.shape[-1]
    if x.shape[-1] % size:
      raise UserError(
        f"Round.group: {size} does not divide the {x.shape[-1]} inputs."
      )
    x = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, size)
    over = -1 if self.per == "token" else None
    top = 2 ** (self.bits - 1) - 1
    if self.symmetric:
      if self.static is None:
        most = jnp.max(jnp.abs(x), axis=over, keepdims=True)
        scale = _positive(self.clip * most / top)
      else:
        scale = jnp.broadcast_to(self.static, x[..., :1].shape)
      return jnp.clip(jnp.round(x / scale), -top - 1, top), scale, 0.0
    most = jnp.maximum(jnp.max(x, axis=over, keepdims=True), 0)
    least = jnp.minimum(jnp.min(x, axis=over, keepdims=True), 0)
    last = 2**self.bits - 1
    scale = _positive(self.clip * (most - least) / last)
    zero = jnp.round(-self.clip * least / scale)
    return jnp.clip(jnp.round(x / scale) + zero, 0, last), scale, zero

  def einsum(
    self, eq: str, x: Float[Array, "..."], w: weights.Weight
  ) -> Float[Array, "..."]:
    """Returns `einsum(eq, self(x), w)`."""
    return weights.einsum(eq, self(x), w)

  def undone(self, w: Float[Array, "*L I O"]) -> Float[Array, "*L I O"]:
    """Returns `w`: rounding has no matrix."""
    return w


def _positive(scale):
  return jnp.where(scale > 0, scale, 1.0)


@jax.custom_vjp
def _straight_through(op, x):
  codes, scale, zero = op.codes(x)
  return ((codes - zero) * scale).reshape(x.shape).astype(x.dtype)


def _forward(op, x):
  return _straight_through(op, x), op


def _backward(op, dy):
  return jax.tree.map(jnp.zeros_like, op), dy


_straight_through.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
  """The transform that gives matrices an op of their inputs.

  Attributes:
    op: see `Op`.
    targets: regular expression, searched for in a matrix's path.
  """

  op: Any = Round()
  targets: str = LINEAR

  def __call__(self, params: Params, key: PRNGKey | None = None) -> Any:
    """Returns `params` whose matrices take `op` of their inputs.

    Raises:
      UserError: no path matches.
    """
    del key
    found = re.compile(self.targets)
    paths = []

    def one(path: str, w: Any) -> Any:
      if not found.search(path):
        return w
      paths.append(path)
      return InputTensor(w, self.op)

    out = tree.map_paths(one, params, is_leaf=weights.is_weight)
    if not paths:
      raise UserError(f"Inputs.targets: {self.targets!r} matches no matrix.")
    return out
