"""Operations that make an adapter of others, written in PEFT's format."""

import dataclasses
from typing import Any

from experiments.adapting.operation import WritesAdapter
from experiments.core.choices import Choice, option
from research.errors import UserError
from research.lora.merge.combinations import COMBINATIONS, Elect


@dataclasses.dataclass(frozen=True, kw_only=True)
class Combine(WritesAdapter):
  """A weighted sum of adapters over one base, as PEFT's add_weighted_adapter.
  cat is exact, and of one adapter a copy of it.

  Attributes:
    how: a key of `COMBINATIONS`.
  """

  how: str
  weight: tuple[float, ...] = option(
    (), "The weight of each adapter in turn; 1 each if left out."
  )
  rank: int | None = option(
    None, "Rank of the sum; by default the largest of the adapters'."
  )
  density: float = option(1.0, "Share of the entries that is kept.")
  elect: Elect = option(
    "total",
    "How a sign is elected: by the sum of the entries, or by their number.",
  )
  seed: int = option(0, "Seed of the entries that are dropped at random.")

  def make(self) -> tuple[Any, Any, dict[str, Any]]:
    import jax

    from research.lora import lora_factors, wrap
    from research.lora.merge import arithmetic

    found = [self.open(name) for name in self.from_]
    self._check_bases(found)
    summed = arithmetic.add_weighted(
      [lora_factors.factors(source.params()) for source in found],
      self.weight or [1.0] * len(found),
      self.how,
      rank=self.rank,
      density=self.density,
      elect=self.elect,
      key=jax.random.key(self.seed),
    )
    params = lora_factors.wrap_factors(wrap.disable(found[0].params()), summed)
    rows = {path: dict(rank=f.rank) for path, f in summed.items()}
    return found[0], params, self.summary(rows, **_ranks(rows))

  def _check_bases(self, found: list[Any]) -> None:
    """Raises UserError unless all adapters are of one base, and no more."""
    from research.interop import convert, parts
    from research.lora import wrap

    first = found[0].base.origin["path"]
    for name, source in zip(self.from_, found, strict=True):
      if source.base.origin["path"] != first:
        raise UserError(
          f"--from={name}: its base is {source.base.origin['path']}, expected "
          f"{first} as the first adapter's"
        )
      under = parts.from_params(wrap.disable(source.params()))
      if len(found) > 1 and convert.changed_addresses(under, source.base):
        raise UserError(
          f"--from={name}: contains full weights of the base"
          " (modules_to_save), which cannot be summed; expected low-rank"
          " adapters alone"
        )


def _choice(name: str) -> Choice:
  takes = {"seed" if x == "key" else x for x in COMBINATIONS[name].options}
  unused = {"rank", "density", "elect", "seed"} - takes
  return Choice(Combine, fixed={"how": name}, unused=unused)


SUMS = {name: _choice(name) for name in COMBINATIONS}
"""PEFT's name -> a sum, with the options that have an effect on it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToLora(WritesAdapter):
  """An adapter of any method as plain LoRA, by --rank or --energy."""

  rank: int | None = option(None, "Rank to keep, instead of --energy.")
  energy: float | None = option(
    None, "Share of an update's squared norm to keep, instead of --rank."
  )

  def __post_init__(self) -> None:
    if (self.rank is None) == (self.energy is None):
      raise UserError("--op=lora: expected either --rank or --energy")

  def make(self) -> tuple[Any, Any, dict[str, Any]]:
    from research.lora import to_lora

    size = (
      to_lora.Energy(self.energy)
      if self.rank is None
      else to_lora.Rank(self.rank)
    )
    source = self.open(self.only)
    params, fits = to_lora.to_lora(source.params(), size)
    rows = {path: dataclasses.asdict(fit) for path, fit in fits.items()}
    worst = max(fits, key=lambda path: fits[path].error)
    errors = dict(error=fits[worst].error, worst=worst)
    return source, params, self.summary(rows, **errors, **_ranks(rows))


def _ranks(rows: dict[str, dict[str, Any]]) -> dict[str, int]:
  """Returns the smallest and largest rank, where there are any."""
  ranks = [row["rank"] for row in rows.values()]
  return dict(min_rank=min(ranks), max_rank=max(ranks)) if ranks else {}
