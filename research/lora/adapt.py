"""Adds newly initialised adapters of any method to a parameter tree."""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import tree
from research.lora.method import MatrixSpec, Method
from research.lora.methods.lora import LoRA
from research.lora.wrap import experts, is_embedding, matrices, wrap
from research.typing import Params, PRNGKey, UserError

ALL_LINEAR = "all-linear"
_ROUTED = re.compile(r"/mlp/(router|experts/\w+)$")

InitStats = Callable[[Params, Sequence[str], PRNGKey], Mapping[str, Any]]
"""(params, addresses, key) -> each matrix's calibration statistics."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapt:
  """Transform that adds adapters, each with a random key of its address.

  The adapters' arrays are fp32 for any base: a bf16 array would lose an Adam
  step of usual size, which is below half an ulp (research/lora/MATH.md 3.3).

  Attributes:
    method: the adapters' method, see `research.lora.methods`.
    targets: `"all-linear"` (every matrix that each token of a layer passes,
      so neither the router nor its experts, as in PEFT), names such as
      `("q", "v")` matched at the end of addresses, or one regular expression
      that must match whole addresses (`layers/[0-3]/attention/.*`).
    exclude: regular expressions for the end of addresses that get no adapter.
    rank_pattern, alpha_pattern: regular expressions for the end of addresses
      -> rank or alpha there; no two may match one address.
    init_stats: measures the statistics that data-dependent initialisations
      need, see `research.lora.init_stats`; None for other methods.
  """

  method: Method = LoRA()
  targets: str | Sequence[str] = ALL_LINEAR
  exclude: Sequence[str] = ()
  rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
  alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
  init_stats: InitStats | None = None

  def __call__(self, params: Params, key: PRNGKey) -> dict[str, Any]:
    """Returns `params` with newly initialised adapters.

    Raises:
      UserError: a target or a pattern matches nothing, or two patterns match
        the same weight.
    """
    methods, stats = self.methods(params), {}
    if self.init_stats is not None:
      stats = self.init_stats(params, list(methods), jax.random.fold_in(key, 1))

    def make(paths, method, w):
      return init_adapters(key, paths, method, w, stats)

    return wrap(params, methods, make)

  def with_model(self, loaded: Any) -> "Adapt":
    if not hasattr(self.init_stats, "with_model"):
      return self
    return dataclasses.replace(
      self, init_stats=self.init_stats.with_model(loaded)
    )

  def methods(self, params: Params) -> dict[str, Method]:
    chosen = self._chosen(params)
    for pattern in self.exclude:
      left = _compiled(rf"(.*/)?({pattern})", "exclude")
      kept = [p for p in chosen if not left.fullmatch(p)]
      if len(kept) == len(chosen):
        raise _no_match("exclude", pattern, chosen)
      chosen = kept
    sizes = matrices(params) | {
      path: size[1:] for path, size in experts(params).items()
    }
    sizes = {path: sizes[path] for path in chosen}
    ranks = _patterned(self.rank_pattern, chosen, "rank_pattern")
    alphas = _patterned(self.alpha_pattern, chosen, "alpha_pattern")
    return {
      path: dataclasses.replace(
        self.method.for_matrix(path, sizes),
        rank=ranks.get(path, self.method.rank),
        alpha=alphas.get(path, self.method.alpha),
      )
      for path in chosen
    }

  def _chosen(self, params: Params) -> list[str]:
    paths = [*matrices(params), *experts(params)]
    layers = [
      p for p in paths if p.startswith("layers/") and not _ROUTED.search(p)
    ]
    if self.targets == ALL_LINEAR:
      if not layers:
        raise UserError(tree.no_layers("Adapt", params))
      return layers
    if isinstance(self.targets, str):
      regex = _compiled(self.targets, "targets")
      chosen = [p for p in paths if regex.fullmatch(p)]
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


def init_adapters(
  key: PRNGKey,
  paths: Sequence[str],
  method: Method,
  w: Any,
  stats: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Initialises stacked adapters; see `wrap.MakeArrays`.

  Args:
    key: shared key; each matrix folds its address into it.
    stats: each matrix's calibration statistics by address, or empty.

  Returns:
    (trained, fixed) arrays, stacked as `w` is.
  """
  lead = tuple(w.shape[:-2])
  names = list(paths)
  if len(lead) > 1:
    names = [f"{p}/{e}" for p in paths for e in range(lead[1])]
    w = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), w)
  ids = np.array([zlib.crc32(name.encode()) for name in names], np.uint32)
  measured = None
  if stats:
    rows = [stats[path] for path in paths]
    measured = jax.tree.map(_stacked, *rows)
    if len(lead) > 1:
      measured = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), measured)
  spec = MatrixSpec(*w.shape[-2:], embedding=is_embedding(paths[0]))
  arrays = _init(key, ids, w, measured, method, spec)
  return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), arrays)


def _stacked(*rows):
  # NumPy, since JAX would compile a program per shape; but planning runs this
  # under `eval_shape`, with tracers.
  traced = any(isinstance(x, jax.core.Tracer) for x in rows)
  return (jnp if traced else np).stack(rows)


@functools.partial(jax.jit, static_argnames=("method", "spec"))
def _init(key, ids, w, stats, method, spec):
  # Jitted: one program for all layers rather than one per operation and shape.
  # `lax.map`, so that an initialisation by SVD needs memory for one matrix.
  def one(x):
    i, w, stats = x
    return method.init_arrays(jax.random.fold_in(key, i), spec, w, stats)

  return jax.lax.map(one, (ids, w, stats))


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
    regex = _compiled(rf"(.*/)?({pattern})", field)
    matched = [p for p in paths if regex.fullmatch(p)]
    if not matched:
      raise _no_match(field, pattern, paths)
    twice = [p for p in matched if p in out]
    if twice:
      raise UserError(f"Adapt: two keys of {field} match {twice[0]}")
    out |= dict.fromkeys(matched, value)
  return out
