"""Advice: changes of a run that fit its devices, and which is fastest.

Meshes and a frozen base in 4 bits are tried one after the other. For each, a
ladder of savings is climbed: the backward pass recomputes nothing, activations
or whole layers, then microbatches are accumulated. Every rung takes less memory
and more time, so that the first that fits is the one to take. Arguments' bytes
are known without a compilation, so that what cannot fit is left out. What fits
is ranked by the least seconds of a step, then by memory. All but packed weights
compute the same updates. No flags, no gin; `experiments.plan --advise` is the
command.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from experiments.core import cli
from experiments.core.experiment import Experiment
from experiments.planning import abstract_step, plan_training
from research import sharding, tables
from research.planning.chips import Topology
from research.planning.text import format_bytes
from research.quant.quantize import Cast, Quantize
from research.typing import UserError

REMATS = ("none", "names", "layer")
"""What the backward pass recomputes: nothing, activations, whole layers."""

ACCUMULATE = (1, 2, 4, 8, 16, 32, 64)
"""Microbatches of a step."""

TENSOR = (1, 2, 4, 8)
"""Devices that share heads; what they leave shares weights (fsdp)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
  """A change of a run.

  Attributes:
    setting: how a run file or `--set` says it.
    apply: experiment -> changed experiment.
  """

  setting: str
  apply: Callable[[Experiment], Experiment]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
  """A run with some changes, and what planning found.

  Attributes:
    changes: none for the run as it is.
    found: the result of `plan_training.plan`; None if it was not compiled.
  """

  changes: tuple[Change, ...]
  found: dict[str, Any] | None = None

  @property
  def fits(self) -> bool:
    """Whether the compiler says that it fits."""
    return bool(self.found and self.found.get("fits"))

  @property
  def settings(self) -> list[str]:
    """How its changes are said; none for the run as it is."""
    return [change.setting for change in self.changes]


def advise(
  experiment: Experiment, topology: Topology, compiles: int = 8
) -> dict[str, Any]:
  """Returns trials of a run, those that fit first, the fastest of them first.

  Raises:
    UserError: an error of the run as it is, before its first step.
  """
  search = _Search(experiment, topology, compiles)
  for some in variants(experiment, len(topology.devices)):
    search.climb(some)
  best = ranked(search.tried)
  cli.say(describe(best, search.left_out))
  return {
    "topology": topology.name,
    "fits_as_it_is": search.tried[0].fits,
    "tried": len(best),
    "left_out": search.left_out,
    "ranked": [as_json(trial) for trial in best],
  }


def variants(
  experiment: Experiment, devices: int
) -> Iterator[tuple[Change, ...]]:
  """Yields what is tried with each rung of the ladder; first the run itself."""
  meshes = [(), *((mesh,) for mesh in _meshes(experiment, devices))]
  yield from meshes
  for packed in _packed(experiment):
    yield from ((packed, *mesh) for mesh in meshes)


def ladder(experiment: Experiment) -> list[tuple[Change, ...]]:
  """Returns rungs that take less and less memory, and more and more time."""
  remat = getattr(experiment.model, "remat", None)
  own, rows = experiment.plan.accumulate, _rows(experiment)
  counts = [n for n in ACCUMULATE if n == own or (rows and rows % n == 0)]
  least = min(own, *counts) if counts else own
  pairs = [(x, least) for x in (REMATS if remat else ())]
  last = REMATS[-1] if remat else None
  pairs += [(last, n) for n in sorted({own, *counts}) if (last, n) not in pairs]
  return [
    (
      *((_remat(x),) if x != remat else ()),
      *((_accumulate(n),) if n != own else ()),
    )
    for x, n in pairs
  ]


class _Search:
  """Trials so far, and how many may follow."""

  def __init__(self, experiment: Experiment, topology: Topology, compiles: int):
    self._experiment, self._topology = experiment, topology
    self._compiles = compiles
    self._rungs = ladder(experiment)
    self.tried: list[Trial] = []
    self.left_out = 0

  def climb(self, some: tuple[Change, ...]) -> None:
    """Tries rungs with some changes until the first that fits is known."""
    # From the run's own rung up; where that fits at once, down instead.
    own = next((i for i, x in enumerate(self._rungs) if not x), None)
    if own is None and not some:  # the run as it is, which is no rung
      self._fits(())
    start = own if own is not None else 0
    at, fits = start, self._fits((*some, *self._rungs[start]))
    step = -1 if fits else 1
    while fits is not None and 0 <= at + step < len(self._rungs):
      if fits == (step > 0):
        return
      at += step
      fits = self._fits((*some, *self._rungs[at]))

  def _fits(self, changes: tuple[Change, ...]) -> bool | None:
    """Returns whether a trial fits; None if it is no use to go on."""
    first = not self.tried and not self.left_out
    done = sum(trial.found is not None for trial in self.tried)
    if done >= self._compiles:
      self.left_out += 1
      return None
    trial = _try(self._experiment, self._topology, changes, first)
    if trial is None:
      self.left_out += 1
      return None
    self.tried.append(trial)
    return trial.fits


def ranked(trials: Sequence[Trial]) -> list[Trial]:
  """Returns compiled trials: fitting ones by seconds, then others by bytes."""
  done = [t for t in trials if t.found is not None]

  def key(trial: Trial):
    found = trial.found or {}
    total = found.get("total_bytes") or math.inf
    seconds = found.get("seconds")
    if not trial.fits:
      return 1, total, 0.0, len(trial.changes)
    return (
      0,
      math.inf if seconds is None else seconds,
      total,
      len(trial.changes),
    )

  return sorted(done, key=key)


def as_json(trial: Trial) -> dict[str, Any]:
  """Returns a trial as plain values."""
  found = trial.found or {}
  names = ("total_bytes", "limit_bytes", "seconds", "tokens_per_s", "mfu_bound")
  return {
    "set": trial.settings,
    "fits": trial.fits,
    **{name: found.get(name) for name in names},
  }


def describe(trials: Sequence[Trial], left_out: int) -> str:
  """Returns ranked trials as a table."""
  rows = [("", "a device", "s a step", "tokens/s", "change")]
  for trial in trials:
    found = trial.found or {}
    total = found.get("total_bytes")
    seconds, speed = found.get("seconds"), found.get("tokens_per_s")
    rows.append(
      (
        "fits" if trial.fits else "no",
        "" if total is None else format_bytes(total),
        "" if seconds is None else f"{seconds:.3g}",
        "" if speed is None else f"{speed:,.0f}",
        ", ".join(trial.settings) or "none",
      )
    )
  lines = list(tables.aligned(rows, right=(1, 2, 3)))
  if left_out:
    lines.append(f"{left_out} more were not compiled")
  if not any(trial.fits for trial in trials):
    lines.append("nothing that was tried fits: take more devices")
  return "\n".join(lines)


def _try(experiment, topology, changes, first: bool) -> Trial | None:
  """Returns a trial; None if its arguments take all memory, or it is no run."""
  settings = ", ".join(change.setting for change in changes) or "as it is"
  changed = experiment
  for change in changes:
    changed = change.apply(changed)
  try:
    abstract = abstract_step.build(changed, topology.devices)
    _check_microbatches(changed, abstract.mesh)
    arguments = (abstract.state, abstract.batch)
    where = jax.tree.map(lambda x: x.sharding, arguments)
    needed = sharding.bytes_per_device(arguments, where)
    if needed >= topology.chip.memory and not first:
      cli.say(f"{settings}: {format_bytes(needed)} of arguments, left out")
      return None
    cli.say(f"--- {settings}")
    found = plan_training.plan(changed, topology, quiet=True)
  except UserError as error:
    if first:
      raise
    cli.say(f"{settings}: {str(error).splitlines()[0]}, left out")
    return None
  cli.say(_brief(found))
  return Trial(changes=changes, found=found)


def _check_microbatches(experiment: Experiment, mesh: Any) -> None:
  """Raises UserError where devices have no row of each microbatch."""
  rows, count = _rows(experiment), experiment.plan.accumulate
  shards = math.prod(mesh.shape[n] for n in ("data", "fsdp", "expert"))
  if rows is not None and rows % (count * shards):
    raise UserError(
      f"{rows} rows are not {count} microbatches of rows for {shards} devices"
    )


def _rows(experiment: Experiment) -> int | None:
  return getattr(experiment.data, "batch_size", None)


def _brief(found: dict[str, Any]) -> str:
  total, seconds = found.get("total_bytes"), found.get("seconds")
  return " ".join(
    [
      "fits:" if found.get("fits") else "does not fit:",
      "" if total is None else f"{format_bytes(total)} a device,",
      "" if seconds is None else f"at least {seconds:.3g} s a step",
    ]
  ).strip(" ,")


def _remat(policy: str) -> Change:
  def apply(e):
    return dataclasses.replace(
      e, model=dataclasses.replace(e.model, remat=policy)
    )

  return Change(setting=f"REMAT={policy}", apply=apply)


def _accumulate(count: int) -> Change:
  def apply(e):
    plan = dataclasses.replace(e.plan, accumulate=count)
    return dataclasses.replace(e, plan=plan)

  return Change(setting=f"loop.TrainConfig.accumulate={count}", apply=apply)


def _meshes(experiment: Experiment, devices: int) -> Iterator[Change]:
  """Yields meshes over all devices, other than the run's own."""
  own = experiment.mesh
  for tensor in TENSOR:
    if devices == 1 or devices % tensor:
      continue
    sizes = dict.fromkeys(sharding.MESH_AXES, 1)
    sizes |= {"fsdp": devices // tensor, "tensor": tensor}
    mesh = dataclasses.replace(own, **sizes)
    whole = dataclasses.replace(own, **(sizes | {"fsdp": -1}))
    if own in (mesh, whole):
      continue
    yield Change(
      setting=f"DATA=1 FSDP={devices // tensor} TENSOR={tensor}",
      apply=lambda e, mesh=mesh: dataclasses.replace(e, mesh=mesh),
    )


def _packed(experiment: Experiment) -> Iterator[Change]:
  """Yields a frozen base in NF4, for runs that train adapters alone."""
  kinds = [type(t) for t in experiment.transforms]
  if "trained/" not in experiment.trainable or Quantize in kinds:
    return

  def apply(e):
    rest = [t for t in e.transforms if not isinstance(t, Cast)]
    return dataclasses.replace(e, transforms=(Cast(), Quantize(), *rest))

  yield Change(
    setting="Experiment.transforms=(Cast, Quantize, ..)",
    apply=apply,
  )
