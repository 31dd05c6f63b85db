"""What starts that look at data are given: `Adapt.look`, as values.

Each reads a few batches through an objective, with taps on the matrices that
will be adapted (`research.taps`), so packed bases and stacked experts are
looked at as any other.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from research import sharding, taps
from research.data.pipeline import Data
from research.lora import wrap
from research.taps.statistics import (
  Covariance,
  Gradient,
  SampleCovariance,
  Statistic,
)
from research.training.objectives.objective import NextToken, Objective
from research.typing import Params, PRNGKey, UserError

InputStats = dict[str, dict[str, Any]]
"""By address: a statistic's arrays."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationData:
  """Data, and the loss that it is read through.

  Attributes:
    data: the first batches of its training order are read.
    batches: how many.
    objective: leads from parameters to activations; without dropout.
    counts: field of a batch that says how much each token's activations
      count; None for all alike.
    tokenizer: the data's; like the objective's model it is filled in by `of`.
  """

  data: Data
  batches: int = 8
  objective: Objective = NextToken()
  counts: str | None = "weights"
  tokenizer: Any = None

  def __post_init__(self):
    if self.batches < 1:
      raise UserError(
        f"Reading.batches: found {self.batches}, expected at least 1."
      )

  def of(self, loaded: Any) -> "Reading":
    """Returns the reading through `loaded.model`."""
    objective = dataclasses.replace(self.objective, model=loaded.model)
    return dataclasses.replace(
      self, objective=objective, tokenizer=loaded.tokenizer
    )

  def sums(
    self, params: Params, addresses: Sequence[str], statistic: Statistic
  ) -> InputStats:
    """Returns the statistic over all batches, by address.

    Gradients are those of the batches' mean losses, added up. All arrays are
    whole on the host. Where parameters are traced, by a plan that wants shapes
    alone, no data are read and the sums are zeros.

    Raises:
      UserError: no model yet, an embedding, or a value that is not finite.
    """
    fixed = [a for a in addresses if "/" not in a]
    if fixed:
      raise UserError(
        f"Adapt.look: {fixed[0]} is not looked at, layers alone are.\n"
        f"Leave it out: Adapt.exclude = ({fixed[0]!r},)."
      )
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(params)):
      return _zeros(params, addresses, statistic)
    if getattr(self.objective, "model", None) is None:
      raise UserError("Reading: has no model; `of` gives it one.")
    step = jax.jit(
      functools.partial(self._step, frozenset(addresses), statistic)
    )
    join = jax.jit(lambda a, b: {k: statistic.join(a[k], b[k]) for k in a})
    total = None
    stream = iter(self.data.training(self.tokenizer))
    for batch in itertools.islice(stream, self.batches):
      found = step(params, batch)
      total = found if total is None else join(total, found)
    found = taps.by_address(params, jax.tree.map(np.asarray, total))
    found = {address: found[address] for address in addresses}
    for address, arrays in found.items():
      if not all(np.isfinite(x).all() for x in arrays.values()):
        raise UserError(f"Adapt.look: what {address} sees is not finite.")
    return found

  def _step(self, addresses, statistic, params, batch):
    def loss(params):
      total, weight, _ = self.objective(params, batch, None)
      return total / jnp.maximum(weight, 1)

    counts = None if self.counts is None else batch[self.counts]
    found = taps.collect(loss, params, statistic, counts, addresses)
    if not sharding.is_cut():
      return found
    whole = functools.partial(
      jax.lax.with_sharding_constraint, shardings=PartitionSpec()
    )
    return jax.tree.map(whole, found)


def _zeros(params, addresses, statistic) -> InputStats:
  sizes = {k: ((), *size) for k, size in wrap.matrices(params).items()}
  sizes |= {k: (s[:1], *s[1:]) for k, s in wrap.experts(params).items()}
  return {
    address: {
      name: jnp.zeros((*sizes[address][0], *shape))
      for name, shape in statistic.shapes(*sizes[address][1:]).items()
    }
    for address in addresses
  }


def _each(f: Callable[[Any], Any], seen: InputStats) -> dict[str, Any]:
  """Returns `f` of each matrix's sums; experts are mapped over."""
  f, out = jax.jit(f), {}
  # Matrices beside each other see the same: `f` is computed once.
  known: dict[Any, Any] = {}
  for address, arrays in seen.items():
    many = max(x.ndim for x in arrays.values()) > 2  # [E, in, in]
    name = _name(arrays)
    if name not in known:
      known[name] = jax.lax.map(f, arrays) if many else f(arrays)
    out[address] = known[name]
  return out


def _name(arrays: Mapping[str, Any]) -> Any:
  if any(isinstance(x, jax.core.Tracer) for x in arrays.values()):
    return object()
  return tuple(x.tobytes() for x in arrays.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Covariances:
  """CorDA's: of the inputs, scaled by sample, averaged over samples."""

  reading: CalibrationData

  def of(self, loaded: Any) -> "Covariances":
    """Returns the look at `loaded.model`."""
    return dataclasses.replace(self, reading=self.reading.of(loaded))

  def __call__(
    self, params: Params, addresses: Sequence[str], key: PRNGKey
  ) -> dict[str, Any]:
    """Returns `[in, in]` by address."""
    seen = self.reading.sums(params, addresses, SampleCovariance())
    return _each(lambda one: one["xx"] / jnp.maximum(one["n"], 1), seen)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradients:
  """LoRA-GA's: of the mean loss by each matrix, averaged over batches."""

  reading: CalibrationData

  def of(self, loaded: Any) -> "Gradients":
    """Returns the look at `loaded.model`."""
    return dataclasses.replace(self, reading=self.reading.of(loaded))

  def __call__(
    self, params: Params, addresses: Sequence[str], key: PRNGKey
  ) -> dict[str, Any]:
    """Returns `[in, out]` by address."""
    seen = self.reading.sums(params, addresses, Gradient())
    n = self.reading.batches
    return _each(lambda one: one["g"] / n, seen)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputPCA:
  """EVA's: the inputs' principal directions, by falling variance.

  Exact, where its authors' incremental analysis stops at similar ones; of
  centred inputs, as theirs are.

  Attributes:
    count: how many of each matrix; at least the method's rank.
  """

  reading: CalibrationData
  count: int = 16

  def of(self, loaded: Any) -> "Directions":
    """Returns the look at `loaded.model`."""
    return dataclasses.replace(self, reading=self.reading.of(loaded))

  def __call__(
    self, params: Params, addresses: Sequence[str], key: PRNGKey
  ) -> dict[str, Any]:
    """Returns `[count, in]` by address."""
    found = self.explained(params, addresses)
    return {address: directions for address, (directions, _) in found.items()}

  def explained(
    self, params: Params, addresses: Sequence[str]
  ) -> dict[str, tuple[Any, Any]]:
    """Returns (directions `[count, in]`, their shares of the variance).

    Raises:
      UserError: a matrix has fewer inputs.
    """
    seen = self.reading.sums(params, addresses, Covariance())
    for address, arrays in seen.items():
      if arrays["x"].shape[-1] < self.count:
        raise UserError(
          f"Directions.count: found {self.count}, expected at most the"
          f" {arrays['x'].shape[-1]} inputs of {address}."
        )
    return _each(functools.partial(_principal, self.count), seen)


def _principal(count: int, one: Mapping[str, Any]) -> tuple[Any, Any]:
  n = jnp.maximum(one["n"], 1)
  mean = one["x"] / n
  covariance = one["xx"] / n - jnp.outer(mean, mean)
  values, vectors = jnp.linalg.eigh(covariance)
  shares = jnp.maximum(values, 0) / jnp.maximum(jnp.trace(covariance), 1e-30)
  return vectors.T[::-1][:count], shares[::-1][:count]
