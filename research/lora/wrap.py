"""Adds adapters to a parameter tree, merges them and removes them.

Any matrix of the tree can be adapted, packed or not. Addresses name layers
independently of the scanned runs that store them: `layers/3/attention/q`,
`embed`, `head`. A run whose layers get adapters of different form is split,
since a scan needs equal layers.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from research import tree, weights
from research.lora.adapted import AdaptedBias, AdaptedTensor
from research.lora.method import Arrays, Method
from research.quant.untied_embedding import Untied
from research.typing import Params, PRNGKey, UserError

TRAINABLE = r"(^|/)trained/"
"""Paths of the adapters' trained arrays, for `tree.partition`."""

EMBEDDING = "embed"


def is_embedding(address: str) -> bool:
  """Whether a model looks up rows of this matrix.

  The vocabulary's, and Gemma 4's of its layers' inputs.
  """
  return address.rpartition("/")[2] == EMBEDDING


MakeArrays = Callable[[Sequence[str], Method, Any], tuple[Arrays, Arrays]]
"""(paths, method, weights) -> (trained, fixed) arrays, stacked.

`weights` is one weight `[L, in, out]` for the L paths (`[L, E, in, out]` for
experts); every returned array has the same leading axes."""


def leaves(part: Any) -> Iterator[tuple[str, Any]]:
  """Yields (path, weight) of every weight in a subtree."""
  yield from weights.named_weights(part)


def adapted(part: Any) -> Iterator[tuple[str, AdaptedTensor]]:
  """Yields (path, adapter) of every adapted weight in a subtree.

  Raises:
    UserError: an adapter is inside another weight, which rounds, say: alone it
      is not what was trained.
  """
  for path, leaf in leaves(part):
    if isinstance(leaf, AdaptedTensor):
      yield path, leaf
    elif has_adapter(leaf):
      raise UserError(
        f"{path}: its adapter is inside a {type(leaf).__name__}, expected"
        " nothing around it.\nMerge it (wrap.merge), pack it (qat.Convert), or"
        " apply Adapt last."
      )


def has_adapter(w: Any) -> bool:
  """Whether a weight is an adapter, or wraps one at any depth."""
  return any(isinstance(x, AdaptedTensor) for x in weights.nested(w))


def matrices(params: Params) -> dict[str, tuple[int, int]]:
  """Returns (in, out) of every matrix that can be adapted, by address.

  These are the layers' linear maps, `embed` `[V, D]` and an untied `head`.
  """
  out = {}
  for path, leaf in leaves(tree.outer_params(params)):
    if len(leaf.shape) == 2:
      out[path] = tuple(leaf.shape)
  for prefix, layers in tree.layer_indices(params).items():
    for path, leaf in leaves(_layer(params, prefix)):
      if len(leaf.shape) == 3:
        for i in layers:
          out[f"layers/{i}/{path}"] = tuple(leaf.shape[1:])
  return out


def _layer(params: Params, prefix: str) -> Params:
  run, layer = prefix.split("/")
  return params[run][layer]


def experts(params: Params) -> dict[str, tuple[int, int, int]]:
  """Returns (E, in, out) of every layer's stacked experts, by address.

  Each expert gets its own factors; the experts of a stack share rank and scale.
  """
  return {
    f"layers/{i}/{path}": tuple(leaf.shape[1:])
    for prefix, layers in tree.layer_indices(params).items()
    for path, leaf in leaves(_layer(params, prefix))
    if len(leaf.shape) == 4
    for i in layers
  }


def wrap(
  params: Params, methods: Mapping[str, Method], make: MakeArrays
) -> dict[str, Any]:
  """Returns `params` with an AdaptedTensor around each matrix in `methods`.

  Args:
    params: any tree of weights; its arrays are shared, not copied, except
      those of runs that are split.
    methods: address -> method, as in `matrices` and `experts`.
    make: makes the arrays; called once per weight of the tree.

  Raises:
    UserError: the model has no matrix at an address, or two, as the embedding
      of a rotated tied model, whose head is another matrix.
  """
  unknown = sorted(set(methods) - set(matrices(params)) - set(experts(params)))
  if unknown:
    raise UserError(f"no matrix of the model is called {unknown[0]}")

  def adapted_alone(path, leaf):
    if path not in methods:
      return leaf
    if isinstance(leaf, Untied):
      raise UserError(
        f"{path}: found a table and a head that differ, as after rotating a"
        f" tied model, expected one matrix; leave {path} out of the targets"
      )
    alone = jax.tree.map(lambda x: x[None], leaf)
    arrays = make([path], methods[path], alone)
    trained, fixed = jax.tree.map(lambda x: x[0], arrays)
    return AdaptedTensor(leaf, trained, fixed, method=methods[path])

  out = tree.map_paths(
    adapted_alone, tree.outer_params(params), is_leaf=weights.is_weight
  )
  indices, count = tree.layer_indices(params), itertools.count()
  for name in tree.runs(params):
    run = params[name]
    rows = {layer: indices[f"{name}/{layer}"] for layer in run}
    n = tree.run_length(run)
    for start, stop in _equal_rows(run, rows, methods, n):
      part = run
      if stop - start < n:
        part = jax.tree.map(lambda x, s=start, e=stop: x[s:e], run)
      out[f"run{next(count)}"] = _wrap_run(
        part, rows, range(start, stop), methods, make
      )
  return out


def adapters(
  params: Params, prepare: Callable[[AdaptedTensor], Any]
) -> dict[str, Any]:
  """Returns each matrix's adapter, by address.

  Args:
    prepare: applied to each adapted leaf, layers stacked, before it is split
      into layers.

  Raises:
    UserError: see `adapted`.
  """
  out = {}
  for path, leaf in adapted(tree.outer_params(params)):
    out[path] = prepare(leaf)
  for prefix, layers in tree.layer_indices(params).items():
    for path, leaf in adapted(_layer(params, prefix)):
      rows = prepare(leaf)
      for k, i in enumerate(layers):
        out[f"layers/{i}/{path}"] = jax.tree.map(lambda x, k=k: x[k], rows)
  return out


def _address(path: str, rows: Mapping[str, range], k: int) -> str:
  layer, inner = path.split("/", 1)
  return f"layers/{rows[layer][k]}/{inner}"


def _equal_rows(run, rows, methods, n) -> Iterator[tuple[int, int]]:
  """Yields ranges of a run's layers whose adapters have equal form."""
  paths = [path for path, _ in leaves(run)]

  def form(k):
    return tuple(methods.get(_address(path, rows, k)) for path in paths)

  for _, group in itertools.groupby(range(n), key=form):
    ks = list(group)
    yield ks[0], ks[-1] + 1


def _wrap_run(run, rows, ks, methods, make):
  def adapted(path, leaf):
    paths = [_address(path, rows, k) for k in ks]
    method = methods.get(paths[0])
    if method is None:
      return leaf
    return AdaptedTensor(leaf, *make(paths, method, leaf), method=method)

  return tree.map_paths(adapted, run, is_leaf=weights.is_weight)


def biases(params: Params) -> dict[str, AdaptedBias]:
  """Returns the biases that adapters scale, by path."""
  by_path, out = dict(leaves(params)), {}
  for path, w in by_path.items():
    bias = weights.bias_path(path)
    if bias in by_path and _scales(w):
      out[bias] = AdaptedBias(by_path[bias], w)
  return out


def _scales(w: Any) -> bool:
  return any(
    isinstance(x, AdaptedTensor) and x.method.output_gain is not None
    for x in weights.nested(w)
  )


def merge(params: Params) -> Any:
  """Returns the tree with every adapter merged into its base.

  Weights around an adapter, which round it in training, say, stay.
  The sum is computed in fp32 and rounded to the base's dtype. bf16 loses most
  of a small update (research/lora/MATH.md 2.4), which fp32 weights keep.
  """
  return _replaced(params, AdaptedTensor | AdaptedBias)


@dataclasses.dataclass(frozen=True)
class Merge:
  """Transform after a stage: what `merge` does, for `Experiment.after`."""

  def __call__(self, params: Params, key: PRNGKey | None = None) -> Any:
    del key
    return merge(params)


def merge_biases(params: Params) -> Any:
  """Returns the tree with scaled biases merged and its adapters unchanged."""
  return _replaced(params, AdaptedBias)


def _replaced(params: Params, kind: Any) -> Any:
  scaled = biases(params)

  def one(path, leaf):
    return inside(scaled.get(path, leaf))

  def inside(w):
    if isinstance(w, kind):
      return _merged(w)
    inner = weights.unwrap(w)
    if inner is None or not has_adapter(inner):
      return w
    return dataclasses.replace(w, w=inside(inner))

  return tree.map_paths(one, params, is_leaf=weights.is_weight)


@jax.jit
def _merged(w: AdaptedTensor | AdaptedBias) -> Any:
  # Jitted: one program per weight rather than one per operation.
  return w.dense()


def disable(params: Params) -> Any:
  """Returns the tree without its adapters; shares the base's arrays.

  Adapters inside other weights, such as those that train with rounding, go too.
  """

  def base(w):
    if isinstance(w, AdaptedTensor):
      return base(w.w)
    inner = weights.unwrap(w)
    return w if inner is None else dataclasses.replace(w, w=base(inner))

  return jax.tree.map(base, params, is_leaf=weights.is_weight)
