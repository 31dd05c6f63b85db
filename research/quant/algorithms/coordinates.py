"""What rotations and scales made of a model's matrices, from their numbers.

`Rotate`, `SpinQuant`, `SmoothQuant` and `AWQ` turn a matrix W into `L W R` with
invertible L and R. The embeddings differ by the rotation of the residual
stream, norms by the gains that went into the matrices behind them, `v` by the
rotations or scales of value heads, `up` by the scales of hidden units. With
these all other weights must agree.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from research import tree, weights
from research.nn.transformer import Transformer
from research.quant import untied_embedding
from research.quant.algorithms import folding
from research.quant.numerics import hadamard
from research.typing import Params, UserError

LEAST_COSINE = 0.7
"""Between a matrix and itself in two bits, or better."""

Product = Callable[[np.ndarray], np.ndarray]
"""`x [..., n, k] -> M x` for some matrix M."""


@dataclasses.dataclass(frozen=True)
class Change:
  """How a matrix W became `L W R`.

  Attributes:
    rows: multiplies by `diag(gain) L⁻¹`.
    columns: multiplies by the transpose of `R⁻¹`.
    gain: of the norm before W, `[in, 1]`, or 1.
  """

  rows: Product = lambda x: x
  columns: Product = lambda x: x
  gain: Any = 1.0


def changes(
  model: Transformer, before: Params, after: Params
) -> dict[str, Change]:
  """Returns how matrices were changed, by address.

  Args:
    after: those after transforms, perhaps packed, without adapters.

  Raises:
    UserError: a weight of `after` is no rotated or scaled one, or is scaled
      and packed, so that its scale cannot be told from its rounding.
  """
  _, after = untied_embedding.untie(model, after)
  old, new = map(tree.outer_params, (before, after))
  if "head" in new and "head" not in old:
    old["head"] = _array(old["embed"]).T
  old, new = map(_flat, (old, new))
  turn = _turn(_array(old["embed"]), _array(new["embed"]))
  out = {"embed": Change(columns=turn)}
  if "head" in new:
    out["head"] = _after_norm(model.norm, "final_norm", (), old, new, turn)
  _check("", out, old, new)
  pairs = zip(tree.layers(before), tree.layers(after), strict=True)
  kinds = model.layer_kinds()
  for i, (block, pair) in enumerate(zip(kinds, pairs, strict=True)):
    old, new = map(_flat, pair)
    changed = _of_layer(block, old, new, turn)
    _check(f"layers/{i}/", changed, old, new)
    out |= {f"layers/{i}/{path}": x for path, x in changed.items()}
  return out


def _of_layer(
  block: Any, old: folding.Flat, new: folding.Flat, turn: Product
) -> dict[str, Change]:
  out = {path: Change(columns=turn) for path in folding.WRITERS if path in old}
  for norm in folding.READERS:
    if paths := folding.readers(old, norm):
      change = _after_norm(block.norm, norm, paths, old, new, turn)
      out |= dict.fromkeys(paths, change)
  for module in ("attention", *folding.MLPS):
    heads = module == "attention"
    first = f"{module}/v" if heads else f"{module}/up"
    second = f"{module}/o" if heads else f"{module}/down"
    if first not in out or second not in out:
      continue
    scale, per_head = _of_outputs(
      out[first], old[first], new[first], block.attention.head_dim * heads
    )
    inputs = scale
    if heads:
      n, k = block.attention.heads, block.attention.kv_heads
      inputs = np.repeat(scale.reshape(k, -1), n // k, axis=0).ravel()
    out[first] = dataclasses.replace(
      out[first], columns=_scaled(per_head, 1 / scale)
    )
    out[second] = dataclasses.replace(
      out[second], rows=_scaled(per_head, inputs)
    )
  return out


def _after_norm(norm, name, paths, old, new, turn: Product) -> Change:
  """Returns the change of the matrices at `paths`, which follow a norm."""
  gain, now = (norm.offset + _array(x[f"{name}/scale"]) for x in (old, new))
  if not gain.all():
    raise UserError(f"{name}: found a gain of 0, which no scale undoes")
  packed = [path for path in paths if _is_packed(new[path])]
  if packed and not np.array_equal(now, gain) and (now != 1).any():
    raise UserError(
      f"{packed[0]}: is scaled and packed, so that scales of its inputs and"
      " outputs cannot be told from its rounding"
    )
  return Change(lambda x: turn(now[:, None] * x), gain=gain[:, None])


def _of_outputs(
  change: Change, old: Any, new: Any, head_dim: int
) -> tuple[np.ndarray, Product]:
  """Returns the scale and the product that undo a matrix's outputs.

  One of them does nothing.

  Args:
    change: of the inputs.
    old, new: the matrix before and after.
    head_dim: number of outputs that are rotated together, or 0.
  """
  x, y = change.gain * _array(old), change.rows(_array(new))
  ratio = (x * y).sum(-2) / np.maximum((x * x).sum(-2), 1e-300)
  if _is_packed(new) or not ratio.all():
    ratio = np.ones_like(ratio)
  if head_dim:
    heads, turned = (z.reshape(-1, head_dim) for z in (x, y))
    r = _rotation(heads, turned)
    if np.linalg.norm(heads @ r - turned) < np.linalg.norm(ratio * x - y):

      def per_head(z):
        return (r @ z.reshape(-1, head_dim, z.shape[-1])).reshape(z.shape)

      return np.ones_like(ratio), per_head
  return ratio, lambda z: z


def _scaled(turn: Product, scale: np.ndarray) -> Product:
  return lambda x: scale[..., None] * turn(x)


def _turn(x: np.ndarray, y: np.ndarray) -> Product:
  """Returns the product with the rotation r of `y = x r`."""
  if np.array_equal(x, y):
    return lambda z: z
  r = _rotation(x, y)
  return lambda z: r @ z


def _rotation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Returns the rotation r for which `x r` is nearest to `y`.

  A random Hadamard matrix that fits as well has no rounding errors.
  """
  u, _, v = np.linalg.svd(x.T @ y)
  r = u @ v
  size = hadamard.block(len(r))
  h = np.kron(np.eye(len(r) // size), hadamard.matrix(size)) * size**-0.5
  near = np.sign(np.sum(r * h, axis=-1, keepdims=True)) * h
  errors = [np.linalg.norm(x @ z - y) for z in (near, r)]
  return near if errors[0] < 2 * errors[1] else r


def _check(
  where: str, found: Mapping[str, Change], old: folding.Flat, new: folding.Flat
) -> None:
  """Raises UserError unless `found` explains all of a layer's weights."""
  if old.keys() != new.keys():
    raise UserError(f"{where}{min(old.keys() ^ new.keys())}: only one has it")
  folded = [*folding.READERS, *(["final_norm"] if "head" in found else [])]
  for path in sorted(set(old) - {f"{norm}/scale" for norm in folded}):
    x, y = _array(old[path]), _array(new[path])
    bias = path.endswith("_bias")
    change = found.get(path.removesuffix("_bias") if bias else path)
    if change is not None:
      x, y = (x[..., None, :], y[..., None, :]) if bias else (x, y)
      y = _transposed(change.columns(_transposed(y)))
      x, y = (x, y) if bias else (change.gain * x, change.rows(y))
    size = np.linalg.norm(x), np.linalg.norm(y)
    if _is_packed(new[path]):
      fits = (x * y).sum() >= LEAST_COSINE * size[0] * size[1]
    else:
      dtype = new[path].dtype
      eps = jnp.finfo(dtype).eps if jnp.issubdtype(dtype, jnp.floating) else 0
      fits = np.linalg.norm(x - y) <= 16 * eps * size[0]
    if not fits:
      raise UserError(f"{where}{path}: is not that weight rotated or scaled")


def _flat(part: Params) -> dict[str, Any]:
  return traverse_util.flatten_dict(part, sep="/")


def _array(w: Any) -> np.ndarray:
  return np.asarray(weights.dense(w)).astype(np.float64)


def _transposed(x: np.ndarray) -> np.ndarray:
  return np.swapaxes(x, -1, -2)


def _is_packed(w: Any) -> bool:
  small = jnp.dtype(w.dtype).itemsize < 2
  return small or any(map(weights.is_packed, weights.nested(w)))
