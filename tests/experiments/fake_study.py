"""A study without a model: tosses of coins, for tests of the command."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.core import stats
from experiments.studies.protocol import Lines, Row, Rows, Study, Verdict

RAN: list[str] = []
"""Arms, in the order of running; `prepared` among them."""

BROKEN: dict[str, BaseException] = {}
"""What arms raise."""


def mostly(rows: Rows) -> list[Verdict]:
  """Returns one verdict of each state, of tosses that differ by seed."""
  share = stats.mean([r["heads"] for r in rows.values() if "heads" in r])
  return [
    Verdict("heads come up", f"{share}", stats.above(share)),
    Verdict("tails never do", f"{share}", stats.above(share, 1.0)),
    Verdict("the coin is bent", f"{share}", stats.above(share, share.value)),
  ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coins(Study):
  """Tosses, by seed, and a coin that cannot be tossed.

  Attributes:
    tosses: of each seed.
    rule: rows -> verdicts.
    stuck: whether there is an arm that fails.
  """

  tosses: int = 10
  seeds: int = 3
  rule: Callable[[Rows], list[Verdict]] = mostly
  stuck: bool = False

  @property
  def arms(self) -> list[str]:
    """One for each seed."""
    found = [f"seed {s}" for s in range(self.seeds)]
    return found + (["stuck"] if self.stuck else [])

  def settings(self, arm: str) -> str:
    """Returns how often it is tossed."""
    return f"{arm}: {self.tosses}"

  def prepare(self, workdir: pathlib.Path) -> Any:
    """Returns the folder."""
    RAN.append("prepared")
    return workdir

  def run(self, arm: str, before: Rows, shared: Any) -> Row:
    """Tosses."""
    assert shared.is_dir()
    RAN.append(arm)
    if arm in BROKEN:
      raise BROKEN[arm]
    if arm == "stuck":
      return {"failed": "the coin is stuck"}
    heads = np.random.default_rng(len(before)).random(self.tosses) < 0.5
    return {"heads": np.mean(heads), "before": list(before)}

  def table(self, rows: Rows) -> Lines:
    """Returns a line an arm, and their mean."""
    lines = [{"arm": a, "heads": r.get("heads")} for a, r in rows.items()]
    share = stats.mean([r["heads"] for r in rows.values() if "heads" in r])
    return [*lines, {"arm": "mean", "heads": share}]

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what the rule says."""
    return self.rule(rows)

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves coins.txt."""
    (folder / "coins.txt").write_text(f"{title}: {len(rows)}")
