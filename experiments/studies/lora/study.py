"""LoRA's studies: arms of one setup, each at its own best learning rate."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.core import cli
from experiments.studies import protocol
from experiments.studies.lora import lora_verdicts, lr_grid, pictures
from experiments.studies.lora.lr_grid import Arm, StudyData
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from research import tree
from research.typing import Params

BASE = "base.npz"


class Shared(NamedTuple):
  """What all arms start from, and its losses."""

  data: StudyData
  losses: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(lr_grid.Setup, protocol.Study):
  """Arms that learn one task from one base.

  Attributes:
    variants: how, an arm each.
    rule: rows by arm -> verdicts.
  """

  variants: Sequence[Arm]
  rule: Callable[[Rows], list[Verdict]]

  def __post_init__(self):
    protocol.distinct(self.arms, "Study.variants")

  @property
  def arms(self) -> list[str]:
    """Names of the variants."""
    return [arm.name for arm in self.variants]

  def settings(self, arm: str) -> str:
    """Returns the setup and one arm: others may come and go."""
    setup = protocol.describe(self, "variants", "rule")
    return f"{setup}, {protocol.describe(self._variant(arm))}"

  def _variant(self, name: str) -> Arm:
    (found,) = (arm for arm in self.variants if arm.name == name)
    return found

  def prepare(self, workdir: pathlib.Path) -> Shared:
    """Returns the data and the base, which is trained once."""
    data = lr_grid.study_data(self, self.base(workdir))
    return Shared(data, lr_grid.base_losses(data))

  def base(self, workdir: pathlib.Path) -> Params | None:
    """Returns the base that all arms share, from the folder; None for none."""
    if self.known is None:
      return None
    path = workdir / BASE
    names = ("model", "known", "base_steps", "base_rate")
    settings = protocol.describe({n: getattr(self, n) for n in names})
    if not path.exists():
      cli.say("training the base")
      found = dict(tree.flatten_paths(lr_grid.trained_base(self)))
      np.savez(path, **found, settings=np.array(settings))
    saved = np.load(path, allow_pickle=False)
    stored = str(saved["settings"]) if "settings" in saved else None
    protocol.check_settings(path, stored, settings)
    like = self.model.load().params
    return tree.map_paths(lambda name, _: saved[name], like)

  def run(self, arm: str, before: Rows, shared: Shared) -> Row:
    """Returns the row of `lr_grid.sweep`, and the losses before."""
    del before
    variant = self._variant(arm)
    row = lr_grid.sweep(self, variant, shared.data) | {"before": shared.losses}
    row["trained"] -= self._fixed(variant, shared.data)
    return row

  def _fixed(self, arm: Arm, data: StudyData) -> int:
    """Returns how many numbers the optimizer gets and leaves as they are.

    LoRA-FA's needs `a` to know how b should move.
    """
    if "/fixed/" not in arm.trainable:
      return 0
    params = lr_grid.adapted_params(self, arm, data, 0)
    chosen, _ = tree.partition(params, arm.trainable)
    return tree.count(tree.partition(chosen, "/fixed/")[0])

  def summary(self, row: Row) -> str:
    """Returns the best loss, and the rate it has."""
    loss, k = np.mean(lora_verdicts.at_best(row)), lora_verdicts.best_k(row)
    edge = "" if row["inside"] else ", at the grid's edge"
    return f"{loss:.3f}, best of {len(row['ks'])} rates 10^({k}/2){edge}"

  def table(self, rows: Rows) -> Lines:
    """Returns a line an arm, best first; see `lora_verdicts.table`."""
    return lora_verdicts.table(rows)

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what the rule says."""
    return self.rule(rows)

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves sweep.png and, where the base knows something, tradeoff.png."""
    pictures.sweep(rows, folder / "sweep.png", title)
    if all("known" in row for row in rows.values()):
      pictures.tradeoff(rows, folder / "tradeoff.png")
