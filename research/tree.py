"""Parameter trees: leaf paths, partitions, and layer stacks as scanned runs.

A stack of layers is stored as runs, `run0`, `run1`, .... The layers of a run
have equal structure and leaf types, are stacked along one leading axis, and
are executed by one `lax.scan`. Each scan step executes one period,
`layer0` .. `layer{p-1}` (for example Gemma's local and global layers).
Importers, exporters and reports use `layers` and `stack` and never see runs.
"""

import functools
import itertools
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import tables
from research.typing import Params, UserError

MAX_PERIOD = 8
"""The longest repeating pattern of layers that one scan step may contain."""


def _key_name(key: Any) -> str:
  for field in ("key", "name", "idx"):
    if hasattr(key, field):
      return str(getattr(key, field))
  return str(key)


def path_name(path: Sequence[Any]) -> str:
  """Returns a JAX key path as text: `run0/layer0/attention/q/a`."""
  return "/".join(_key_name(key) for key in path)


def flatten_paths(tree: Any) -> list[tuple[str, Any]]:
  """Returns a `(path, array)` pair for every array in `tree`."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [(path_name(path), leaf) for path, leaf in leaves]


def map_paths(f: Callable[[str, Any], Any], tree: Any, is_leaf=None) -> Any:
  """Returns `tree` with each leaf replaced by `f(path, leaf)`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: f(path_name(path), leaf), tree, is_leaf=is_leaf
  )


def partition(tree: Any, pattern: str) -> tuple[Any, Any]:
  """Splits a tree in two by path: `(selected, rest)`.

  Both have the structure of `tree`; each is `None` where the other has the
  array.

  Args:
    tree: any pytree.
    pattern: regular expression, searched for in each array's path.
  """
  found = re.compile(pattern)
  selected = map_paths(lambda p, x: x if found.search(p) else None, tree)
  rest = map_paths(lambda p, x: None if found.search(p) else x, tree)
  return selected, rest


def combine(a: Any, b: Any) -> Any:
  """Merges two complementary trees; the inverse of `partition`."""
  return jax.tree.map(
    lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None
  )


def runs(params: Params) -> list[str]:
  """Returns the names of the runs in `params`, in layer order."""
  found = [k for k in params if re.fullmatch(r"run\d+", k)]
  return sorted(found, key=lambda k: int(k[3:]))


def no_layers(transform: str, params: Params) -> str:
  """Returns the message of a transform that finds no layers.

  Args:
    transform: the transform's name.
    params: a tree without runs, such as one of towers.
  """
  return (
    f"{transform}: found no layers in a tree of {', '.join(params)}, expected"
    " the parameters of one model.\nOf a model of towers name the tower:"
    f" Within('language', {transform}(...))"
  )


def run_length(run: Params) -> int:
  """Returns the number of scan steps of `run`: how often its period repeats."""
  return jax.tree.leaves(run)[0].shape[0]


def layers(params: Params) -> Iterator[Params]:
  """Yields the parameters of each layer, without the run axis, in order."""
  yield from _each(params, _row)


def _each(params: Params, take: Callable[[Any, Any], Any]) -> Iterator[Params]:
  for name in runs(params):
    run = params[name]
    for k in range(run_length(run)):
      for j in range(len(run)):
        yield _at_once(take, run[f"layer{j}"])(run[f"layer{j}"], np.int32(k))


def _row(stacked: Params, k: Any) -> Params:
  return jax.tree.map(lambda x: x[k], stacked)


def _run_of_one(stacked: Params, k: Any) -> Params:
  return jax.tree.map(lambda x: x[k][None], stacked)


_compiled = functools.cache(jax.jit)


def _at_once(f: Callable[..., Any], *trees: Any) -> Callable[..., Any]:
  """Returns `f` jitted if all leaves are concrete JAX arrays, else `f`.

  Run eagerly, every operation would be compiled anew for each leaf shape.
  """

  def ready(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)

  return _compiled(f) if all(map(ready, jax.tree.leaves(trees))) else f


def layer_indices(params: Params) -> dict[str, range]:
  """Maps each `run/layer` to the indices of the layers stacked in it.

  A run with period p that starts at layer `s` stores layer `s + k p + j` at
  index k of the leading axis of `layer<j>`.
  """
  out, start = {}, 0
  for name in runs(params):
    n, p = run_length(params[name]), len(params[name])
    for j in range(p):
      out[f"{name}/layer{j}"] = range(start + j, start + n * p, p)
    start += n * p
  return out


def outer_params(params: Params) -> dict[str, Any]:
  """Returns the parameters outside the layers: embedding, final norm, head."""
  hidden = set(runs(params))
  return {k: v for k, v in params.items() if k not in hidden}


def _signature(layer: Params) -> Hashable:
  leaves, treedef = jax.tree.flatten(layer)
  return treedef, tuple((x.shape, str(x.dtype)) for x in leaves)


def period(kinds: Sequence[Hashable]) -> int:
  """Returns the shortest period of `kinds` up to `MAX_PERIOD`, else 1.

  A pattern must repeat at least partly: a dense layer before the expert layers
  becomes a run of its own, however few expert layers there are.
  """
  for p in range(1, min(MAX_PERIOD + 1, len(kinds))):
    if all(kind == kinds[i % p] for i, kind in enumerate(kinds)):
      return p
  return 1


def plan(kinds: Sequence[Hashable]) -> list[tuple[int, int]]:
  """Splits layers of these kinds into runs: `(repeats, period)` for each.

  Uses one period for all layers if there is one. Otherwise minimises the number
  of layers to compile: a file whose types repeat every third layer except at
  both ends becomes three runs.
  """
  p = period(kinds)
  if p == 1:
    return _fewest(kinds)
  chunks = [tuple(kinds[i : i + p]) for i in range(0, len(kinds), p)]
  out: list[tuple[int, int]] = []
  for i, chunk in enumerate(chunks):
    if i and chunk == chunks[i - 1]:
      out[-1] = (out[-1][0] + 1, p)
    else:
      out.append((1, len(chunk)))
  return out


MAX_SEARCHED_LAYERS = 512
"""Above this number of layers, runs are not optimised by search."""


def _fewest(kinds: Sequence[Hashable]) -> list[tuple[int, int]]:
  """Returns runs with the smallest sum of periods, preferring period 1.

  The search is quadratic in the number of layers; above
  `MAX_SEARCHED_LAYERS`, only equal neighbouring layers share a run.
  """
  n = len(kinds)
  if n > MAX_SEARCHED_LAYERS or len(set(kinds)) == 1:
    return [(len(list(same)), 1) for _, same in itertools.groupby(kinds)]
  best: list[tuple[int, int, list]] = [(0, 0, [])] * (n + 1)
  for i in reversed(range(n)):
    found = []
    for p in range(1, min(MAX_PERIOD, n - i) + 1):
      end = i + p
      while end < n and kinds[end] == kinds[end - p]:
        end += 1
      for repeats in range(1 if p == 1 else 2, (end - i) // p + 1):
        compiled, periodic, rest = best[i + repeats * p]
        run = [(repeats, p), *rest]
        found.append((compiled + p, periodic + (p > 1), len(run), run))
    compiled, periodic, _, run = min(found, key=lambda x: x[:3])
    best[i] = compiled, periodic, run
  return best[0][2]


def _stack(*leaves: Any) -> Any:
  if isinstance(leaves[0], np.ndarray):
    return np.stack(leaves)
  return jnp.stack(leaves)


def stack(
  outside: Params,
  layers: Sequence[Params],
  kinds: Sequence[Hashable] | None = None,
  join: Callable[..., Any] = _stack,
) -> dict[str, Any]:
  """Builds a model's parameter tree: `outside` plus the layers as runs.

  Args:
    outside: embedding, final norm, head.
    layers: parameters of each layer; consecutive layers with equal structure
      and leaf types share a run.
    kinds: one hashable per layer for differences that parameters do not show
      (`Transformer.layer_kinds()`).
    join: stacks the arrays of several layers along a new leading axis.

  Raises:
    UserError: `kinds` and `layers` differ in length.
  """
  kinds = list(kinds) if kinds is not None else [None] * len(layers)
  if len(kinds) != len(layers):
    raise UserError(
      f"tree.stack: found {len(layers)} layers and {len(kinds)} kinds, expected"
      " one kind per layer"
    )
  signed = [(k, _signature(x)) for k, x in zip(kinds, layers, strict=True)]
  params, start = dict(outside), 0
  for i, (repeats, p) in enumerate(plan(signed)):
    rows = [layers[start + j : start + repeats * p : p] for j in range(p)]
    put = functools.partial(jax.tree.map, join)
    if join is _stack:
      put = _at_once(_stacked, rows)
    params[f"run{i}"] = {f"layer{j}": put(*each) for j, each in enumerate(rows)}
    start += repeats * p
  return params


def _stacked(*layers: Params) -> Params:
  return jax.tree.map(_stack, *layers)


def unroll(params: Params) -> dict[str, Any]:
  """Returns `params` with every layer in a run of its own.

  The model computes the same. Its layers are traced one by one, each with its
  own arrays, which makes CPU decoding in fp32 faster.
  """
  out = outer_params(params)
  for i, layer in enumerate(_each(params, _run_of_one)):
    out[f"run{i}"] = {"layer0": layer}
  return out


def split_last_layer(params: Params, key: Any = None) -> dict[str, Any]:
  """Returns `params` with the last layer split off into a run of its own.

  The model computes the same, but the last layer is no longer scanned and may
  do less work than the others: process selected tokens only (`keep` of
  `Transformer`) or skip its feed-forward (`nn.output_head`).

  Args:
    params: a parameter tree.
    key: unused; lets an experiment use this function as a weight transform.
  """
  del key
  *most, last = runs(params)
  out = {k: v for k, v in params.items() if k != last}
  parts = _at_once(_split, params[last])(params[last])
  return out | {f"run{len(most) + i}": part for i, part in enumerate(parts)}


def _split(run: Params) -> list[Params]:
  """Splits a run into runs, the last of which has a single layer."""
  n, p = run_length(run), len(run)

  def part(rows, layers):
    return {
      f"layer{j}": jax.tree.map(lambda x: x[rows], run[f"layer{k}"])
      for j, k in enumerate(layers)
    }

  before = [part(slice(0, n - 1), range(p))] if n > 1 else []
  within = [part(slice(n - 1, n), range(p - 1))] if p > 1 else []
  return [*before, *within, part(slice(n - 1, n), [p - 1])]


def count(tree: Any) -> int:
  """Returns the number of stored array elements in `tree`.

  For packed weights this differs from the number of parameters, which is
  `weights.count`.
  """
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
  """Returns the total size of all arrays in `tree`, in bytes."""
  return sum(
    int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(tree)
  )


def describe(
  tree: Any, trainable: str = r"$^", shardings: Any | None = None
) -> str:
  """Returns a text table of all arrays: path, shape, dtype, trainable, bytes.

  Args:
    tree: arrays or shape structs.
    trainable: regular expression, searched for in each array's path.
    shardings: a tree with the `NamedSharding` of each array; adds columns for
      the mesh axes that shard each axis and for the bytes per device.
  """
  rows = [("path", "shape", "dtype", "trainable", "bytes")]
  for path, x in flatten_paths(tree):
    mark = "yes" if re.search(trainable, path) else ""
    shape = "x".join(map(str, x.shape)) or "scalar"
    rows.append((path, shape, str(x.dtype), mark, f"{nbytes(x):,}"))
  if shardings is not None:
    found = zip(flatten_paths(tree), flatten_paths(shardings), strict=True)
    more = [("spec", "bytes/device")] + [
      (_spec(s.spec, x.ndim), f"{part_bytes(x, s):,}")
      for (_, x), (_, s) in found
    ]
    rows = [
      (*row[:3], spec, *row[3:], each)
      for row, (spec, each) in zip(rows, more, strict=True)
    ]
  right = [i for i, name in enumerate(rows[0]) if name.startswith("bytes")]
  return "\n".join(tables.aligned(rows, right))


def _spec(spec: Any, ndim: int) -> str:
  """Returns the mesh axes of each array axis as text: `-` or `data+fsdp`."""
  axes = [*spec, *[None] * (ndim - len(spec))]
  cut = [a if isinstance(a, str) else "+".join(a or ()) or "-" for a in axes]
  return ",".join(cut)


def part_bytes(x: Any, sharding: Any) -> int:
  """Returns the bytes of one device's shard of an array or shape struct."""
  shape = sharding.shard_shape(tuple(x.shape))
  return int(np.prod(shape)) * np.dtype(x.dtype).itemsize


def device_put_like(tree: Any, params: Params) -> Any:
  """Commits `tree` to the device of `params` if they are committed to one.

  A program returns arrays committed to the device of its committed inputs. If
  state that is passed from call to call started out uncommitted, the first call
  would compile a program of its own.

  Args:
    tree: arrays.
    params: weights. If they span several devices, `tree` is returned unchanged.
  """
  leaves = jax.tree.leaves(params)
  tied = [x.sharding for x in leaves if getattr(x, "committed", False)]
  if not tied or len(tied[0].device_set) > 1:
    return tree
  return jax.device_put(tree, tied[0])
