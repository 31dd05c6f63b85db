"""A model in few bits, in many ways: what is lost, and where.

A `Table` is a model, a text that it did not see, and rows: ways to pack it, an
arm each. A row's number of bits is what its packed matrices take, everything
counted; those of 4.25 to 4.5 and of 3.25 to 3.5 bits are two bands whose rows
compete. Errors are over texts.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from experiments.core.experiment import NeedsModel, Source
from experiments.quantizing import base_comparison
from experiments.studies import protocol
from experiments.studies.protocol import Lines, Rows, Verdict
from experiments.studies.quant import bands, pictures
from research.quant.algorithms.calibrate import Calibration
from research.quant.reports import compare, report_errors
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One way to keep the model.

  Attributes:
    name: of the row.
    transforms: of the weights, in order, as in `experiment.Experiment`; errors
      by matrix are those of the last one.
    group: what it belongs to in pictures.
    errors: whether errors by matrix are measured: the last transform leaves
      each matrix in its place and its inputs alone.
    seed: of the transforms' random numbers.
  """

  name: str
  transforms: Sequence[Any] = ()
  group: str = "rounding"
  errors: bool = True
  seed: int = 0

  @property
  def calibrated_on(self) -> int | None:
    """Returns the tokens that its transforms read, where they say so."""
    read = [getattr(t, "calibration", None) for t in self.transforms]
    return sum(r.windows * r.length for r in read if r is not None) or None


@runtime_checkable
class Task(Protocol):
  """Questions whose answers are known."""

  name: str

  def right(self, loaded: Any) -> list[bool]:
    """Returns which questions a model answers as it should."""


class Shared(NamedTuple):
  """The model before, and what it says of the text."""

  loaded: Any
  base: compare.BaseOutputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(protocol.Study):
  """Ways to pack one model, beside each other.

  Attributes:
    model: what all rows start from.
    rows: by families.
    text: windows that are read; the model and its calibration have not.
    rules: rows by name -> verdicts.
    probed: windows that errors by matrix are measured on.
    tasks: with answers, that rows are evaluated on, by name.
  """

  model: Source
  rows: Sequence[Sequence[Row]]
  text: Calibration
  rules: Sequence[Callable[[Rows], list[Verdict]]] = ()
  probed: int = 1
  tasks: Sequence[Task] = ()

  def __post_init__(self):
    protocol.distinct(self.arms, "Table.rows")

  @property
  def flat(self) -> list[Row]:
    """All rows of all families."""
    return [row for family in self.rows for row in family]

  @property
  def arms(self) -> list[str]:
    """Names of all rows."""
    return [row.name for row in self.flat]

  def _row(self, name: str) -> Row:
    (found,) = (row for row in self.flat if row.name == name)
    return found

  def settings(self, arm: str) -> str:
    """Returns the model, the text and one row: others may come and go."""
    row = protocol.describe(self._row(arm), "group")
    return f"{row}, {protocol.describe(self, 'rows', 'rules')}"

  def prepare(self, workdir: pathlib.Path) -> Shared:
    """Returns the model, and what it says of the text."""
    del workdir
    loaded = self.model.load()
    windows = self.text.read(loaded.tokenizer)
    base = compare.base_outputs(
      loaded.model, loaded.params, windows.tokens, self.text.batch
    )
    return Shared(loaded, base)

  def run(self, arm: str, before: Rows, shared: Shared) -> protocol.Row:
    """Returns what `measure` does of a row."""
    del before
    return measure(self, self._row(arm), *shared)

  def summary(self, row: protocol.Row) -> str:
    """Returns bits, and what is lost."""
    bits = row["bits_per_weight"]
    return (
      f"{bits or 32:.3f} bits, perplexity"
      f" {row['perplexity']:.3f} (base {row['base_perplexity']:.3f}), KL"
      f" {row['kl']:.4f} ± {row['kl_se']:.4f}, same top {row['same_top']:.1%}"
    )

  def table(self, rows: Rows) -> Lines:
    """Returns a line a row, most bits first; see the function `table`."""
    return table(rows)

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what the rules say."""
    return [verdict for rule in self.rules for verdict in rule(rows)]

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves pareto.png: divergence against bits."""
    pictures.pareto(rows, folder / "pareto.png", title)


def measure(
  table: Table, row: Row, loaded: Any, base: compare.BaseOutputs
) -> protocol.Row:
  """Returns what is known of a row, as plain values.

  What its format cannot hold is a row that says so.
  """
  start = time.perf_counter()
  out: dict[str, Any] = {"row": row.name, "group": row.group}
  out["calibrated_on"] = row.calibrated_on
  try:
    before, params = _transformed(row, loaded)
  except UserError as error:
    return out | {"failed": str(error)}
  jax.block_until_ready(params)
  out["seconds_to_pack"] = time.perf_counter() - start
  out |= dataclasses.asdict(report_errors.sizes(params))
  out |= dataclasses.asdict(compare.compare(base, loaded.model, params))
  if table.tasks:
    now = dataclasses.replace(loaded, params=params)
    out["right"] = {task.name: task.right(now) for task in table.tasks}
  if row.errors and out["packed_weights"]:
    tokens = base.tokens[: table.probed]
    found = report_errors.errors(loaded.model, before, params, tokens)
    out |= {"matrices": found, **base_comparison.overall(found)}
  return out


def _transformed(row: Row, loaded: Any) -> tuple[Any, Any]:
  """Returns the weights before and after the last transform."""
  before = params = loaded.params
  key = jax.random.key(row.seed)
  for i, transform in enumerate(row.transforms):
    if isinstance(transform, NeedsModel):
      transform = transform.with_model(loaded)
    before, params = params, transform(params, jax.random.fold_in(key, i))
  return before, params


def table(rows: Rows) -> Lines:
  """Returns a line a row, fewest bits first; bands are marked."""
  good = [row for row in rows.values() if "failed" not in row]
  if not good:
    return []
  lines = [
    {
      "row": "base",
      "perplexity": good[0]["base_perplexity"],
      "accuracy %": 100 * good[0]["base_accuracy"],
    }
  ]
  for row in sorted(good, key=lambda r: -(r["bits_per_weight"] or 99)):
    within = bands.band(row["bits_per_weight"])
    lines.append(
      {
        "row": row["row"],
        "bits": row["bits_per_weight"],
        "band": within and f"{within[0]}-{within[1]}",
        "perplexity": row["perplexity"],
        "KL": row["kl"],
        "± SE": row["kl_se"],
        "KL 99.9%": row["kl_999"],
        "same top %": 100 * row["same_top"],
        "rms Δp %": 100 * row["rms_delta_p"],
        "accuracy %": 100 * row["accuracy"],
        "packed MB": row["packed_bytes"] / 1e6,
        "whole MB": row["nbytes"] / 1e6,
        "output error": row.get("output_error"),
        "worst": row.get("worst_error"),
        "where": row.get("worst"),
      }
    )
  return lines
