"""Quantization-aware training: masters that multiply as what they round to.

A `FakeQuantTensor` holds full-precision weights and is, to whoever multiplies
by it, the packed matrix that they make: the same encoder and decoder, so that

  Convert()(Prepare(format)(params)) == what was trained, bit for bit.

Scales are found anew from the masters in every step, and the gradient of
rounding is that of the identity: straight-through (Bengio et al. 2013,
arXiv:1308.3432). Or scales are learned: LSQ (Esser et al. 2020,
arXiv:1902.08153). The masters may be any weight: around an adapted one,
`Prepare` after `Adapt`, a few adapters are trained such that the merged matrix
is good once it is rounded; nothing is lost when they are merged.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import tree, weights
from research.quant import qtensor
from research.quant.format import Format
from research.quant.formats.affine import Affine
from research.quant.numerics import finite
from research.quant.quantize import ALL_LINEAR, Quantize
from research.typing import Array, Float, Int, Params, PRNGKey, UserError

TRAINABLE = r"^(?!.*/start$)"
"""Paths of what is learned in a prepared tree, if everything is."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FakeQuantTensor(weights.WrappedWeight):
  """A matrix that is used as its own rounding.

  Attributes:
    w: the masters, `[..., I, O]`: an array, or any weight.
    gain: of learned scales, `[..., G, O]`, or None where scales follow the
      masters. A share, so that a rate suits scales of any size.
    start: the scales at gain 1; never learned.
    format: what `w` is rounded to; static.
  """

  w: Any
  gain: Any = None
  start: Any = None
  format: Format = dataclasses.field(
    default=Format(), metadata=dict(static=True)
  )

  def dense(self) -> Float[Array, "..."]:
    """Returns the rounded matrix; its gradient reaches the masters."""
    w = weights.dense(self.w)
    if self.gain is None:
      return rounded(self.format, w)
    f = functools.partial(_learned, self.format)
    for _ in self.shape[:-2]:
      f = jax.vmap(f)
    return f(w, self.gain, self.start)

  def packed(self, where: str = "FakeQuantTensor") -> qtensor.QTensor:
    """Returns what `dense` stands for, packed.

    Args:
      where: its address, for messages.

    Raises:
      UserError: training left what is not finite.
    """
    w = weights.dense(self.w)
    finite.check(w, where)
    if self.gain is None:
      return qtensor.pack(w, self.format)
    f = functools.partial(_on_grid, self.format)
    for _ in self.shape[:-2]:
      f = jax.vmap(f)
    codes, scale = f(w, self.gain, self.start)
    return qtensor.QTensor(
      self.format.parts(codes, scale, self.format.middle),
      format=self.format,
      inputs=w.shape[-2],
      outputs=w.shape[-1],
      of=str(w.dtype),
    )

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `einsum(eq, x, rounded w)`."""
    return weights.einsum(eq, x, self.dense())

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns rows of the rounded matrix."""
    return weights.take(self.dense(), ids)

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    """Returns each row of `x` times its expert's rounded matrix."""
    return weights.ragged_dot(x, self.dense(), sizes)

  def axes(self, names: tuple[str | None, ...]) -> "FakeQuantTensor":
    """Groups keep the inputs' name."""
    return dataclasses.replace(
      self,
      w=weights.axes(self.w, names),
      gain=weights.axes(self.gain, names),
      start=weights.axes(self.start, names),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rounded(
  format: Format, w: Float[Array, "... I O"]
) -> Float[Array, "... I O"]:
  """Returns what is left of `w` in a format; the gradient is that of `w`."""
  return qtensor.pack(w, format).dense()


def _straight(format, saved, dy):
  del format, saved
  return (dy,)


rounded.defvjp(lambda format, w: (rounded(format, w), None), _straight)


def _on_grid(format, w, gain, start):
  """Returns (codes `[G, S, O]`, scales `[G, O]` as stored) of one matrix."""
  groups = w.astype(jnp.float32).reshape(*start.shape[:1], -1, w.shape[-1])
  scale = (gain * start).astype(format.scale_dtype).astype(jnp.float32)
  return format.codes(groups, scale, format.middle), scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _learned(format, w, gain, start):
  """Returns one matrix on a learned grid; see `_learned_backward`."""
  codes, scale = _on_grid(format, w, gain, start)
  return format.values(codes, scale, format.middle).reshape(w.shape)


def _learned_forward(format, w, gain, start):
  return _learned(format, w, gain, start), (w, gain, start)


def _learned_backward(format, saved, dy):
  """LSQ, equation 3: a scale moves by what rounding left, or by the end.

  Masters beyond the grid's ends have no gradient.
  """
  w, gain, start = saved
  codes, scale = _on_grid(format, w, gain, start)
  value = codes - format.middle
  x = w.astype(jnp.float32).reshape(codes.shape) / scale[:, None]
  inside = (x > -format.middle) & (x < format.middle - 1)
  dy_groups = dy.astype(jnp.float32).reshape(codes.shape)
  slope = jnp.where(inside, value - x, value)
  size = 1 / np.sqrt(codes.shape[1] * (format.middle - 1))
  d_scale = size * (dy_groups * slope).sum(1)
  dw = jnp.where(inside.reshape(w.shape), dy, 0).astype(w.dtype)
  return dw, d_scale * start, None


_learned.defvjp(_learned_forward, _learned_backward)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare:
  """The transform before training; after `Adapt`, if there are adapters.

  Attributes:
    format: what is trained for.
    targets: as `Quantize.targets`.
    learned: whether scales are learned (LSQ); of symmetric `Affine`. They
      start from `2 mean|w| / sqrt(largest code)`.
  """

  format: Format = Affine(bits=4, block=32, symmetric=True)
  targets: str | Sequence[str] = ALL_LINEAR
  learned: bool = False

  def __call__(self, params: Params, key: PRNGKey | None = None) -> Any:
    """Returns `params` whose matrices are used as their own rounding.

    Raises:
      UserError: a target matches nothing, or the format holds no such matrix.
    """
    del key
    quantize = Quantize(format=self.format, targets=self.targets)
    chosen = set(quantize.chosen(params))

    def one(path: str, w: Any) -> Any:
      return self.prepared(w) if path in chosen else w

    return tree.map_paths(one, params, is_leaf=weights.is_weight)

  def prepared(self, w: Any) -> FakeQuantTensor:
    """Returns one weight, or a stack of them, prepared."""
    format = self.format.fitted(*w.shape[-2:])
    if not self.learned:
      return FakeQuantTensor(w, format=format)
    if not isinstance(format, Affine) or not format.symmetric:
      raise UserError(
        f"Prepare.learned: found {format.name}, expected a symmetric Affine"
      )
    dense = weights.dense(w).astype(jnp.float32)
    *lead, inputs, outputs = dense.shape
    groups = dense.reshape(*lead, -1, format.block, outputs)
    start = 2 * abs(groups).mean(-2) / np.sqrt(format.middle - 1)
    start = jnp.where(start > 0, start, 1.0)
    return FakeQuantTensor(w, jnp.ones_like(start), start, format)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
  """The transform after training: masters and adapters become packed."""

  def __call__(self, params: Params, key: PRNGKey | None = None) -> Any:
    """Returns `params` with what their matrices were used as, packed."""
    del key

    def one(path: str, w: Any) -> Any:
      return w.packed(path) if isinstance(w, FakeQuantTensor) else w

    return tree.map_paths(one, params, is_leaf=weights.is_weight)


def bare(params: Params) -> Any:
  """Returns a prepared model without rounding and adapters: what it was.

  A teacher for `training.distill.Distill`, where only adapters are trained.
  """

  def one(w: Any) -> Any:
    while isinstance(w, FakeQuantTensor) or weights.is_adapter(w):
      w = w.w
    return w

  return jax.tree.map(one, params, is_leaf=weights.is_weight)
