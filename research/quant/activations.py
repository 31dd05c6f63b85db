"""Activation quantization: weights that round or rotate their inputs.

An `InputTensor` wraps a weight and applies an `op` to the activations that it
multiplies: `Round` below, LLM.int8 (`research.quant.llm_int8`) or a rotation
(`algorithms.rotate`). They nest: rotate, round, then multiply packed codes. The
model's modules do not change.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from research import tree, weights
from research.quant.numerics import exact_division
from research.quant.numerics.integers import integer_codes, integer_product
from research.quant.qtensor import QTensor
from research.ranges import (
  Between,
  NonNegativeInt,
  OneOf,
  PositiveShare,
  Ranged,
)
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
"""Regular expression for paths of a layer's matrices, except the router."""


_E4M3 = 448.0
"""The largest number of float8_e4m3fn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
  """Operation on a weight's inputs, as a static value.

  The base class is the identity. `scale` arguments are the leaf's static scale,
  or None.
  """

  def __call__(self, x: Float[Array, "..."], scale: Any = None) -> Any:
    """Returns the transformed `x [..., I]`."""
    del scale
    return x

  def einsum(
    self,
    eq: str,
    x: Float[Array, "..."],
    w: weights.AnyWeight,
    scale: Any = None,
  ) -> Float[Array, "..."]:
    return weights.einsum(eq, self(x, scale), w)

  def is_row_wise(self, scale: Any = None) -> bool:
    """Whether the result for a row of `x` depends on that row only.

    Elsewhere the rows of a call share something, so padding, other rows of a
    batch and chunks change results.
    """
    del scale
    return True

  def take(
    self, w: weights.AnyWeight, ids: Int[Array, "..."]
  ) -> Float[Array, "... O"]:
    """Returns rows of the effective matrix; a look-up rounds no inputs."""
    return weights.take(w, ids)

  def effective_weight(
    self, w: Float[Array, "*L I O"]
  ) -> Float[Array, "*L I O"]:
    """Returns the matrix that op and `w` apply to `x` together, unrounded."""
    return w

  def stored_weight(self, w: Float[Array, "*L I O"]) -> Float[Array, "*L I O"]:
    """Returns the matrix of which `effective_weight` is `w`."""
    return w


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputTensor(weights.WrappedWeight):
  """A weight `[..., I, O]` and an operation on its inputs.

  Attributes:
    w: any weight; it multiplies `op(x)`.
    scale: static scale of the activations, from calibration, `[...]`; or None.
    op: operation on the inputs; static.
  """

  w: Any
  scale: Any = None
  op: Op = dataclasses.field(default=Op(), metadata=dict(static=True))

  @property
  def row_wise(self) -> bool:
    return self.op.is_row_wise(self.scale)

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `einsum(eq, op(x), w)`; `eq` contracts the inputs of `w`.

    Raises:
      UserError: `eq` does not contract the inputs of `w`.
    """
    left, right = eq.split("->")[0].split(",")
    if left[-1] != right[0] or len(right) != 2:
      raise UserError(
        f"activations: expected x[..., in] times w[in, out], found {eq!r}"
      )
    return self.op.einsum(eq, x, self.w, self.scale)

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns rows of the effective matrix, as `dense` has them."""
    return self.op.take(self.w, ids)

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    return weights.ragged_dot(self.op(x, self.scale), self.w, sizes)

  def dense(self) -> Shaped[Array, "..."]:
    return self.op.effective_weight(weights.dense(self.w))

  def axes(self, names: tuple[str | None, ...]) -> "InputTensor":
    w, scale = weights.axes(self.w, names), weights.axes(self.scale, ())
    return dataclasses.replace(self, w=w, scale=scale)

  def map_inner(self, f: Any) -> "InputTensor":
    return dataclasses.replace(self, w=weights.map_inner(self.w, f))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round(Ranged, Op):
  """Rounds activations to integers, with a scale per token or per tensor.

  The scale is `clip max|x| / (2^(bits-1) - 1)`, or with a zero point
  `clip (max - min) / (2^bits - 1)` of ranges that include 0; or the leaf's
  static scale. Gradients pass straight through rounding, and through scales, so
  the largest value receives a gradient from all values that share its scale.

  A tensor is all rows of one call, so unless the scale is static, its results
  change with padding, other rows of the batch and chunks.

  Attributes:
    bits: 2 to 8.
    per: what shares a scale, 'token' or 'tensor'.
    group: number of inputs of a token that share a scale; 0 for all.
    clip: share of the range that is not clipped (QuaRot: 0.9 at 4 bits).
    symmetric: whether there is no zero point.
    full: whether a symmetric grid uses all `2^bits` codes; its scale is then
      `2 clip max|x| / (2^bits - 1)`, as in compressed-tensors.
    integer: whether to multiply integers, summed in int32, if the weight has
      integer codes, too.
  """

  bits: Between(2, 8) = 8
  per: OneOf("token", "tensor") = "token"
  group: NonNegativeInt = 0
  clip: PositiveShare = 1.0
  symmetric: bool = True
  full: bool = False
  integer: bool = False

  def __post_init__(self):
    super().__post_init__()
    if self.group and self.per == "tensor":
      raise UserError(
        f"Round.group: found {self.group} with per={self.per!r}, expected 0, or"
        " a number of inputs with per='token'."
      )
    if self.integer and (self.group or not self.symmetric):
      raise UserError("Round.integer: expected symmetric=True and group=0.")

  def is_row_wise(self, scale: Any = None) -> bool:
    return self.per == "token" or scale is not None

  @property
  def top(self) -> int:
    return 2 ** (self.bits - 1) - 1

  def __call__(
    self, x: Float[Array, "*B I"], scale: Any = None
  ) -> Float[Array, "*B I"]:
    """Returns `x` rounded, in its dtype.

    Raises:
      UserError: `group` does not divide I.
    """
    codes, scale, zero = self.codes(x, scale)
    return ((codes - zero) * scale).reshape(x.shape).astype(x.dtype)

  def codes(
    self, x: Float[Array, "*B I"], scale: Any = None
  ) -> tuple[Float[Array, "*B G J"], Float[Array, "..."], Any]:
    """Returns (codes, scale, zero): `x` is about `(codes - zero) scale`.

    Args:
      x: activations, in G groups of J inputs.
      scale: a static scale, or None to compute it from `x`.
    """
    size = self.group or x.shape[-1]
    if x.shape[-1] % size:
      raise UserError(
        f"Round.group: {size} does not divide the {x.shape[-1]} inputs."
      )
    x = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, size)
    over = -1 if self.per == "token" else None
    if self.symmetric or scale is not None:
      if scale is None:
        most = jnp.max(jnp.abs(x), axis=over, keepdims=True)
        scale = self.clip * most / self.top
        if self.full:  # the largest value is half way between two codes
          scale = exact_division.divide(self.clip * most, self.top + 0.5)
        scale = _positive(scale)
      unit = exact_division.divide(x, scale) if self.full else x / scale
      codes = nearest_code(unit, -self.top - 1, self.top)
      return codes, jnp.asarray(scale), 0.0
    most = jnp.maximum(jnp.max(x, axis=over, keepdims=True), 0)
    least = jnp.minimum(jnp.min(x, axis=over, keepdims=True), 0)
    last = 2**self.bits - 1
    scale = _positive(self.clip * (most - least) / last)
    zero = nearest_code(-self.clip * least / scale, 0, last)
    codes = nearest_code(x / scale, -last, last) + zero
    return nearest_code(codes, 0, last), scale, zero

  def einsum(
    self,
    eq: str,
    x: Float[Array, "..."],
    w: weights.AnyWeight,
    scale: Any = None,
  ) -> Float[Array, "..."]:
    """Returns `einsum(eq, self(x), w)`; integer sums are exact."""
    if not self.integer or integer_codes(w) is None:
      return weights.einsum(eq, self(x, scale), w)
    return integer_einsum(self, eq, x, w, scale)

  def integer_einsum(
    self, eq: str, x: Float[Array, "..."], w: QTensor, scale: Any
  ) -> Float[Array, "..."]:
    """Returns the product of integers; see `integer_einsum` below."""
    del eq
    codes, scale, _ = self.codes(x, scale)
    y = integer_product(codes[..., 0, :].astype(jnp.int8), integer_codes(w))
    y = y * (scale if scale.ndim == 0 else scale[..., 0])
    return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def integer_einsum(
  op: Any, eq: str, x: Float[Array, "..."], w: QTensor, scale: Any
) -> Float[Array, "..."]:
  """Returns `op.integer_einsum`, with the gradients of the product of floats.

  Integers have no derivatives: without this, gradients would end here.
  """
  return op.integer_einsum(eq, x, w, scale)


def _integer_forward(op, eq, x, w, scale):
  return op.integer_einsum(eq, x, w, scale), (x, w, scale)


def _integer_backward(op, eq, saved, dy):
  def product(x, w, scale):
    return weights.einsum(eq, op(x, scale), w)

  return jax.vjp(product, *saved)[1](dy)


integer_einsum.defvjp(_integer_forward, _integer_backward)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundFloat(Ranged, Op):
  """Rounds activations to FP8 E4M3, with a scale per token or per tensor.

  The scale is `max|x| / 448`, or the leaf's static scale. Gradients pass
  straight through rounding.

  Attributes:
    per: what shares a scale, 'token' or 'tensor', as in `Round`.
  """

  per: OneOf("token", "tensor") = "token"

  def is_row_wise(self, scale: Any = None) -> bool:
    return self.per == "token" or scale is not None

  def __call__(
    self, x: Float[Array, "*B I"], scale: Any = None
  ) -> Float[Array, "*B I"]:
    """Returns `x` rounded, in its dtype."""
    wide = x.astype(jnp.float32)
    if scale is None:
      over = -1 if self.per == "token" else None
      most = jnp.max(jnp.abs(wide), axis=over, keepdims=True)
      scale = _positive(exact_division.divide(most, _E4M3))
    # The dtype has no infinity: larger values would become NaN.
    unit = jnp.clip(exact_division.divide(wide, scale), -_E4M3, _E4M3)
    near = unit.astype(jnp.float8_e4m3fn).astype(jnp.float32)
    near = unit + jax.lax.stop_gradient(near - unit)
    return (near * scale).astype(x.dtype)


def _positive(scale):
  return jnp.where(scale > 0, scale, 1.0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def nearest_code(x, low, high):
  """Returns the nearest code, with a straight-through derivative."""
  return jnp.clip(jnp.round(x), low, high)


@nearest_code.defjvp
def _nearest_code_jvp(low, high, primals, tangents):
  return nearest_code(*primals, low, high), tangents[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
  """Transform that applies an op to the inputs of matrices.

  Attributes:
    op: the operation, see `Op`.
    targets: regular expression, searched for in a matrix's path.
  """

  op: Op = Round()
  targets: str = LINEAR

  def __call__(self, params: Params, key: PRNGKey | None = None) -> Any:
    """Returns `params` whose matrices apply `op` to their inputs.

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
      # Innermost: rounding comes after rotation, next to the matrix.
      return weights.map_inner(w, lambda w: InputTensor(w, op=self.op))

    out = tree.map_paths(one, params, is_leaf=weights.is_weight)
    if not paths:
      raise UserError(f"Inputs.targets: {self.targets!r} matches no matrix.")
    return out
