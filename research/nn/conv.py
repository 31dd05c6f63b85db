"""Convolutions over images, as products with matrices.

A kernel `[kh, kw, in, out]` that multiplies windows of an image is a matrix
`[in kh kw, out]` that multiplies patches. As that, whatever a matrix can be
(adapted, packed, tapped) a kernel can be: `ConvTensor` holds the matrix, and
is no weight itself, so that transforms see the matrix inside.

Where windows do not overlap, as in a vision tower's patch embedding, patches
are the image in another order. Elsewhere they take `kh kw / (stride stride)`
times its memory, which a plain kernel, multiplied by XLA's own convolution,
does not.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from research import tree, weights
from research.typing import Array, Float, Params, PRNGKey, UserError

Padding = str | Sequence[tuple[int, int]]
"""`"VALID"`, `"SAME"`, or what is added before and behind each axis."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvTensor:
  """A kernel as the matrix that patches are multiplied by.

  Attributes:
    matrix: any weight `[..., in kh kw, out]`; inputs change slowest, as in
      torch's kernels `[out, in, kh, kw]`.
    window: (kh, kw); static.
  """

  matrix: Any
  window: tuple[int, int] = dataclasses.field(metadata=dict(static=True))

  def dense(self) -> Float[Array, "..."]:
    """Returns the kernel `[..., kh, kw, in, out]`."""
    w = weights.dense(self.matrix)
    w = w.reshape(*w.shape[:-2], -1, *self.window, w.shape[-1])
    return jnp.moveaxis(w, -4, -2)


def of_kernel(kernel: Float[Array, "*L kh kw I O"]) -> ConvTensor:
  """Returns a kernel as a `ConvTensor` around an array."""
  window = kernel.shape[-4:-2]
  w = jnp.moveaxis(kernel, -2, -4)
  return ConvTensor(w.reshape(*w.shape[:-4], -1, w.shape[-1]), window)


def patches(
  x: Float[Array, "B H W C"],
  window: tuple[int, int],
  strides: tuple[int, int],
  padding: Padding = "VALID",
) -> Float[Array, "B P Q N"]:
  """Returns the windows of images as rows `[C kh kw]`.

  Args:
    x: images.
    window: (kh, kw).
    strides: between windows, down and to the right.
    padding: of zeros.
  """
  pads = padding
  if isinstance(padding, str):
    pads = jax.lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
  x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  rows, columns = (
    (size - k) // step + 1
    for size, k, step in zip(x.shape[1:3], window, strides, strict=True)
  )
  if min(rows, columns) < 1:
    raise UserError(
      f"convolution: a window of {window} in images of {x.shape[1:3]}.\n"
      "Expected images at least as large."
    )
  batch, channels = x.shape[0], x.shape[-1]
  if tuple(strides) == tuple(window):
    (h, w), used = window, x[:, : rows * window[0], : columns * window[1]]
    cut = used.reshape(batch, rows, h, columns, w, channels)
    found = cut.transpose(0, 1, 3, 5, 2, 4)
  else:
    found = jnp.stack(
      [
        x[:, i :: strides[0], j :: strides[1]][:, :rows, :columns]
        for i in range(window[0])
        for j in range(window[1])
      ],
      -1,
    )
  return found.reshape(batch, rows, columns, channels * math.prod(window))


def conv(
  x: Float[Array, "B H W C"],
  w: Any,
  strides: tuple[int, int] = (1, 1),
  padding: Padding = "VALID",
) -> Float[Array, "B P Q O"]:
  """Returns the convolution (torch's: kernels are not turned), in `x`'s type.

  Args:
    x: images.
    w: a kernel `[kh, kw, C, O]`, or a `ConvTensor`.
    strides: between windows.
    padding: of zeros.
  """
  if isinstance(w, ConvTensor):
    if weights.is_weight(w.matrix):
      rows = patches(x, w.window, strides, padding)
      return weights.einsum("...d,df->...f", rows, w.matrix)
    w = w.dense()
  return jax.lax.conv_general_dilated(
    x,
    w.astype(x.dtype),
    strides,
    padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


class Conv(nn.Module):
  """A convolution; its parameters are `kernel [kh, kw, C, O]` and `bias`.

  Attributes:
    features: `O`.
    window: (kh, kw).
    strides: between windows; None for the window: patches side by side.
    padding: of zeros.
    bias: whether there is one.
  """

  features: int
  window: tuple[int, int]
  strides: tuple[int, int] | None = None
  padding: Padding = "VALID"
  bias: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B P Q O"]:
    """Returns the features of each window."""
    shape = (*self.window, x.shape[-1], self.features)
    w = weights.weight(
      self, "kernel", nn.initializers.lecun_normal(in_axis=(0, 1, 2)), shape
    )
    y = conv(x, w, self.strides or self.window, self.padding)
    if not self.bias:
      return y
    zeros = nn.initializers.zeros
    b = weights.weight(self, "bias", zeros, y.shape[-1:])
    return y + weights.bias_of(getattr(w, "matrix", w), b).astype(y.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AsMatrices:
  """Turns kernels into `ConvTensor`s, which adapters and quantizers reach.

  Attributes:
    kernels: regular expression, searched for in their paths.
  """

  kernels: str = r"(^|/)kernel$"

  def __call__(self, params: Params, key: PRNGKey | None = None) -> Any:
    """Returns `params` with matrices; addresses end in `/matrix`.

    Raises:
      UserError: there is no such kernel.
    """
    del key
    found = []

    def one(path, x):
      if re.search(self.kernels, path) is None:
        return x
      if weights.is_weight(x) or x.ndim < 4:
        raise UserError(
          f"AsMatrices: {path} has shape {tuple(x.shape)}, expected a kernel"
          " [kh, kw, in, out]"
        )
      found.append(path)
      return of_kernel(x)

    out = tree.map_paths(one, params, is_leaf=weights.is_weight)
    if not found:
      raise UserError(
        f"AsMatrices: {self.kernels!r} matches no kernel of the model"
      )
    return out
