"""Quantized weight matrix: one pytree leaf for every format.

The arrays of a `QTensor` are the encoded parts of a matrix, with blocks along
the inputs and outputs last, so that decoding vectorises along outputs. Products
decode the matrix where it is used and the backward pass decodes it again (as
QLoRA does, Dettmers et al. 2023, arXiv:2305.14314, section 3): only the packed
form stays in memory.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import weights
from research.quant.format import Format, NormalForm, format_for
from research.quant.layouts import products
from research.quant.numerics import finite
from research.typing import Array, Float, Int, PRNGKey


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor(weights.Weight):
  """A packed matrix; frozen: its parts receive no gradient.

  Attributes:
    parts: name -> array, with trailing axes as in `format.layout()` and any
      leading axes.
    order: int32 `[..., I]` or None: row `i` of the matrix is stored at
      `order[i]`.
    outliers: None, or `{"rows": int32 [..., n], "values": [..., n, O]}`: rows
      of the matrix that replace the packed ones.
    format: decodes the parts.
    inputs, outputs: I and O of the stored matrix.
    axis: -2 if the stored matrix is the logical one, `[I, O]`; -1 if it is its
      transpose, such as an embedding `[V, D]` with blocks along D.
    of: dtype of the decoded matrix.
  """

  parts: Any
  order: Any = None
  outliers: Any = None
  format: Format = dataclasses.field(
    default=Format(), metadata=dict(static=True)
  )
  inputs: int = dataclasses.field(default=0, metadata=dict(static=True))
  outputs: int = dataclasses.field(default=0, metadata=dict(static=True))
  axis: int = dataclasses.field(default=-2, metadata=dict(static=True))
  of: str = dataclasses.field(default="float32", metadata=dict(static=True))

  @property
  def lead(self) -> tuple[int, ...]:
    """Sizes of the leading axes over matrices."""
    name, letters = next(iter(self.format.layout().items()))
    shape = self.parts[name].shape
    return tuple(shape[: len(shape) - len(letters)])

  @property
  def shape(self) -> tuple[int, ...]:
    stored = (self.inputs, self.outputs)
    return self.lead + stored[:: 1 if self.axis == -2 else -1]

  @property
  def ndim(self) -> int:
    return len(self.lead) + 2

  @property
  def dtype(self) -> Any:
    return jnp.dtype(self.of)

  @property
  def columns(self) -> int:
    return self.inputs

  @property
  def rows(self) -> int:
    return self.outputs

  @property
  def nbytes(self) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(self))

  @property
  def bits_per_weight(self) -> float:
    """Bits per weight; counts scales, order, outliers and everything else."""
    count = int(np.prod(self.lead, dtype=np.int64))
    return 8 * self.nbytes / (count * self.inputs * self.outputs)

  @property
  def sliceable(self) -> bool:
    return self.format.sliceable

  def to_sliceable(self) -> "QTensor":
    format, parts = self.format.to_sliceable(self.parts)
    return dataclasses.replace(self, format=format, parts=parts)

  def normal_form(self) -> NormalForm:
    return self.format.normal_form(jax.tree.map(jnp.asarray, self.parts))

  def stored(self) -> Float[Array, "... I O"]:
    w = self.format.decode(jax.tree.map(jnp.asarray, self.parts))
    if self.order is not None:
      w = jnp.take_along_axis(w, self.order[..., None], axis=-2)
    if self.outliers is not None:
      values = self.outliers["values"].astype(w.dtype)
      w = _replaced(w, self.outliers["rows"], values)
    return w.astype(self.dtype)

  def dense(self) -> Float[Array, "..."]:
    stored = self.stored()
    return stored if self.axis == -2 else jnp.swapaxes(stored, -1, -2)

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `einsum(eq, x, w)` in the dtype of `x`; contracts either axis."""
    left, w, out = eq.replace("->", ",").split(",")
    if self.axis == -1:
      w = w[:-2] + w[-1] + w[-2]
    if left[:-1] == out[:-1] and sorted((left[-1], out[-1])) == sorted(w):
      return products.matmul(x, self, transposed=left[-1] == w[1])
    stored = f"{left},{w}->{out}"
    f = lambda x, w: jnp.einsum(stored, x, w)  # noqa: E731
    along = products.output_axis(left, w[-1], out)
    return products.linear(f, x, self, along=along)

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns rows of the logical matrix; an embedding decodes only those."""
    if self.axis == -2 or not self.format.sliceable:
      return jnp.take(self.dense(), ids, axis=0)
    some = self._outputs(lambda x: jnp.take(x, ids.reshape(-1), axis=-1))
    some = dataclasses.replace(some, outputs=ids.size)
    return some.dense().reshape(*ids.shape, self.inputs)

  def output_slice(self, i: Int[Array, ""], size: int) -> "QTensor":
    def cut(x: Array) -> Array:
      return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=-1)

    return dataclasses.replace(self._outputs(cut), outputs=size)

  def _outputs(self, f) -> "QTensor":
    w = self.to_sliceable()
    layout = w.format.layout()
    parts = {
      name: f(x) if layout[name].endswith("o") else x
      for name, x in w.parts.items()
    }
    outliers = self.outliers
    if outliers is not None:
      outliers = outliers | {"values": f(outliers["values"])}
    return dataclasses.replace(w, parts=parts, outliers=outliers)

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    return products.ragged_dot(x, self, sizes, self.axis)

  def axes(self, names: tuple[str | None, ...]) -> "QTensor":
    """Blocks have the inputs' logical axis, outputs theirs, others None."""
    *lead, first, second = names
    inputs, outputs = (first, second) if self.axis == -2 else (second, first)
    of = {"x": inputs, "o": outputs, ".": None}

    # A part may be None: in the trainable half of a tree all of them are.
    parts = {
      name: weights.axes(x, (*lead, *(of[c] for c in layout)))
      for name, layout in self.format.layout().items()
      for x in [self.parts[name]]
    }
    order = weights.axes(self.order, (*lead, None))
    outliers = self.outliers
    if outliers is not None:
      outliers = {
        "rows": weights.axes(outliers["rows"], (*lead, None)),
        "values": weights.axes(outliers["values"], (*lead, None, outputs)),
      }
    return dataclasses.replace(
      self, parts=parts, order=order, outliers=outliers
    )

  def bind(
    self, *, key: PRNGKey | None, ids: Int[Array, "B"] | None
  ) -> "QTensor":
    return self

  def squeeze(self) -> "QTensor":
    """Returns a copy without a leading axis of size one."""
    return jax.tree.map(lambda x: x.reshape(x.shape[1:]), self)


def _replaced(w, rows, values):
  if w.ndim == 2:
    return w.at[rows].set(values)
  return jax.vmap(_replaced)(w, rows, values)


def pack(
  w: Float[Array, "... I O"] | np.ndarray,
  format: Format,
  importance: Float[Array, "... I"] | None = None,
  where: str = "",
) -> QTensor:
  """Packs a matrix or a stack of matrices.

  Args:
    w: finite. NumPy arrays are packed in NumPy if the format supports that;
      every format packs traced arrays, see `Format.encode_traced`.
    importance: weight of each input's errors; see `Format.encode`.

  Raises:
    UserError: the format cannot hold such a matrix, or it is not finite (not
      checked for traced arrays).
  """
  finite.check(w, where or "pack")
  *lead, inputs, outputs = w.shape
  format = format_for(where, format, w.shape)
  made = functools.partial(
    QTensor, format=format, inputs=inputs, outputs=outputs, of=str(w.dtype)
  )
  if not lead:
    return made(format.encode_traced(w, importance))
  matrices = w.reshape(-1, inputs, outputs)
  given = [matrices]
  if importance is not None:
    given.append(importance.reshape(-1, inputs))
  inside = any(isinstance(x, jax.core.Tracer) for x in given)
  if isinstance(w, np.ndarray) or not (format.traceable or inside):
    each = [format.encode(*xs) for xs in zip(*given, strict=True)]
    parts = jax.tree.map(lambda *x: np.stack(x), *each)
  else:
    # `lax.map` needs temporary memory for one matrix at a time.
    parts = jax.lax.map(lambda xs: format.encode_traced(*xs), tuple(given))
  return made(jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), parts))
