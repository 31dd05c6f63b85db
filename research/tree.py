"""Parameter trees: paths, parts of them, and stacks as lists of scanned runs.

A stack of layers is stored as runs, `run0`, `run1`, ...: in each, layers that
are equal in structure and leaf types stand behind one leading axis and are
scanned. A run scans over its period, `layer0` .. `layer{p-1}` (Gemma's local
and global layers). Importers, exporters and reports use `layers` and `stack`,
and never see the runs.
"""

import functools
import itertools
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.typing import Params, UserError

MAX_PERIOD = 8
"""The longest repeating pattern of layers that one run scans over."""


def _key_name(key: Any) -> str:
  for field in ("key", "name", "idx"):
    if hasattr(key, field):
      return str(getattr(key, field))
  return str(key)


def path_name(path: Sequence[Any]) -> str:
  """Returns a key path as text: `run0/layer0/attention/q/a`."""
  return "/".join(_key_name(key) for key in path)


def flatten_paths(tree: Any) -> list[tuple[str, Any]]:
  """Returns `(path, array)` of every array in `tree`."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [(path_name(path), leaf) for path, leaf in leaves]


def map_paths(f: Callable[[str, Any], Any], tree: Any, is_leaf=None) -> Any:
  """Returns `tree` with `f(path, leaf)` in place of each leaf."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: f(path_name(path), leaf), tree, is_leaf=is_leaf
  )


def partition(tree: Any, pattern: str) -> tuple[Any, Any]:
  """Returns `(selected, rest)`: two trees with `None` where the other has it.

  Args:
    tree: any pytree.
    pattern: regular expression, searched for in each array's path.
  """
  found = re.compile(pattern)
  selected = map_paths(lambda p, x: x if found.search(p) else None, tree)
  rest = map_paths(lambda p, x: None if found.search(p) else x, tree)
  return selected, rest


def combine(a: Any, b: Any) -> Any:
  """Returns the tree whose parts are `a` and `b`; inverts `partition`."""
  return jax.tree.map(
    lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None
  )


def runs(params: Params) -> list[str]:
  """Returns the names of the scanned runs in `params`, in order."""
  found = [k for k in params if re.fullmatch(r"run\d+", k)]
  return sorted(found, key=lambda k: int(k[3:]))


def run_length(run: Params) -> int:
  """Returns how often `run` repeats its period."""
  return jax.tree.leaves(run)[0].shape[0]


def layers(params: Params) -> Iterator[Params]:
  """Yields each layer's own parameters, first to last."""
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
  """Returns `f` as one program where all leaves are arrays of JAX.

  Eagerly each operation would be compiled, for each leaf's shape anew.
  """

  def ready(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)

  return _compiled(f) if all(map(ready, jax.tree.leaves(trees))) else f


def layer_indices(params: Params) -> dict[str, range]:
  """Returns which layers stand behind the leading axis of each `run/layer`.

  A run of n repeats and period p that starts at layer `s` holds layer
  `s + k p + j` at row k of its `layer<j>`.
  """
  out, start = {}, 0
  for name in runs(params):
    n, p = run_length(params[name]), len(params[name])
    for j in range(p):
      out[f"{name}/layer{j}"] = range(start + j, start + n * p, p)
    start += n * p
  return out


def outer_params(params: Params) -> dict[str, Any]:
  """Returns what stands outside the layers: embedding, final norm, head."""
  hidden = set(runs(params))
  return {k: v for k, v in params.items() if k not in hidden}


def _signature(layer: Params) -> Hashable:
  leaves, treedef = jax.tree.flatten(layer)
  return treedef, tuple((x.shape, str(x.dtype)) for x in leaves)


def period(kinds: Sequence[Hashable]) -> int:
  """Returns the shortest period of `kinds` up to `MAX_PERIOD`, else 1.

  A pattern that does not begin again is none: a dense layer in front of
  expert layers is a run of its own, however few they are.
  """
  for p in range(1, min(MAX_PERIOD + 1, len(kinds))):
    if all(kind == kinds[i % p] for i, kind in enumerate(kinds)):
      return p
  return 1


def plan(kinds: Sequence[Hashable]) -> list[tuple[int, int]]:
  """Returns the runs of layers of such kinds as `(repeats, period)`.

  A period of all layers, or else the runs with the fewest layers to compile: a
  file whose types repeat every third layer, but for both ends, is three runs.
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


MOST_SEARCHED = 512
"""Layers at most whose runs are searched for."""


def _fewest(kinds: Sequence[Hashable]) -> list[tuple[int, int]]:
  """Returns runs whose periods add up to least; of such, most of period 1.

  The search is quadratic: of more layers than anybody's, equal neighbours are
  runs and nothing else.
  """
  n = len(kinds)
  if n > MOST_SEARCHED or len(set(kinds)) == 1:
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
  """Returns the parameter tree of a model: `outside` and the layers as runs.

  Args:
    outside: embedding, final norm, head.
    layers: each layer's parameters; equal structures and leaf types that
      follow each other share a run.
    kinds: what else tells layers apart (`Transformer.layer_kinds()`), one
      hashable a layer.
    join: puts arrays of layers behind a leading axis.
  """
  kinds = list(kinds) if kinds is not None else [None] * len(layers)
  if len(kinds) != len(layers):
    raise UserError(f"{len(layers)} layers were given for {len(kinds)} kinds")
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
  """Returns `params` with a run of its own for each layer.

  The model is the same; its layers are traced one by one, each with arrays of
  its own, which CPU decoding in fp32 is faster with.
  """
  out = outer_params(params)
  for i, layer in enumerate(_each(params, _run_of_one)):
    out[f"run{i}"] = {"layer0": layer}
  return out


def last_apart(params: Params, key: Any = None) -> dict[str, Any]:
  """Returns `params` whose last layer is a run of its own.

  The model is the same; that layer can then compute less than those that are
  scanned: some tokens (`Transformer`'s `keep`), or no feed-forward (`nn.tail`).

  Args:
    params: a parameter tree.
    key: not used: this is a transform of experiments, too.
  """
  del key
  *most, last = runs(params)
  out = {k: v for k, v in params.items() if k != last}
  parts = _at_once(_split, params[last])(params[last])
  return out | {f"run{len(most) + i}": part for i, part in enumerate(parts)}


def _split(run: Params) -> list[Params]:
  """Returns runs of a run's layers, the last of them of one layer."""
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
  """Returns the number of elements in all arrays of `tree`, as stored.

  How many parameters they are is `weights.count`.
  """
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
  """Returns the bytes that all arrays of `tree` occupy."""
  return sum(
    int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(tree)
  )


def describe(
  tree: Any, trainable: str = r"$^", shardings: Any | None = None
) -> str:
  """Returns a table of every array: path, shape, dtype, trainable, bytes.

  Args:
    tree: of arrays, or of their shapes.
    trainable: regular expression, searched for in each array's path.
    shardings: a tree of each one's `NamedSharding`; then the table says over
      which mesh axes each axis is cut, and the bytes on each device.
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
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  right = {i for i, name in enumerate(rows[0]) if name.startswith("bytes")}
  return "\n".join(
    "  ".join(
      cell.rjust(w) if i in right else cell.ljust(w)
      for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  )


def _spec(spec: Any, ndim: int) -> str:
  """Returns what cuts each axis: `-` for nothing, `data+fsdp` for both."""
  axes = [*spec, *[None] * (ndim - len(spec))]
  cut = [a if isinstance(a, str) else "+".join(a or ()) or "-" for a in axes]
  return ",".join(cut)


def part_bytes(x: Any, sharding: Any) -> int:
  """Returns the bytes of an array, or its shape, on each device."""
  shape = sharding.shard_shape(tuple(x.shape))
  return int(np.prod(shape)) * np.dtype(x.dtype).itemsize


def device_put_like(tree: Any, params: Params) -> Any:
  """Returns a tree on the device of the weights, where these are tied to one.

  What a program of such weights returns is tied to it, too: carried on from
  call to call, values that are tied to none would have a program of their own,
  compiled for the first call alone.

  Args:
    tree: arrays.
    params: weights; left out of account where they lie on several devices.
  """
  leaves = jax.tree.leaves(params)
  tied = [x.sharding for x in leaves if getattr(x, "committed", False)]
  if not tied or len(tied[0].device_set) > 1:
    return tree
  return jax.device_put(tree, tied[0])
