"""LoRA as a rewrite of the tree: wrap weights, merge them, take them off.

Any matrix of the tree can be wrapped, packed or not. Weights are addressed by
layer, whatever runs they are stored in: `layers/3/attention/q`, `embed`,
`head`. Where layers of one run get adapters of different rank or scale, the
run is split, since only equal layers can be scanned.
"""

import dataclasses
import functools
import itertools
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from research import tree, weights
from research.lora.tensor import LoRATensor
from research.typing import Array, Float, Params, PRNGKey, UserError

TRAINABLE = r"(^|/)[ab]$"
"""Paths of the adapters' own arrays, for `tree.partition`."""

EMBEDDING = "embed"
ALL_LINEAR = "all-linear"
_ROUTED = re.compile(r"/mlp/(router|experts/\w+)$")

Init = Literal["peft", "gaussian"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """One adapter: its rank, its scale `s`, its dropout rate."""

  rank: int
  scale: float
  dropout: float = 0.0


Factors = Callable[
  [Sequence[str], Spec, tuple[int, int]],
  tuple[Float[Array, "L R I"], Float[Array, "L R O"]],
]
"""(paths, spec, (in, out)) -> a and b of all those matrices, stacked.

For experts the shape is (E, in, out), and a and b have E after the stack."""


def leaves(part: Any) -> Iterator[tuple[str, Any]]:
  """Yields (path, weight) of every weight in a part of the tree."""
  found, _ = jax.tree_util.tree_flatten_with_path(
    part, is_leaf=weights.is_weight
  )
  for path, leaf in found:
    yield tree.path_name(path), leaf


def matrices(params: Params) -> dict[str, tuple[int, int]]:
  """Returns (in, out) of every matrix that can be adapted, by address.

  Those are the layers' linear maps, `embed` `[V, D]` and an untied `head`.
  """
  out = {}
  for path, leaf in leaves(tree.top(params)):
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

  Each expert has factors of its own; all of a stack share rank and scale.
  """
  return {
    f"layers/{i}/{path}": tuple(leaf.shape[1:])
    for prefix, layers in tree.layer_indices(params).items()
    for path, leaf in leaves(_layer(params, prefix))
    if len(leaf.shape) == 4
    for i in layers
  }


def wrap(
  params: Params, specs: Mapping[str, Spec], factors: Factors
) -> dict[str, Any]:
  """Returns `params` with a LoRATensor around each matrix in `specs`.

  Args:
    params: any tree of weights; its arrays are shared, not copied, except
      those of runs that have to be split.
    specs: by address, as in `matrices` and `experts`.
    factors: makes a and b; called once for each array of the tree.
  """
  unknown = sorted(set(specs) - set(matrices(params)) - set(experts(params)))
  if unknown:
    raise UserError(f"no matrix of the model is called {unknown[0]}")

  def adapted(path, leaf):
    spec = specs.get(path)
    if spec is None:
      return leaf
    a, b = factors([path], spec, tuple(leaf.shape))
    return _tensor(leaf, a[0], b[0], spec)

  out = tree.map_paths(adapted, tree.top(params), is_leaf=weights.is_weight)
  indices, count = tree.layer_indices(params), itertools.count()
  for name in tree.runs(params):
    run = params[name]
    rows = {layer: indices[f"{name}/{layer}"] for layer in run}
    n = tree.run_length(run)
    for start, stop in _equal_rows(run, rows, specs, n):
      part = run
      if stop - start < n:
        part = jax.tree.map(lambda x, s=start, e=stop: x[s:e], run)
      out[f"run{next(count)}"] = _wrap_run(
        part, rows, range(start, stop), specs, factors
      )
  return out


def _tensor(w, a, b, spec: Spec) -> LoRATensor:
  return LoRATensor(w, a, b, scale=spec.scale, dropout=spec.dropout)


def _address(path: str, rows: Mapping[str, range], k: int) -> str:
  layer, inner = path.split("/", 1)
  return f"layers/{rows[layer][k]}/{inner}"


def _equal_rows(run, rows, specs, n) -> Iterator[tuple[int, int]]:
  """Yields the ranges of a run's rows whose adapters are equal in form."""
  paths = [path for path, _ in leaves(run)]

  def form(k):
    return tuple(specs.get(_address(path, rows, k)) for path in paths)

  for _, group in itertools.groupby(range(n), key=form):
    ks = list(group)
    yield ks[0], ks[-1] + 1


def _wrap_run(run, rows, ks, specs, factors):
  def adapted(path, leaf):
    paths = [_address(path, rows, k) for k in ks]
    spec = specs.get(paths[0])
    if spec is None:
      return leaf
    a, b = factors(paths, spec, tuple(leaf.shape[1:]))
    return _tensor(leaf, a, b, spec)

  return tree.map_paths(adapted, run, is_leaf=weights.is_weight)


def _strip(params: Params, f: Callable[[LoRATensor], Any]) -> Any:
  return jax.tree.map(
    lambda w: f(w) if isinstance(w, LoRATensor) else w,
    params,
    is_leaf=weights.is_weight,
  )


def merge(params: Params) -> Any:
  """Returns the tree with every adapter added into its weight.

  The sum is formed in fp32 and rounded to the weight's dtype; in bf16 most of
  a small update is lost (lora.md 2.5), so merge fp32 weights where it counts.
  """
  return _strip(params, weights.dense)


def disable(params: Params) -> Any:
  """Returns the tree under the adapters; shares its arrays."""

  def base(w):
    return base(w.w) if isinstance(w, LoRATensor) else w

  return _strip(params, base)


def _peft(key: PRNGKey, rank: int, size: int) -> Float[Array, "R I"]:
  # Kaiming uniform with a = sqrt(5), which is what PEFT calls for.
  bound = size**-0.5
  return jax.random.uniform(key, (rank, size), jnp.float32, -bound, bound)


def _normal(key: PRNGKey, rank: int, size: int) -> Float[Array, "R I"]:
  return jax.random.normal(key, (rank, size), jnp.float32)


def _gaussian(key: PRNGKey, rank: int, size: int) -> Float[Array, "R I"]:
  return _normal(key, rank, size) / rank


_INITS = {"peft": _peft, "gaussian": _gaussian}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapt:
  """The transform that adds fresh adapters (Hu et al. 2021, section 4).

  A new adapter computes exactly what its base does: b = 0 (for an embedding
  a = 0, as in PEFT). a and b are fp32 whatever the base is: in bf16 an Adam
  step of usual size is below half an ulp and lost.

  Attributes:
    targets: `"all-linear"` (every matrix that each token of a layer passes,
      so neither the router nor its experts, as in PEFT), names such as
      `("q", "v")` matched at the end of addresses, or one regular expression
      that must match whole addresses (`layers/[0-3]/attention/.*`).
    rank: `r`.
    alpha: the scale is `alpha / r`, or `alpha / sqrt(r)` with `rslora`.
    rslora: Kalajdzievski 2023 (arXiv:2312.03732).
    dropout: on the branch's input, in training.
    init: of a: uniform within `in**-0.5` (PEFT's default), or normal with
      standard deviation `1 / r`.
    rank_pattern, alpha_pattern: regular expressions for the end of addresses
      -> another rank or alpha; no two may match one address.
  """

  targets: str | Sequence[str] = ALL_LINEAR
  rank: int = 8
  alpha: float = 16.0
  rslora: bool = False
  dropout: float = 0.0
  init: Init = "peft"
  rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
  alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    ranks = [self.rank, *self.rank_pattern.values()]
    if min(ranks) < 1:
      raise UserError(f"Adapt: rank is {min(ranks)}, expected at least 1")
    if not 0 <= self.dropout < 1:
      raise UserError(
        f"Adapt: dropout is {self.dropout}, expected at least 0 and below 1"
      )

  def __call__(self, params: Params, key: PRNGKey) -> dict[str, Any]:
    """Returns `params` with fresh adapters, each drawn by its own address.

    Raises:
      UserError: a target or a pattern matches nothing, or two patterns match
        the same weight.
    """
    specs = self.specs(params)

    def factors(paths, spec, shape):
      return _fresh(key, paths, spec.rank, shape, self.init)

    return wrap(params, specs, factors)

  def specs(self, params: Params) -> dict[str, Spec]:
    """Returns what is adapted, and how, by address."""
    chosen = self._chosen([*matrices(params), *experts(params)])
    ranks = _patterned(self.rank_pattern, chosen, "rank_pattern")
    alphas = _patterned(self.alpha_pattern, chosen, "alpha_pattern")
    out = {}
    for path in chosen:
      rank = ranks.get(path, self.rank)
      alpha = alphas.get(path, self.alpha)
      scale = alpha / (rank**0.5 if self.rslora else rank)
      out[path] = Spec(rank=rank, scale=scale, dropout=self.dropout)
    return out

  def _chosen(self, paths: Sequence[str]) -> list[str]:
    layers = [
      p for p in paths if p.startswith("layers/") and not _ROUTED.search(p)
    ]
    if self.targets == ALL_LINEAR:
      return layers
    if isinstance(self.targets, str):
      found = _compiled(self.targets, "targets")
      chosen = [p for p in paths if found.fullmatch(p)]
      if not chosen:
        raise _no_match("targets", self.targets, paths)
      return chosen
    for name in self.targets:
      if not any(f"/{p}".endswith(f"/{name}") for p in paths):
        raise _no_match("targets", name, paths)
    return [
      p
      for p in paths
      if any(f"/{p}".endswith(f"/{name}") for name in self.targets)
    ]


@functools.partial(jax.jit, static_argnames=("draw", "rank", "size"))
def _drawn(key, ids, draw, rank, size):
  # One program for all layers; eagerly each shape would compile many.
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, ids)
  return jax.vmap(lambda k: draw(k, rank, size))(keys)


def _fresh(key, paths, rank, shape, init):
  """Returns (a, b) of new adapters on the matrices `paths`, stacked."""
  *lead, size_in, size_out = shape
  if lead:
    each = [f"{p}/{e}" for p in paths for e in range(*lead)]
    flat = _fresh(key, each, rank, (size_in, size_out), init)
    return tuple(x.reshape(len(paths), *lead, *x.shape[1:]) for x in flat)
  ids = np.array([zlib.crc32(p.encode()) for p in paths], np.uint32)
  if paths[0] == EMBEDDING:
    a = jnp.zeros((len(paths), rank, size_in), jnp.float32)
    return a, _drawn(key, ids, _normal, rank, size_out)
  a = _drawn(key, ids, _INITS[init], rank, size_in)
  return a, jnp.zeros((len(paths), rank, size_out), jnp.float32)


def _compiled(pattern: str, field: str) -> re.Pattern[str]:
  try:
    return re.compile(pattern)
  except re.error as e:
    raise UserError(
      f"Adapt: {field} {pattern!r} is not a regular expression: {e}"
    ) from e


def _no_match(field: str, pattern: str, paths: Sequence[str]) -> UserError:
  names = sorted({p.split("/", 2)[-1] for p in paths})
  return UserError(
    f"Adapt: {field} {pattern!r} matches no weight of the model.\n"
    f"Weights are called layers/0/attention/q and so on; names: "
    f"{', '.join(names)}."
  )


def _patterned(
  patterns: Mapping[str, Any], paths: Sequence[str], field: str
) -> dict[str, Any]:
  out: dict[str, Any] = {}
  for pattern, value in patterns.items():
    found = _compiled(rf"(.*/)?({pattern})", field)
    matched = [p for p in paths if found.fullmatch(p)]
    if not matched:
      raise _no_match(field, pattern, paths)
    twice = [p for p in matched if p in out]
    if twice:
      raise UserError(f"Adapt: two keys of {field} match {twice[0]}")
    out |= dict.fromkeys(matched, value)
  return out
