"""Output error and outliers of each matrix of a quantized model.

One forward pass runs two parameter trees of a model: activations come from the
first tree, and each matrix of the second multiplies the same inputs. An error
is therefore the matrix's own and does not include errors of earlier ones.
Errors are per token: where a few tokens have nearly all the energy, a mean over
all hides the errors of the others.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.masks import Mask
from research import tree, weights
from research.nn.transformer import Transformer
from research.quant.qtensor import QTensor
from research.typing import (
  Array,
  Float,
  Int,
  Params,
  Shaped,
  UserError,
)

_STAT = r"(^|/)stat$"
NUM_STATS = 4
"""Numbers per token: squared norms of error and output; max and mean of |x|."""


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Size of a parameter tree's arrays, without padding and file headers.

  Attributes:
    packed_weights: number of logical weights in packed matrices.
    bits_per_weight: bits per packed weight, with scales, zeros, orders and
      outliers; NaN if nothing is packed.
    packed_bytes: bytes of packed matrices.
    nbytes: bytes of all arrays.
    model_bits: bits of all arrays per logical weight.
  """

  packed_weights: int
  bits_per_weight: float
  packed_bytes: int
  nbytes: int
  model_bits: float


def sizes(params: Params) -> Sizes:
  """Returns the sizes of a tree of arrays or of shapes."""
  packed_weights = packed = rest = others = 0
  for w in jax.tree.leaves(params, is_leaf=_is_packed):
    if isinstance(w, QTensor):
      packed_weights += int(np.prod(w.shape, dtype=np.int64))
      packed += tree.nbytes(w)
    else:
      others += int(np.prod(w.shape, dtype=np.int64))
      rest += tree.nbytes(w)
  bits = 8 * packed / packed_weights if packed_weights else float("nan")
  total = packed + rest
  count = max(packed_weights + others, 1)
  return Sizes(packed_weights, bits, packed, total, 8 * total / count)


def format_names(params: Params) -> list[str]:
  """Returns the names of the formats of a tree's packed matrices, sorted."""
  found = jax.tree.leaves(params, is_leaf=_is_packed)
  return sorted({w.format.name for w in found if _is_packed(w)})


def _is_packed(x: Any) -> bool:
  return isinstance(x, QTensor)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probe(weights.WrappedWeight):
  """A matrix, and a second one whose outputs are only measured.

  Attributes:
    w: the matrix that computes the outputs, `[..., I, O]`.
    other: the measured matrix, any weight of the same shape.
    stat: zeros `[..., B, T, NUM_STATS]`, whose cotangent returns the
      measurements.
  """

  w: Any
  other: Any
  stat: Any

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    y = weights.einsum(eq, x, self.w)
    wide = y.astype(jnp.float32)
    error = weights.einsum(eq, x, self.other).astype(jnp.float32) - wide
    size = jnp.abs(x.astype(jnp.float32))
    seen = [(error**2).sum(-1), (wide**2).sum(-1), size.max(-1), size.mean(-1)]
    return _watched(y, self.stat, jax.lax.stop_gradient(jnp.stack(seen, -1)))

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns rows of `w`; look-ups are not measured."""
    return weights.take(self.w, ids)

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    return weights.ragged_dot(x, self.w, sizes)

  def dense(self) -> Shaped[Array, "..."]:
    return weights.dense(self.w)

  def axes(self, names: tuple[str | None, ...]) -> "Probe":
    """Both matrices have the same logical axes; measurements have none."""
    return Probe(
      weights.axes(self.w, names),
      weights.axes(self.other, names),
      weights.axes(self.stat, (*names[:-2], None, None, None)),
    )


@jax.custom_vjp
def _watched(y, stat, seen):
  """Returns `y`; defines the cotangent of `stat` as `seen`."""
  return y


_watched.defvjp(
  lambda y, stat, seen: (y, seen), lambda seen, dy: (dy, seen, None)
)


def errors(
  model: Transformer,
  params: Params,
  other: Params,
  tokens: Int[Array, "B T"] | np.ndarray,
) -> dict[str, dict[str, float]]:
  """Measures each matrix that differs between two trees, except experts.

  Args:
    params: the reference tree, which computes activations.
    other: the same layers with some matrices replaced.
    tokens: text to run on; a few hundred tokens are enough.

  Returns:
    address (`layers/3/attention/q`) -> `output`, median over tokens of the
    outputs' relative error; `output_all`, the relative error over all tokens;
    `weight`, the relative error of the matrix; `inputs`, largest over mean
    magnitude of the inputs; `weights`, the same of the matrix.

  Raises:
    UserError: the trees do not fit one model, or do not differ.
  """
  if not _same_runs(params, other):
    params, other = tree.unroll(params), tree.unroll(other)
  others = dict(_matrices(other))
  shape = np.shape(tokens)

  def probed(path, w):
    new = others.get(path)
    if new is None or not path.startswith("run") or _same(w, new):
      return w
    if tuple(new.shape) != tuple(w.shape):
      raise UserError(
        f"errors: {path} is {tuple(w.shape)} and {tuple(new.shape)}, expected "
        "two trees of one model"
      )
    if len(w.shape) != 3:
      return w
    return Probe(w, new, jnp.zeros((w.shape[0], *shape, NUM_STATS)))

  both = tree.map_paths(probed, params, is_leaf=weights.is_weight)
  chosen = {p: w for p, w in _matrices(both) if isinstance(w, Probe)}
  if not chosen:
    raise UserError("errors: found two equal trees, expected them to differ")
  seen = jax.device_get(_seen(model, both, jnp.asarray(tokens)))
  seen = {p: w.stat for p, w in _matrices(seen) if isinstance(w, Probe)}
  indices, out = tree.layer_indices(params), {}
  for path, w in chosen.items():
    prefix, inner = "/".join(path.split("/")[:2]), path.split("/", 2)[-1]
    of_weights = jax.device_get(_of_weights(w.w, w.other))
    for k, layer in enumerate(indices[prefix]):
      found = _of_tokens(seen[path][k].reshape(-1, NUM_STATS))
      found |= {name: float(x[k]) for name, x in of_weights.items()}
      out[f"layers/{layer}/{inner}"] = found
  order = sorted(out, key=lambda a: (int(a.split("/")[1]), a))
  return {address: out[address] for address in order}


def _of_tokens(seen: Float[np.ndarray, "T S"]) -> dict[str, float]:
  error, power, most, mean = seen.astype(np.float64).T
  each = np.sqrt(error / np.maximum(power, 1e-30))
  return {
    "output": float(np.median(each)),
    "output_all": float(np.sqrt(error.sum() / max(power.sum(), 1e-30))),
    "inputs": float(most.max() / max(mean.mean(), 1e-30)),
  }


@jax.jit
def _of_weights(w, other):
  def one(pair):
    old, new = (weights.dense(x).astype(jnp.float32) for x in pair)
    size = jnp.abs(old)
    error = jnp.linalg.norm(new - old) / jnp.linalg.norm(old)
    return {"weight": error, "weights": size.max() / size.mean()}

  return jax.lax.map(one, (w, other))


@functools.partial(jax.jit, static_argnames="model")
def _seen(model, both, tokens):
  stats, rest = tree.partition(both, _STAT)

  def run(stats):
    params = tree.combine(stats, rest)
    where = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = model.apply({"params": params}, tokens, where, Mask.causal())
    return hidden.astype(jnp.float32).sum()

  value, pull = jax.vjp(run, stats)
  return pull(jnp.ones_like(value))[0]


def _matrices(params: Params) -> list[tuple[str, Any]]:
  return weights.named_weights(params)


def _same(a: Any, b: Any) -> bool:
  if a is b:
    return True
  arrays = not weights.is_weight(a) and not weights.is_weight(b)
  return arrays and a.shape == b.shape and bool(jnp.array_equal(a, b))


def _same_runs(a: Params, b: Params) -> bool:
  def runs(params):
    return {p: list(i) for p, i in tree.layer_indices(params).items()}

  return runs(a) == runs(b)
