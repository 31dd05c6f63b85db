"""Runs a stack of layers, whatever they are: decoder, encoder or resampler.

A stack is stored as scanned runs (`research.tree`). At initialisation, the
blocks determine the runs; afterwards, the parameter tree does. So one module
can apply parameters whose layers have different leaf types, or an unrolled
stack.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from kernels_pallas.masks import Mask
from research import sharding, tree, weights
from research.nn import collectives
from research.nn.stack import Stack
from research.typing import Array, Float, Params, PRNGKey, UserError

Remat = Literal["none", "layer", "names"]

SAVED = (
  "qkv",
  "attn_out",
  "attn_lse",
  "middle",
  "gate",
  "up",
  "unscaled",
  "thin",
)
"""Activations that `remat="names"` saves. Norms, rotations, attention
probabilities and the gated product are recomputed. `unscaled` is a product that
an adapter multiplies by trained scales, needed for their gradient; `thin` is
the activation between the two factors of a low-rank adapter."""

Runs = list[tuple[Params, tuple[Any, ...]]]
"""Each run's stacked parameters, and its period of blocks."""

Stream = Float[Array, "B T D"] | tuple[Float[Array, "B T D"], Any]
"""The residual stream; or that and what layers hand on to later ones, a tree
which only layers in a run of one step may change in structure."""

Layer = Callable[[Any, Params, Any, Any, bool], tuple[Any, Any]]
"""`layer(block, params, x, state, last) -> (x, output)`: applies one block.

`x` is a `Stream`. `last` is True for the stack's last layer if that is not
scanned with others.
"""


def stacked_runs(
  module: nn.Module,
  stack: Stack,
  init: Callable[[Any, PRNGKey], Params],
) -> Runs:
  """Returns the runs that `module` stores, or new ones.

  Args:
    module: the Linen module that owns the parameters `run0`, `run1`, ...; call
      this inside of its methods.
    stack: its layers.
    init: `init(block, key)` returns the parameters of one layer.
  """

  def new(key, shape, *, repeats, blocks):
    def several(j, block):
      keys = jax.random.split(jax.random.fold_in(key, j), repeats)
      return jax.vmap(functools.partial(init, block))(keys)

    return {f"layer{j}": several(j, block) for j, block in enumerate(blocks)}

  out = []
  for name, repeats, blocks in stack.runs(module.variables.get("params", {})):
    start = functools.partial(new, repeats=repeats, blocks=blocks)
    out.append((weights.weight(module, name, start), blocks))
  return out


def new_layer(
  block: Any, key: PRNGKey, width: int, dtype: str, **given: Any
) -> Params:
  """Returns new parameters of a `Block` for activations of a width.

  Args:
    block: the block.
    key: of its weights.
    width: D.
    dtype: of the computation.
    **given: further arguments of its call.
  """
  x = jnp.zeros((1, 1, width), dtype)
  positions = jnp.zeros((1, 1), jnp.int32)
  return block.init(key, x, positions, Mask.causal(), **given)["params"]


def run_layers(
  runs: Runs,
  x: Stream,
  layer: Layer,
  states: dict[str, Any] | None = None,
  *,
  remat: Remat = "none",
  taps: Sequence[int] = (),
  injected: Float[Array, "B T J D"] | None = None,
  stop: int | None = None,
) -> tuple[Any, dict[str, Any], list[Float[Array, "B T D"]]]:
  """Applies all layers in order, each run by one `lax.scan`.

  Args:
    runs: from `stacked_runs`.
    x: input of the first layer.
    layer: applies one block.
    states: each run's state, such as its caches: `states["run0"]["layer0"]`
      has a leading axis of layers. None for none.
    remat: activations saved for the backward pass: all ("none"), those in
      `SAVED` ("names"), or only each layer's input ("layer").
    taps: numbers of layers, counted from 0, after each of which the residual
      stream is returned as well.
    injected: added to the residual stream after layers 0 to J - 1 (DeepStack,
      Meng et al. 2024, arXiv:2406.04334); J is less than the number of layers.
    stop: number of layers to run; None for all.

  Returns:
    The last layer's `Stream`, of N tokens; each run's outputs, in the structure
    of `states`; the residual stream after each layer of `taps`.

  Raises:
    UserError: a layer of `taps`, or J, is not below the number of layers.
  """
  runs = runs if stop is None else _until(stop, runs)
  depth = sum(tree.run_length(p) * len(blocks) for p, blocks in runs)
  _check_layers(depth, taps, injected)
  watched = [jnp.zeros_like(_residual(x)) for _ in taps]
  outputs, start = {}, 0
  for i, (params, blocks) in enumerate(runs):
    name, repeats = f"run{i}", tree.run_length(params)
    alone = i == len(runs) - 1 and repeats == 1

    def period(carry, scanned, blocks=blocks, alone=alone):
      (x, watched), (params, state, number) = carry, scanned
      params, made = collectives.gather_parts(params), {}
      for j, block in enumerate(blocks):
        key = f"layer{j}"
        last = alone and j == len(blocks) - 1
        layer_state = None if state is None else state[key]
        x, made[key] = layer(block, params[key], x, layer_state, last)
        if number is not None:
          # The last layer, which may have selected tokens, gets nothing.
          x = x if last else _inject(x, injected, number + j)
          watched = _watch(_residual(x), watched, taps, number + j)
      return (x, watched), made

    state = None if states is None else states[name]
    number = None
    if taps or injected is not None:
      number = start + len(blocks) * jnp.arange(repeats)
    body, scanned = rematerialised(period, remat), (params, state, number)
    if repeats == 1:
      layer_slice = jax.tree.map(lambda a: a[0], scanned)
      (x, watched), made = body((x, watched), layer_slice)
      made = jax.tree.map(lambda a: a[None], made)
    else:
      (x, watched), made = jax.lax.scan(body, (x, watched), scanned)
    outputs[name], start = made, start + repeats * len(blocks)
  return x, outputs, watched


def _check_layers(depth, taps, injected):
  for number in taps:
    if not 0 <= number < depth:
      raise UserError(
        f"taps: found layer {number}, expected one of 0 to {depth - 1}"
      )
  if injected is not None and injected.shape[2] >= depth:
    raise UserError(
      f"injected: found {injected.shape[2]} layers' activations, expected fewer"
      f" than {depth}, the number of layers"
    )


def _until(stop: int, runs: Runs) -> Runs:
  """Returns the runs of the first `stop` layers; cuts a run if it has to."""
  out = []
  for params, blocks in runs:
    repeats = min(tree.run_length(params), stop // len(blocks))
    stop -= repeats * len(blocks)
    if repeats == tree.run_length(params):
      out.append((params, blocks))
      continue
    if repeats:
      out.append((jax.tree.map(lambda a, n=repeats: a[:n], params), blocks))
    if stop:
      rest = {f"layer{j}": params[f"layer{j}"] for j in range(stop)}
      first_layers = jax.tree.map(lambda a, n=repeats: a[n : n + 1], rest)
      out.append((first_layers, blocks[:stop]))
    break
  return out


def _residual(x):
  return x[0] if isinstance(x, tuple) else x


def _inject(x, injected, number):
  if injected is None:
    return x
  if isinstance(x, tuple):
    return _inject(x[0], injected, number), *x[1:]
  count = injected.shape[2]
  index = jnp.minimum(number, count - 1)
  added = jax.lax.dynamic_index_in_dim(injected, index, axis=2, keepdims=False)
  return x + jnp.where(number < count, added, 0).astype(x.dtype)


def _watch(x, watched, taps, number):
  # Stacking every layer's output and selecting afterwards would store all.
  return [
    jnp.where(number == tap, x, old)
    for tap, old in zip(taps, watched, strict=True)
  ]


def rematerialised(f: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
  """Returns `f`, which saves for its backward pass what `remat` says."""
  if remat == "none" and not sharding.is_cut():
    return f
  policy = None
  if remat == "none":
    # Weights gathered for FSDP are gathered again in the backward pass.
    policy = _unless_gathered
  if remat == "names":
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED)
  return jax.checkpoint(f, prevent_cse=False, policy=policy)


def _unless_gathered(primitive, *_, **params) -> bool:
  """Checkpoint policy: saves everything but the output of an FSDP gather.

  A gather is recognised by a sharding constraint that leaves some axes
  unconstrained.
  """
  constrained = primitive.name == "sharding_constraint"
  return not (constrained and params["unconstrained_dims"])
