"""What some methods start from: gradients, and second moments of inputs.

Each is a `Look` for `adapt.Adapt`, of one batch. Moments are collected by the
backward pass of the unchanged model: around every weight stands a leaf whose
input passes through an identity with a second argument of zeros, and the
"gradient" of that argument is XᵀX. It works in scanned layers, and nothing is
intercepted.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import tree, weights
from research.lora import wrap
from research.lora.method import turned
from research.typing import Array, Float, Int, Params, PRNGKey, Shaped

Loss = Callable[[Params], Float[Array, ""]]
"""Mean loss of some batch."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tapped:
  """A matrix that is multiplied as ever, and whose inputs are added up.

  Attributes:
    w: `[..., in, out]`.
    moment: zeros `[..., in, in]`; their gradient is XᵀX.
  """

  w: Any
  moment: Any

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
    """Returns `einsum(eq, x, w)`."""
    if turned(eq):
      return weights.einsum(eq, x, self.w)
    return weights.einsum(eq, _noted(x, self.moment), self.w)

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    """Returns the experts' matmul; their moments stay 0."""
    return weights.ragged_dot(x, self.w, sizes)

  def dense(self) -> Shaped[Array, "..."]:
    """Returns `w`."""
    return weights.dense(self.w)

  def bind(self, *, key: Any, ids: Any) -> "Tapped":
    """Nothing depends on the batch."""
    del key, ids
    return self


@jax.custom_vjp
def _noted(x, moment):
  del moment
  return x


def _forward(x, moment):
  del moment
  return x, x


def _backward(x, g):
  rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  return g, rows.T @ rows


_noted.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradients:
  """The loss's gradient of each matrix, `[in, out]`: for LoRAGA."""

  loss: Loss

  def __call__(
    self, params: Params, addresses: Sequence[str], key: PRNGKey
  ) -> Mapping[str, Any]:
    """Returns the gradients, by address."""
    del key
    found = jax.jit(jax.grad(self.loss))(wrap.disable(params))
    return _addressed(found, params, addresses, lambda g: g)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Covariances:
  """The inputs' XᵀX, scaled to a mean diagonal of 1, `[in, in]`: for CorDA."""

  loss: Loss

  def __call__(
    self, params: Params, addresses: Sequence[str], key: PRNGKey
  ) -> Mapping[str, Any]:
    """Returns the second moments, by address."""
    del key
    found = _moments(self.loss, wrap.disable(params))
    return _addressed(
      found, params, addresses, lambda m: m * len(m) / np.trace(m)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Directions:
  """The inputs' right singular vectors, strongest first, `[r, in]`: for EVA.

  Attributes:
    loss: of a batch.
    rank: r.
  """

  loss: Loss
  rank: int

  def __call__(
    self, params: Params, addresses: Sequence[str], key: PRNGKey
  ) -> Mapping[str, Any]:
    """Returns the directions, by address."""
    del key
    found = _moments(self.loss, wrap.disable(params))
    return _addressed(
      found,
      params,
      addresses,
      lambda m: np.linalg.eigh(m)[1].T[::-1][: self.rank],
    )


def _moments(loss: Loss, params: Params) -> dict[str, Any]:
  """Returns XᵀX of every matrix of the layers, in the place of the matrix."""
  layers = {name: params[name] for name in tree.runs(params)}

  def zero(w):
    # What is no matrix, such as a norm's scale, is not tapped.
    shape = (*w.shape[:-1], w.shape[-2]) if w.ndim > 2 else ()
    return jnp.zeros(shape, jnp.float32)

  def of(moments):
    tapped = jax.tree.map(
      lambda w, m: Tapped(w, m) if m.ndim else w, layers, moments
    )
    return loss({**params, **tapped})

  return jax.jit(jax.grad(of))(jax.tree.map(zero, layers))


def _addressed(
  found: Params,
  params: Params,
  addresses: Sequence[str],
  f: Callable[[Any], Any],
) -> dict[str, Any]:
  wanted, out = set(addresses), {}
  for prefix, rows in tree.layer_indices(params).items():
    run, layer = prefix.split("/")
    for path, stack in tree.flatten_paths(found[run][layer]):
      for row, i in enumerate(rows):
        address = f"layers/{i}/{path}"
        if address in wanted:
          out[address] = np.asarray(f(np.asarray(stack[row])), np.float32)
  return out
