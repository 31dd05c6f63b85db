"""Quantization-aware training (QAT): fake quantization, and LSQ.

A `FakeQuantTensor` holds full-precision master weights and multiplies by their
rounded values. It uses the encoder and decoder of the packed format, so that

  Convert()(Prepare(format)(params)) == what was trained, bit for bit.

Scales are recomputed from the master weights in every step, and gradients pass
straight through rounding (straight-through estimator, Bengio et al. 2013,
arXiv:1308.3432). Alternatively scales are learned: LSQ (Esser et al. 2020,
arXiv:1902.08153). The master weights may be any weight: `Prepare` after `Adapt`
trains adapters for the rounded merged matrix, so that merging them loses
nothing.
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
from research.quant.activations import InputTensor
from research.quant.format import Format
from research.quant.formats.affine import Affine
from research.quant.numerics import finite
from research.quant.quantize import ALL_LINEAR, Quantize
from research.typing import Array, Float, Int, Params, PRNGKey, UserError

TRAINABLE = r"^(?!.*/start$)"
"""Trainable paths of a prepared tree if all weights are trained."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FakeQuantTensor(weights.WrappedWeight):
  """A fake-quantized matrix: master weights that multiply rounded.

  Attributes:
    w: the master weights, `[..., I, O]`: an array or any weight.
    gain: factor of learned scales, `[..., G, O]`, or None if scales are
      computed from the master weights. It is relative to `start`, so that one
      learning rate suits scales of any magnitude.
    start: the initial scales; not trained.
    format: the format that `w` is rounded to; static.
  """

  w: Any
  gain: Any = None
  start: Any = None
  format: Format = dataclasses.field(
    default=Format(), metadata=dict(static=True)
  )

  def dense(self) -> Float[Array, "..."]:
    w = weights.dense(self.w)
    if self.gain is None:
      return fake_quantize(self.format, w)
    f = functools.partial(_learned, self.format)
    for _ in self.shape[:-2]:
      f = jax.vmap(f)
    return f(w, self.gain, self.start)

  def pack(self, where: str = "FakeQuantTensor") -> qtensor.QTensor:
    """Returns the rounded matrix as a packed weight.

    Raises:
      UserError: the master weights are not finite.
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

  def bind(
    self, *, key: PRNGKey | None, ids: Int[Array, "B"] | None
  ) -> "FakeQuantTensor":
    """Returns the weight with `w` bound to a batch.

    Raises:
      UserError: an adapter inside has dropout.
    """
    bound = super().bind(key=key, ids=ids)
    if key is not None and (
      jax.tree.structure(bound.w) != jax.tree.structure(self.w)
    ):
      raise UserError(
        "FakeQuantTensor: found an adapter with dropout, expected dropout = 0:"
        " the merged matrix is rounded, and has no adapter's input to drop"
      )
    return bound

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    return weights.einsum(eq, x, self.dense())

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    return weights.take(self.dense(), ids)

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    return weights.ragged_dot(x, self.dense(), sizes)

  def axes(self, names: tuple[str | None, ...]) -> "FakeQuantTensor":
    """Groups have the inputs' logical axis."""
    return dataclasses.replace(
      self,
      w=weights.axes(self.w, names),
      gain=weights.axes(self.gain, names),
      start=weights.axes(self.start, names),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fake_quantize(
  format: Format, w: Float[Array, "... I O"]
) -> Float[Array, "... I O"]:
  """Returns `w` rounded to a format, with a straight-through gradient."""
  return qtensor.pack(w, format).dense()


def _straight(format, saved, dy):
  del format, saved
  return (dy,)


fake_quantize.defvjp(
  lambda format, w: (fake_quantize(format, w), None), _straight
)


def _on_grid(format, w, gain, start):
  """Returns (codes `[G, S, O]`, scales `[G, O]` as stored) of one matrix."""
  groups = w.astype(jnp.float32).reshape(*start.shape[:1], -1, w.shape[-1])
  scale = (gain * start).astype(format.scale_dtype).astype(jnp.float32)
  return format.codes(groups, scale, format.middle), scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _learned(format, w, gain, start):
  """Returns one matrix on a learned grid; see `_learned_backward`."""
  codes, scale = _on_grid(format, w, gain, start)
  values = format.values(codes, scale, format.middle)
  return values.reshape(w.shape).astype(w.dtype)


def _learned_forward(format, w, gain, start):
  return _learned(format, w, gain, start), (w, gain, start)


def _learned_backward(format, saved, dy):
  """Backward pass of LSQ, equation 3.

  A scale's gradient is the rounding residual of master weights within the
  grid, and the end code of those beyond it, which get no gradient themselves.
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
  """Transform that adds fake quantization; after `Adapt`, if adapters are used.

  Attributes:
    learned: whether scales are learned (LSQ), from
      `2 mean|w| / sqrt(largest code)`; requires a symmetric `Affine`.
  """

  format: Format = Affine(bits=4, block=32, symmetric=True)
  targets: str | Sequence[str] = ALL_LINEAR
  learned: bool = False

  def __call__(self, params: Params, key: PRNGKey | None = None) -> Any:
    """Returns `params` with fake-quantized matrices.

    Raises:
      UserError: a target matches nothing, or the format cannot hold a matrix.
    """
    del key
    quantize = Quantize(format=self.format, targets=self.targets)
    chosen = set(quantize.selected_paths(params))

    def one(path: str, w: Any) -> Any:
      # Innermost: operations on the inputs stay, as for `Quantize`.
      return weights.map_inner(w, self.prepare) if path in chosen else w

    return tree.map_paths(one, params, is_leaf=weights.is_weight)

  def prepare(self, w: Any) -> FakeQuantTensor:
    for below in weights.nested(w):
      if isinstance(below, InputTensor):
        raise UserError(
          f"Prepare: found a {type(w).__name__} over operations on inputs"
          f" ({below.op!r}), which would be lost; apply Prepare before Adapt"
        )
    format = self.format.for_shape(*w.shape[-2:])
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
  """Transform after training that packs master weights and adapters."""

  def __call__(self, params: Params, key: PRNGKey | None = None) -> Any:
    """Returns `params` with fake-quantized matrices packed.

    Biases that an adapter scales are merged with it.
    """
    del key
    scaling = {
      weights.bias_path(path): w
      for path, w in weights.named_weights(params)
      if isinstance(weights.inner(w), FakeQuantTensor)
    }

    def one(path: str, w: Any) -> Any:
      if isinstance(weights.inner(w), FakeQuantTensor):
        return weights.map_inner(w, lambda w: w.pack(path))
      if path not in scaling:
        return w
      return weights.scaled_bias(scaling[path], w).astype(w.dtype)

    return tree.map_paths(one, params, is_leaf=weights.is_weight)


def remove_fake_quant(params: Params) -> Any:
  """Returns the parameters without fake quantization and adapters.

  A teacher for `training.objectives.distill.Distill` if only adapters are
  trained.
  """

  def one(w: Any) -> Any:
    while isinstance(w, FakeQuantTensor) or weights.is_adapter(w):
      w = w.w
    return w if weights.inner(w) is w else weights.map_inner(w, one)

  return jax.tree.map(one, params, is_leaf=weights.is_weight)
