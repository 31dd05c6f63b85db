"""The transform that adds fresh adapters of any method to a tree."""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.lora.method import Method, Place
from research.lora.methods.lora import LoRA
from research.lora.wrap import EMBEDDING, experts, matrices, wrap
from research.typing import Params, PRNGKey, UserError

ALL_LINEAR = "all-linear"
_ROUTED = re.compile(r"/mlp/(router|experts/\w+)$")

InitStats = Callable[[Params, Sequence[str], PRNGKey], Mapping[str, Any]]
"""(params, addresses, key) -> what was measured for each of those matrices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapt:
  """Adds adapters, each drawn by its own address.

  Their arrays are fp32 whatever the base is: in bf16 an Adam step of usual
  size is below half an ulp and lost (lora.md 3.6).

  Attributes:
    method: what is added, see `research.lora.methods`.
    targets: `"all-linear"` (every matrix that each token of a layer passes,
      so neither the router nor its experts, as in PEFT), names such as
      `("q", "v")` matched at the end of addresses, or one regular expression
      that must match whole addresses (`layers/[0-3]/attention/.*`).
    exclude: regular expressions for the end of addresses that stay as they
      are.
    rank_pattern, alpha_pattern: regular expressions for the end of addresses
      -> another rank or alpha; no two may match one address.
    look: measures what the method's start needs, see `research.lora.init_stats`.
  """

  method: Method = LoRA()
  targets: str | Sequence[str] = ALL_LINEAR
  exclude: Sequence[str] = ()
  rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
  alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
  look: InitStats | None = None

  def __call__(self, params: Params, key: PRNGKey) -> dict[str, Any]:
    """Returns `params` with fresh adapters.

    Raises:
      UserError: a target or a pattern matches nothing, or two patterns match
        the same weight.
    """
    methods, seen = self.methods(params), {}
    if self.look is not None:
      seen = self.look(params, list(methods), jax.random.fold_in(key, 1))

    def make(paths, method, w):
      return fresh(key, paths, method, w, seen)

    return wrap(params, methods, make)

  def of(self, loaded: Any) -> "Adapt":
    """Returns itself, looking at `loaded.model` where it has to look."""
    if not hasattr(self.look, "of"):
      return self
    return dataclasses.replace(self, look=self.look.of(loaded))

  def methods(self, params: Params) -> dict[str, Method]:
    """Returns what is adapted, and how, by address."""
    chosen = self._chosen([*matrices(params), *experts(params)])
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
        self.method.at(path, sizes),
        rank=ranks.get(path, self.method.rank),
        alpha=alphas.get(path, self.method.alpha),
      )
      for path in chosen
    }

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


def fresh(
  key: PRNGKey,
  paths: Sequence[str],
  method: Method,
  w: Any,
  seen: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (trained, fixed) of new adapters, stacked; see `wrap.Make`.

  Args:
    key: shared by all; each matrix folds its own address in.
    paths: addresses.
    method: of all of them.
    w: their weights, stacked.
    seen: what was measured, by address; may lack any.
  """
  lead = tuple(w.shape[:-2])
  names = list(paths)
  if len(lead) > 1:
    names = [f"{p}/{e}" for p in paths for e in range(lead[1])]
    w = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), w)
  ids = np.array([zlib.crc32(name.encode()) for name in names], np.uint32)
  measured = None
  if seen:
    rows = [seen[path] for path in paths]
    measured = jax.tree.map(_stacked, *rows)
    if len(lead) > 1:
      measured = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), measured)
  place = Place(*w.shape[-2:], embedding=paths[0] == EMBEDDING)
  arrays = _started(key, ids, w, measured, method, place)
  return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), arrays)


def _stacked(*rows):
  # Not by JAX, which would compile a program for each shape; but a plan, which
  # wants shapes alone, traces.
  traced = any(isinstance(x, jax.core.Tracer) for x in rows)
  return (jnp if traced else np).stack(rows)


@functools.partial(jax.jit, static_argnames=("method", "place"))
def _started(key, ids, w, seen, method, place):
  # One program for all layers; eagerly each shape would compile many. One
  # matrix at a time, so that a start that decomposes it holds one at a time.
  def one(x):
    i, w, seen = x
    return method.start(jax.random.fold_in(key, i), place, w, seen)

  return jax.lax.map(one, (ids, w, seen))


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
