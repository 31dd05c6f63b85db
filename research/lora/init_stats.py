"""Calibration statistics for data-dependent LoRA initialisation.

Values of `Adapt.init_stats`: input covariances (CorDA), gradients (LoRA-GA) and
input principal components (EVA). Each runs an objective on a few batches, with
taps (`research.taps`) on the matrices to adapt; packed bases and stacked
experts work like any other weight.
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
from research.ranges import PositiveInt, Ranged
from research.taps.statistics import (
  Covariance,
  Gradient,
  SampleCovariance,
  Statistic,
)
from research.training.objectives.objective import NextToken, Objective
from research.typing import Params, PRNGKey, UserError

InputStats = dict[str, dict[str, Any]]
"""Address -> name -> array of a statistic."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationData(Ranged):
  """Calibration batches and the objective that runs the model on them.

  Attributes:
    data: the source; the first batches of its training order are read.
    objective: the loss, evaluated without dropout.
    counts: field of a batch with each token's weight in the statistics; None
      weighs all tokens equally.
    tokenizer: the data's tokenizer; `with_model` sets it, and the objective's
      model.
  """

  data: Data
  batches: PositiveInt = 8
  objective: Objective = NextToken()
  counts: str | None = "weights"
  tokenizer: Any = None

  def with_model(self, loaded: Any) -> "CalibrationData":
    objective = dataclasses.replace(self.objective, model=loaded.model)
    return dataclasses.replace(
      self, objective=objective, tokenizer=loaded.tokenizer
    )

  def sums(
    self, params: Params, addresses: Sequence[str], statistic: Statistic
  ) -> InputStats:
    """Returns the statistic summed over all batches, by address.

    Gradients are those of each batch's mean loss, summed. All arrays are
    unsharded NumPy arrays. For traced parameters (planning under `eval_shape`)
    no data are read and the sums are zeros.

    Raises:
      UserError: no model is set, an address is an embedding or the head, or a
        value is not finite.
    """
    fixed = [a for a in addresses if "/" not in a]
    if fixed:
      raise UserError(
        f"Adapt.init_stats: found target {fixed[0]}, but only matrices of "
        f"layers are measured.\nLeave it out: Adapt.exclude = ({fixed[0]!r},)."
      )
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(params)):
      return _zeros(params, addresses, statistic)
    if getattr(self.objective, "model", None) is None:
      raise UserError("CalibrationData: has no model; `with_model` sets it.")
    step = jax.jit(
      functools.partial(self._step, frozenset(addresses), statistic)
    )
    join = jax.jit(lambda a, b: {k: statistic.join(a[k], b[k]) for k in a})
    total = None
    stream = iter(self.data.training(self.tokenizer))
    for batch in itertools.islice(stream, self.batches):
      stats = step(params, batch)
      total = stats if total is None else join(total, stats)
    stats = taps.by_address(params, jax.tree.map(np.asarray, total))
    stats = {address: stats[address] for address in addresses}
    for address, arrays in stats.items():
      if not all(np.isfinite(x).all() for x in arrays.values()):
        raise UserError(
          f"Adapt.init_stats: the statistics of {address} are not finite."
        )
    return stats

  def _step(self, addresses, statistic, params, batch):
    def loss(params):
      total, weight, _ = self.objective(params, batch, None)
      return total / jnp.maximum(weight, 1)

    counts = None if self.counts is None else batch[self.counts]
    stats = taps.collect(loss, params, statistic, counts, addresses)
    if not sharding.is_cut():
      return stats
    replicate = functools.partial(
      jax.lax.with_sharding_constraint, shardings=PartitionSpec()
    )
    return jax.tree.map(replicate, stats)


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


def _per_matrix(f: Callable[[Any], Any], stats: InputStats) -> dict[str, Any]:
  """Returns `f` of each matrix's sums; maps over stacked experts."""
  f, out = jax.jit(f), {}
  # Matrices with the same inputs (q, k and v) share one result of `f`.
  known: dict[Any, Any] = {}
  for address, arrays in stats.items():
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
class _Measured:
  """Base of statistics that a model's run on data measures."""

  calibration: CalibrationData

  def with_model(self, loaded: Any) -> Any:
    return dataclasses.replace(
      self, calibration=self.calibration.with_model(loaded)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Covariances(_Measured):
  """CorDA's input covariances, normalised per sample, averaged over samples."""

  def __call__(
    self, params: Params, addresses: Sequence[str], key: PRNGKey
  ) -> dict[str, Any]:
    """Returns covariances `[in, in]` by address; does not use `key`."""
    stats = self.calibration.sums(params, addresses, SampleCovariance())
    return _per_matrix(
      lambda sums: sums["xx"] / jnp.maximum(sums["n"], 1), stats
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradients(_Measured):
  """LoRA-GA's gradients of the mean loss, averaged over batches."""

  def __call__(
    self, params: Params, addresses: Sequence[str], key: PRNGKey
  ) -> dict[str, Any]:
    """Returns gradients `[in, out]` by address; does not use `key`."""
    stats = self.calibration.sums(params, addresses, Gradient())
    n = self.calibration.batches
    return _per_matrix(lambda sums: sums["g"] / n, stats)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputPCA(_Measured):
  """EVA's principal components of the inputs, by decreasing variance.

  Exact eigenvectors of the covariance of centred inputs; EVA's authors use
  incremental PCA of centred inputs and stop when its components converge.

  Attributes:
    count: components per matrix; at least the method's rank.
  """

  count: int = 16

  def __call__(
    self, params: Params, addresses: Sequence[str], key: PRNGKey
  ) -> dict[str, Any]:
    """Returns components `[count, in]` by address; does not use `key`."""
    components = self.explained(params, addresses)
    return {
      address: directions for address, (directions, _) in components.items()
    }

  def explained(
    self, params: Params, addresses: Sequence[str]
  ) -> dict[str, tuple[Any, Any]]:
    """Returns components and explained variance ratios, by address.

    Returns:
      address -> (components `[count, in]`, shares of the variance `[count]`).

    Raises:
      UserError: a matrix has fewer than `count` inputs.
    """
    stats = self.calibration.sums(params, addresses, Covariance())
    for address, arrays in stats.items():
      if arrays["x"].shape[-1] < self.count:
        raise UserError(
          f"InputPCA.count: found {self.count}, expected at most the"
          f" {arrays['x'].shape[-1]} inputs of {address}."
        )
    return _per_matrix(functools.partial(_principal, self.count), stats)


def _principal(count: int, sums: Mapping[str, Any]) -> tuple[Any, Any]:
  n = jnp.maximum(sums["n"], 1)
  mean = sums["x"] / n
  covariance = sums["xx"] / n - jnp.outer(mean, mean)
  values, vectors = jnp.linalg.eigh(covariance)
  shares = jnp.maximum(values, 0) / jnp.maximum(jnp.trace(covariance), 1e-30)
  return vectors.T[::-1][:count], shares[::-1][:count]
