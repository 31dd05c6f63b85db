"""Base class of weights stored in the layout of a matmul kernel."""

from typing import Any

import jax.numpy as jnp

from kernels_pallas.quantized_matmul import api
from research import weights
from research.quant.layouts import products
from research.typing import Array, Float, Int


class KernelLayout(weights.Weight):
  """A matrix `[I, O]` in a kernel's layout, with optionally permuted rows.

  Subclasses are dataclasses with `source` (int32 `[..., I]` or None: index in
  the matrix of each stored row) and `axis` (-2 if the stored matrix is the
  logical one, -1 if it is its transpose).
  """

  @property
  def operand(self) -> Any:
    raise NotImplementedError

  def decode_stored(self) -> Float[Array, "... I O"]:
    """Returns the decoded matrix with rows in the stored order."""
    raise NotImplementedError

  @property
  def shape(self) -> tuple[int, ...]:
    *lead, inputs, outputs = self.operand.shape
    last = (inputs, outputs) if self.axis == -2 else (outputs, inputs)
    return (*lead, *last)

  @property
  def ndim(self) -> int:
    return len(self.operand.shape)

  def stored(self) -> Float[Array, "... I O"]:
    """Returns the decoded matrix `[I, O]` with rows in their original order."""
    w = self.decode_stored()
    if self.source is None:
      return w
    order = jnp.argsort(self.source, axis=-1)
    return jnp.take_along_axis(w, order[..., None], axis=-2)

  def dense(self) -> Float[Array, "..."]:
    """Returns the logical matrix, bitwise equal to the original."""
    stored = self.stored()
    return stored if self.axis == -2 else jnp.swapaxes(stored, -1, -2)

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `einsum(eq, x, w)`, by the kernel if `eq` contracts `I`."""
    left, w, out = eq.replace("->", ",").split(",")
    if self.axis == -1:
      w = w[:-2] + w[-1] + w[-2]
    if len(w) == 2 and left[-1] == w[0] and out == left[:-1] + w[1]:
      if self.source is not None:
        x = jnp.take(x, self.source, axis=-1, unique_indices=True)
      return api.quantized_matmul(x, self.operand)
    stored = f"{left},{w}->{out}"
    return products.linear(lambda x, w: jnp.einsum(stored, x, w), x, self)

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    return products.ragged_dot(x, self, sizes, self.axis)
