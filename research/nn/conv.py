"""2-D convolutions as matrix products over patches (im2col).

A kernel `[kh, kw, in, out]` applied to windows of an image is a matrix
`[in kh kw, out]` applied to patches. In that form a kernel can be adapted,
quantized and tapped like any other matrix. `ConvTensor` holds the matrix and is
not a `Weight` itself, so that transforms see the matrix inside.

If windows do not overlap, as in the patch embedding of a vision tower, the
patches are the image in another order. Otherwise they take
`kh kw / (stride stride)` times its memory. Plain array kernels use XLA's
convolution, which needs no patches.
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
"""`"VALID"`, `"SAME"`, or the padding (before, after) of each spatial axis."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvTensor:
  """A convolution kernel, stored as the matrix that multiplies patches.

  Attributes:
    matrix: any weight `[..., in kh kw, out]`; the input channel varies slowest,
      as in torch's kernels `[out, in, kh, kw]`.
    window: (kh, kw); static.
  """

  matrix: Any
  window: tuple[int, int] = dataclasses.field(metadata=dict(static=True))

  def dense(self) -> Float[Array, "..."]:
    """Returns the kernel `[..., kh, kw, in, out]`."""
    w = weights.dense(self.matrix)
    w = w.reshape(*w.shape[:-2], -1, *self.window, w.shape[-1])
    return jnp.moveaxis(w, -4, -2)


def kernel_to_matrix(kernel: Float[Array, "*L kh kw I O"]) -> ConvTensor:
  """Converts an array kernel to a `ConvTensor`."""
  window = kernel.shape[-4:-2]
  w = jnp.moveaxis(kernel, -2, -4)
  return ConvTensor(w.reshape(*w.shape[:-4], -1, w.shape[-1]), window)


def patches(
  x: Float[Array, "B H W C"],
  window: tuple[int, int],
  strides: tuple[int, int],
  padding: Padding = "VALID",
) -> Float[Array, "B P Q N"]:
  """Extracts the windows of images as vectors of size `C kh kw` (im2col).

  Args:
    x: images.
    window: (kh, kw).
    strides: (vertical, horizontal).
    padding: zero padding.

  Raises:
    UserError: an image is smaller than the window.
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
  """Returns the convolution in the dtype of `x`.

  As in torch, this is a cross-correlation: kernels are not flipped.

  Args:
    x: images.
    w: a kernel `[kh, kw, C, O]`, or a `ConvTensor`.
    strides: (vertical, horizontal).
    padding: zero padding.
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
  """A convolution with parameters `kernel [kh, kw, C, O]` and `bias [O]`.

  Attributes:
    features: `O`.
    window: (kh, kw).
    strides: (vertical, horizontal); None for non-overlapping windows.
    padding: zero padding.
    bias: whether to add a bias.
  """

  features: int
  window: tuple[int, int]
  strides: tuple[int, int] | None = None
  padding: Padding = "VALID"
  bias: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B P Q O"]:
    """Returns the convolution of images `x`."""
    shape = (*self.window, x.shape[-1], self.features)
    w = weights.weight(
      self, "kernel", nn.initializers.lecun_normal(in_axis=(0, 1, 2)), shape
    )
    y = conv(x, w, self.strides or self.window, self.padding)
    if not self.bias:
      return y
    zeros = nn.initializers.zeros
    b = weights.weight(self, "bias", zeros, y.shape[-1:])
    return y + weights.scaled_bias(getattr(w, "matrix", w), b).astype(y.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AsMatrices:
  """Converts kernels to `ConvTensor`s, which can be adapted and quantized.

  Attributes:
    kernels: regular expression, searched for in the parameter paths.
  """

  kernels: str = r"(^|/)kernel$"

  def __call__(self, params: Params, key: PRNGKey | None = None) -> Any:
    """Returns `params` with converted kernels, whose paths end in `/matrix`.

    Raises:
      UserError: no parameter matches, or one that matches is not a kernel.
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
      return kernel_to_matrix(x)

    out = tree.map_paths(one, params, is_leaf=weights.is_weight)
    if not found:
      raise UserError(
        f"AsMatrices: {self.kernels!r} matches no kernel of the model"
      )
    return out
