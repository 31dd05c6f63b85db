"""Merging that tells what it loses, and refuses to lose too much.

In bf16 most of a small update falls between two numbers and is rounded away
(lora.md 2.5). Here sums are formed in fp32 and rounded to nearest, or
stochastically, which keeps the update on average; what is kept is measured.
"""

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from research import tree, weights
from research.lora import wrap
from research.lora.merge import changes, merged
from research.nn.transformer import Transformer
from research.typing import Array, Float, Int, Params


@dataclasses.dataclass(frozen=True)
class Stochastic:
  """Rounds up or down with the chances that make the mean exact.

  Attributes:
    seed: each weight draws by it and its own name.
  """

  seed: int = 0

  def __call__(
    self, name: str, x: Shaped[np.ndarray, "..."], dtype: np.dtype
  ) -> Shaped[np.ndarray, "..."]:
    near = changes.cast(name, x, dtype)
    if near is x:
      return x
    error = x - near.astype(np.float32)
    ends = np.where(error > 0, np.inf, -np.inf).astype(dtype)
    with np.errstate(over="ignore"):
      far = np.nextafter(near, ends)
    gap = np.abs(far.astype(np.float32) - near.astype(np.float32))
    rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
    # Beyond the largest number of a type the gap is not finite: stay.
    other = rng.random(x.shape, np.float32) * gap < np.abs(error)
    return np.where(other & np.isfinite(gap), far, near)


def merge(
  params: Params,
  rounding: changes.Rounding = changes.cast,
  dtype: str | None = None,
  least: float | None = None,
) -> tuple[dict[str, Any], dict[str, changes.Change]]:
  """Returns the tree with adapters merged, and what each of them lost.

  Args:
    params: with adapters, on any base.
    rounding: `changes.cast`, to nearest, or `Stochastic`.
    dtype: of merged weights; None for each base's own.
    least: share of all updates that has to be kept; None for whatever it is.

  Raises:
    UserError: less is kept.
  """
  losses: dict[str, changes.Change] = {}
  indices, scaled = tree.layer_indices(params), wrap.biases(params)

  def leaf(path, weight):
    found = merged.in_float32(scaled.get(path, weight))
    if found is None:
      return weight
    total, base = found
    kind = np.dtype(jnp.dtype(dtype or weight.dtype))
    prefix, _, inner = path.partition("/layer")
    if prefix == path:  # outside of the layers
      out, losses[path] = _rounded(path, total, base, kind, rounding)
      return jnp.asarray(out)
    layer, _, inner = inner.partition("/")
    rows = []
    for k, i in enumerate(indices[f"{prefix}/layer{layer}"]):
      name = f"layers/{i}/{inner}"
      row, losses[name] = _rounded(name, total[k], base[k], kind, rounding)
      rows.append(row)
    return jnp.asarray(np.stack(rows))

  out = tree.map_paths(leaf, params, is_leaf=weights.is_weight)
  if least is not None:
    changes.check_kept(losses.values(), least)
  return out, losses


def _rounded(name, total, base, dtype, rounding):
  got, alone = (rounding(name, x, dtype) for x in (total, base))
  found = changes.Comparison()
  found.add(total, *(x.astype(np.float32) for x in (got, base, alone)))
  return got, found.change(name, "float32", str(dtype))


@dataclasses.dataclass(frozen=True)
class Outputs:
  """How the outputs of two models differ on some tokens.

  Attributes:
    max_logit, mean_logit: largest and mean absolute change of a logit.
    kl: mean Kullback-Leibler divergence of the second from the first, in nats
      a token.
    max_kl: the largest of a token.
    agreement: share of tokens after which both expect the same.
    tokens: how many there are.
  """

  max_logit: float
  mean_logit: float
  kl: float
  max_kl: float
  agreement: float
  tokens: int


def outputs(
  model: Transformer, before: Params, after: Params, tokens: Int[Array, "B T"]
) -> Outputs:
  """Returns how logits change from one tree to another, both of `model`."""
  rows = [
    jax.tree.map(np.asarray, _compared(model, before, after, row[None]))
    for row in tokens
  ]
  worst, mean, kl, max_kl, same = (np.array(x) for x in zip(*rows, strict=True))
  return Outputs(
    max_logit=float(worst.max()),
    mean_logit=float(mean.mean()),
    kl=float(kl.mean()),
    max_kl=float(max_kl.max()),
    agreement=float(same.mean()),
    tokens=int(tokens.size),
  )


@functools.partial(jax.jit, static_argnums=0)
def _compared(model, before, after, tokens):
  def logits(params) -> Float[Array, "B T V"]:
    hidden, _ = model.apply({"params": params}, tokens)
    out = model.apply({"params": params}, hidden, method="logits")
    return out.astype(jnp.float32)

  x, y = logits(before), logits(after)
  p, q = jax.nn.log_softmax(x), jax.nn.log_softmax(y)
  kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
  change = jnp.abs(x - y)
  same = jnp.mean(x.argmax(-1) == y.argmax(-1))
  return change.max(), change.mean(), kl.mean(), kl.max(), same
