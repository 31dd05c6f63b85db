"""Output errors of activation quantization, per matrix and scheme.

Errors are relative, per token; the reported number is their median. A token
with massive activations has nearly all of the energy, so the error over all
tokens together looks small even if every other token's output is lost.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research import taps, tree, weights
from research.nn.transformer import Transformer
from research.quant.activations import Round
from research.quant.algorithms import smoothquant
from research.quant.numerics import hadamard
from research.taps.statistics import Rows
from research.typing import Array, Float, Int, Params, PRNGKey, UserError

HIGHEST = jax.lax.Precision.HIGHEST

COLUMNS = (
  *("outliers", "outliers rotated", "A8 tensor", "A8 token", "A4 token"),
  *("A4 rotated", "A8 tensor smooth", "A4 token smooth"),
)
"""Keys of `errors`, in the order of tables."""


@dataclasses.dataclass(frozen=True)
class InputRows:
  """Statistic that returns the inputs themselves, of rows `[B, T]`."""

  batch: int
  length: int

  def shapes(self, size_in: int, size_out: int) -> dict[str, tuple[int, ...]]:
    del size_out
    return {"inputs": (self.batch, self.length, size_in)}

  def compute(self, rows: Rows) -> dict[str, Array]:
    return {"inputs": rows.x.astype(jnp.float32)}

  def join(self, a: Any, b: Any) -> Any:
    """Raises UserError: the inputs of two batches cannot be joined."""
    raise UserError("InputRows: the inputs of two batches cannot be joined")


def collect_inputs(
  model: Transformer,
  params: Params,
  tokens: Int[Array, "B T"],
  addresses: tuple[str, ...],
) -> dict[str, tuple[Float[Array, "N I"], Float[Array, "I O"]]]:
  """Returns address -> (the matrix's inputs, one row per token; the matrix).

  Args:
    addresses: addresses such as `layers/11/mlp/down`.

  Raises:
    UserError: the model has no matrix at an address.
  """

  @jax.jit
  def found(params):
    def loss(params):
      hidden, _ = model.apply({"params": params}, tokens)
      return hidden.astype(jnp.float32).sum()

    seen = taps.collect(
      loss, params, InputRows(*tokens.shape), addresses=addresses
    )
    seen = taps.by_address(params, seen)
    return {k: seen[k]["inputs"] for k in addresses if k in seen}

  out, layers = found(params), list(tree.layers(params))
  for address in addresses:
    if address not in out:
      raise UserError(
        f"{address}: no such matrix in the layers, expected e.g."
        " layers/0/mlp/down."
      )
  held = {}
  for address, x in out.items():
    _, layer, *path = address.split("/")
    w = layers[int(layer)]
    for name in path:
      w = w[name]
    held[address] = x.reshape(-1, x.shape[-1]), weights.dense(w)
  return held


def median_error(
  got: Float[Array, "N O"], want: Float[Array, "N O"]
) -> Float[Array, ""]:
  """Returns the median over rows of `|got - want| / |want|`."""
  size = jnp.linalg.norm(want, axis=-1)
  return jnp.median(jnp.linalg.norm(got - want, axis=-1) / size)


@jax.jit
def errors(
  x: Float[Array, "N I"], w: Float[Array, "I O"], key: PRNGKey
) -> dict[str, Float[Array, ""]]:
  """Returns the error of each quantization scheme, and the size of outliers.

  Args:
    x: inputs, one row per token.
    key: random key of the rotation's signs.

  Returns:
    `outliers`, `outliers rotated`: largest over mean magnitude of the inputs;
    scheme -> median over tokens of the outputs' relative error. SmoothQuant's
    scales are computed from the same inputs, with alpha 0.5.
  """
  w = w.astype(jnp.float32)
  s = smoothquant.scales(jnp.abs(x).max(0), jnp.abs(w).max(1), 0.5)
  signs = jax.random.rademacher(key, (x.shape[-1],), jnp.float32)
  turned = hadamard.rotate(x * signs)
  w_turned = hadamard.rotate((w * signs[:, None]).T).T
  want = jnp.matmul(x, w, precision=HIGHEST)

  def error(op, x, w):
    return median_error(jnp.matmul(op(x), w, precision=HIGHEST), want)

  def spread(x):
    return jnp.abs(x).max() / jnp.abs(x).mean()

  tensor, eight = Round(bits=8, per="tensor"), Round(bits=8)
  four, smooth = Round(bits=4), (x / s, w * s[:, None])
  return {
    "outliers": spread(x),
    "outliers rotated": spread(turned),
    "A8 tensor": error(tensor, x, w),
    "A8 token": error(eight, x, w),
    "A4 token": error(four, x, w),
    "A4 rotated": error(four, turned, w_turned),
    "A8 tensor smooth": error(tensor, *smooth),
    "A4 token smooth": error(four, *smooth),
  }
