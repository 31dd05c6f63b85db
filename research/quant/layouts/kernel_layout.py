"""What packed matrices share that lie as some kernel multiplies them."""

from typing import Any

import jax.numpy as jnp

from kernels_pallas.quantized_matmul import api
from research import weights
from research.quant.layouts import products
from research.typing import Array, Float, Int


class KernelLayout(weights.Weight):
  """A matrix `[I, O]` in a kernel's layout, its rows perhaps in another order.

  Subclasses are dataclasses with `source` (int32 `[..., I]` or None: the row of
  the matrix that each stored row is) and `axis` (-2 if the stored order is the
  logical one, -1 if its transpose is).
  """

  @property
  def held(self) -> Any:
    """Returns what the kernel takes."""
    raise NotImplementedError

  def decoded(self) -> Float[Array, "... I O"]:
    """Returns the matrix as it is stored, rows in its own order."""
    raise NotImplementedError

  @property
  def shape(self) -> tuple[int, ...]:
    *lead, inputs, outputs = self.held.shape
    last = (inputs, outputs) if self.axis == -2 else (outputs, inputs)
    return (*lead, *last)

  @property
  def ndim(self) -> int:
    return len(self.held.shape)

  def stored(self) -> Float[Array, "... I O"]:
    """Returns the decoded matrix `[I, O]`."""
    w = self.decoded()
    if self.source is None:
      return w
    order = jnp.argsort(self.source, axis=-1)
    return jnp.take_along_axis(w, order[..., None], axis=-2)

  def dense(self) -> Float[Array, "..."]:
    """Returns the matrix, bitwise what it was made from."""
    stored = self.stored()
    return stored if self.axis == -2 else jnp.swapaxes(stored, -1, -2)

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `einsum(eq, x, w)`, by the kernel where `I` is summed over."""
    left, w, out = eq.replace("->", ",").split(",")
    if self.axis == -1:
      w = w[:-2] + w[-1] + w[-2]
    if len(w) == 2 and left[-1] == w[0] and out == left[:-1] + w[1]:
      if self.source is not None:
        x = jnp.take(x, self.source, axis=-1, unique_indices=True)
      return api.quantized_matmul(x, self.held)
    stored = f"{left},{w}->{out}"
    return products.linear(lambda x, w: jnp.einsum(stored, x, w), x, self)

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    """Returns each row of `x` times its expert's matrix."""
    return products.ragged_dot(x, self, sizes, self.axis)
