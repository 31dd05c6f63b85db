"""AWQ's search for scales and clipped ranges in one layer.

See `research.quant.algorithms.awq`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from kernels_pallas.masks import Mask
from research.nn.block import Block
from research.nn.moe import Moe
from research.quant import qtensor
from research.quant.algorithms import folding
from research.quant.algorithms.folding import Flat
from research.quant.format import Format
from research.typing import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST

CLIPPED = ("attention/v", "attention/o", "mlp/gate", "mlp/up", "mlp/down")
"""Matrices whose ranges are clipped."""

Moments = tuple[Array, Array]
"""(mean of `|x|` `[I]`, mean of `x xᵀ` `[I, I]`) of inputs x, fp32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
  """Static settings, see `research.quant.algorithms.awq.AWQ`."""

  format: Format
  steps: int
  duo: bool
  diagonal: bool
  clip: bool

  def alphas(self) -> list[float]:
    return [i / self.steps for i in range(self.steps)]

  def rounded(self, w: Float[Array, "... I O"]) -> Float[Array, "... I O"]:
    return qtensor.pack(w, self.format).dense()

  def candidates(
    self, size: Float[Array, " I"], ws: list[Float[Array, "..."]]
  ) -> Float[Array, "A I"]:
    """Returns candidate scales: a row of ones, then one row per alpha.

    Args:
      size: mean magnitude of each input.
      ws: the matrices that multiply these inputs.
    """
    alphas = jnp.asarray(self.alphas())[:, None]
    s = size**alphas
    if self.duo:
      s = s / (self._within_groups(ws) ** (1 - alphas) + 1e-4)
    s = jnp.maximum(s, 1e-4)
    ends = s.max(-1, keepdims=True) * s.min(-1, keepdims=True)
    s = s / jnp.sqrt(ends)
    s = jnp.where(jnp.isfinite(s), s, 1.0)
    return jnp.concatenate([jnp.ones_like(s[:1]), s])

  def _within_groups(self, ws):
    """Returns each input's mean weight magnitude over its group's largest."""
    total, count = 0.0, 0
    for w in ws:
      size = jnp.abs(w.astype(jnp.float32))
      format = self.format.for_shape(*w.shape[-2:])
      groups = _groups(size, format.group(*w.shape[-2:]))
      share = groups / jnp.maximum(groups.max(-2, keepdims=True), 1e-30)
      share = jnp.moveaxis(share.reshape(w.shape), -2, 0)
      share = share.reshape(w.shape[-2], -1)
      total, count = total + share.sum(-1), count + share.shape[-1]
    return total / count


def _groups(w: Float[Array, "... I O"], size: int) -> Array:
  """Returns `w` in groups of `size` inputs, `[..., G, J, O]`."""
  return w.reshape(*w.shape[:-2], -1, size, w.shape[-1])


def _independent_inputs(format: Format, inputs: int, outputs: int) -> int:
  """Returns the number of inputs of an output that are encoded independently.

  For k-quants that is a block, which has the scale of its groups' scales.
  """
  format = format.for_shape(inputs, outputs)
  return max(format.block, format.group(inputs, outputs))


def rounded_paths(flat: Flat) -> list[str]:
  """Returns the paths of the matrices that the search rounds."""
  paths = [p for norm in folding.READERS for p in folding.readers(flat, norm)]
  paths += [p for p in ("attention/o", "mlp/down") if p in flat]
  return [p for p in paths if p != "mlp/router"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def search_layer(
  search: Search,
  block: Block,
  flat: Flat,
  x: Float[Array, "N T D"],
  moments: Mapping[str, Moments],
) -> tuple[Flat, dict[str, Any]]:
  """Returns (the layer scaled and clipped, the search's report).

  Args:
    x: the layer's inputs.
    moments: path -> moments of the inputs of `attention/o` and `mlp/down`.
  """
  modules = _Modules(block)
  a_in = modules.norm(flat, "attention_norm", x)
  attended = modules.attention(flat, a_in)
  h = x + modules.post(flat, attended)
  m_in = modules.norm(flat, "mlp_norm", h)
  a_moments, m_moments = _moments(a_in), _moments(m_in)
  offset, a = block.norm.offset, block.attention
  report, scaled, inputs = {}, flat, {}

  paths = folding.readers(flat, "attention_norm")
  loss = functools.partial(_module_loss, modules.attention, flat, a_in)
  s, report["qkv"] = _search(search, flat, paths, a_moments, loss)
  inputs |= {p: _divide_moments(a_moments, s) for p in paths}
  scaled = folding.scale_norm(scaled, "attention_norm", s, offset)

  def tied(s):
    return folding.from_heads(s, a.heads, a.kv_heads)

  def spread(s):
    return folding.to_heads(s, a.heads, a.kv_heads)

  path = "attention/o"
  loss = functools.partial(_output_loss, flat, moments[path][1])
  s, report["o"] = _search(
    search, flat, [path], moments[path], loss, lambda s: spread(tied(s))
  )
  inputs[path] = _divide_moments(moments[path], s)
  scaled = folding.scale_values(scaled, tied(s), a.heads, a.kv_heads)

  paths = folding.readers(flat, "mlp_norm")
  linear = [p for p in paths if p != "mlp/router"]
  loss = functools.partial(_module_loss, modules.mlp, flat, m_in)
  s, report["mlp"] = _search(search, flat, linear, m_moments, loss)
  inputs |= {p: _divide_moments(m_moments, s) for p in paths}
  scaled = folding.scale_norm(scaled, "mlp_norm", s, offset)

  path = "mlp/down"
  if path in flat and "mlp/gate" not in flat:
    inputs[path] = moments[path]  # scales do not pass the activation
  elif path in flat:
    loss = functools.partial(_output_loss, flat, moments[path][1])
    s, report["down"] = _search(search, flat, [path], moments[path], loss)
    inputs[path] = _divide_moments(moments[path], s)
    scaled = folding.scale_hidden(scaled, "mlp", s)
  if search.clip:
    for path in CLIPPED:
      if path in scaled:
        scaled = scaled | {
          path: clip_ranges(search, scaled[path], inputs[path][1])
        }
  return scaled, report


@dataclasses.dataclass(frozen=True)
class _Modules:
  """A layer's modules, applied to a flat layer."""

  block: Block

  def norm(self, flat: Flat, name: str, x: Array) -> Array:
    return self.block.norm.apply({"params": _subtree(flat, name)}, x)

  def post(self, flat: Flat, y: Array) -> Array:
    norm = self.block.post_norm
    if norm is None:
      return y
    return norm.apply({"params": _subtree(flat, "post_attention_norm")}, y)

  def attention(self, flat: Flat, x: Array) -> Array:
    a = self.block.attention
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    rotation = None if a.rope is None else a.rope.tables(positions, a.head_dim)
    held = {"params": _subtree(flat, "attention")}
    return a.apply(held, x, positions, Mask.causal(), rotation)[0]

  def mlp(self, flat: Flat, x: Array) -> Array:
    found = self.block.mlp.apply({"params": _subtree(flat, "mlp")}, x)
    return found[0] if isinstance(self.block.mlp, Moe) else found


def _subtree(flat: Flat, name: str) -> dict[str, Any]:
  start = f"{name}/"
  found = {k[len(start) :]: w for k, w in flat.items() if k.startswith(start)}
  return traverse_util.unflatten_dict(found, sep="/")


def _moments(x: Float[Array, "N T I"]) -> Moments:
  flat = x.astype(jnp.float32).reshape(-1, x.shape[-1])
  xx = jnp.matmul(flat.T, flat, precision=HIGHEST)
  return jnp.abs(flat).mean(0), xx / len(flat)


def _divide_moments(moments: Moments, s: Float[Array, " I"]) -> Moments:
  return moments[0] / s, moments[1] / (s[:, None] * s)


def _search(
  search: Search,
  flat: Flat,
  paths: list[str],
  moments: Moments,
  loss: Callable[[Flat], Array],
  tied: Callable[[Array], Array] = lambda s: s,
) -> tuple[Float[Array, " I"], dict[str, Any]]:
  """Returns the best scales, and the report of losses and alpha.

  Args:
    loss: path -> rounded matrix -> loss.
    tied: projects scales `[I]` to scales that can be folded.
  """
  found = search.candidates(moments[0], [flat[path] for path in paths])
  found = jax.vmap(tied)(found)
  if search.diagonal:
    loss = functools.partial(_diagonal_loss, flat, moments[0])

  def one(s):
    rounded = {
      p: search.rounded(flat[p] * s[:, None]) / s[:, None] for p in paths
    }
    return loss({p: w.astype(flat[p].dtype) for p, w in rounded.items()})

  losses = jax.lax.map(one, found)
  best = jnp.argmin(losses)
  alpha = jnp.array([-1.0, *search.alphas()])[best]
  return found[best], {"losses": losses, "alpha": alpha}


def _module_loss(module, flat, x, rounded):
  error = module(flat | rounded, x) - module(flat, x)
  return jnp.mean(jnp.square(error.astype(jnp.float32)))


def _output_loss(flat, xx, rounded):
  ((path, w),) = rounded.items()
  d = (w - flat[path]).astype(jnp.float32)
  return jnp.sum(d * jnp.matmul(xx, d, precision=HIGHEST)) / d.shape[-1]


def _diagonal_loss(flat, size, rounded):
  return sum(
    jnp.sum(jnp.square(size[:, None] * (w - flat[path])))
    for path, w in rounded.items()
  )


def clip_ranges(
  search: Search, w: Float[Array, "I O"], xx: Float[Array, "I I"]
) -> Float[Array, "I O"]:
  """Clips `w` to +-(1 - i / 20) of each group's largest magnitude, i < 10.

  Chooses i per group and output to minimise the mean squared error of the
  group's contribution to the output, `Δwᵀ E[x xᵀ] Δw` over the group's inputs,
  after rounding. A group is what the format encodes independently: a block of
  k-quants, or all inputs of an output with one scale.

  Args:
    xx: mean of `x xᵀ` over its inputs.
  """
  groups = _groups(
    w.astype(jnp.float32), _independent_inputs(search.format, *w.shape)
  )
  count, size, _ = groups.shape
  c = xx.reshape(count, size, count, size)
  c = jnp.moveaxis(jnp.diagonal(c, axis1=0, axis2=2), -1, 0)
  most = jnp.abs(groups).max(-2, keepdims=True)

  def at(i):
    limit = most * (1 - i / 20)
    near = jnp.clip(groups, -limit, limit).reshape(w.shape)
    d = search.rounded(near).reshape(groups.shape) - groups
    return jnp.sum(d * jnp.matmul(c, d, precision=HIGHEST), axis=-2)

  errors = jax.lax.map(at, jnp.arange(10.0))
  limit = most * (1 - jnp.argmin(errors, axis=0)[:, None] / 20)
  return jnp.clip(groups, -limit, limit).reshape(w.shape).astype(w.dtype)
