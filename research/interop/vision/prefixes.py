"""Which tensor of a vision language model's file belongs to which tower."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from research.interop import hf
from research.vlm.model import TOWERS


@runtime_checkable
class Naming(Protocol):
  """Which tensor belongs to which tower, both ways.

  `Prefixes` is one. A family whose names do not begin by tower, or whose
  tensors have to be cut or joined, has a class of its own.
  """

  def split(
    self, tensors: Mapping[str, Any], where: Any
  ) -> dict[str, dict[str, Any]]:
    """Returns each tower's tensors, by their names within it.

    Args:
      tensors: a file's, by name; unread.
      where: the file or directory, for messages.

    Raises:
      UserError: a tensor belongs to none.
    """

  def join(self, towers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns all tensors under the file's names; inverts `split`."""


@dataclasses.dataclass(frozen=True)
class Prefix:
  """What the names of a tower's tensors begin with.

  Attributes:
    tower: one of `vlm.model.TOWERS`; None for a part that no model here has,
      which is not read.
    read: regular expression of the beginning: that of the Hub's files, and
      those that versions of transformers have in memory.
    written: the beginning in the Hub's files; None for a row that only reads.
    own: the beginning within the tower. A language model's own names begin
      with `model.` or `lm_head.` (`hf.names`).
  """

  tower: str | None
  read: str
  written: str | None = None
  own: str = ""


@dataclasses.dataclass(frozen=True)
class Prefixes:
  """A `Naming` by how names begin: the first row that fits counts.

  A connector inside of the encoder's prefix comes before it:

    Prefix("connector", r"visual\\.merger\\.", "visual.merger.")
    Prefix("vision", r"visual\\.", "visual.")

  Attributes:
    rows: in order.
  """

  rows: tuple[Prefix, ...]

  def split(
    self, tensors: Mapping[str, Any], where: Any
  ) -> dict[str, dict[str, Any]]:
    out: dict[str | None, dict[str, Any]] = {tower: {} for tower in TOWERS}
    for name, tensor in tensors.items():
      tower, own = self._tower_of(name, where)
      if own in out.setdefault(tower, {}):
        raise hf.mismatch(where, [], [name])
      out[tower][own] = tensor
    return {tower: out[tower] for tower in TOWERS}

  def _tower_of(self, name: str, where: Any) -> tuple[str | None, str]:
    for row in self.rows:
      if found := re.match(row.read, name):
        return row.tower, row.own + name[found.end() :]
    raise hf.mismatch(where, [], [name])

  def join(self, towers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    out = {}
    for tower, tensors in towers.items():
      rows = [
        row
        for row in self.rows
        if row.tower == tower and row.written is not None
      ]
      for name, tensor in tensors.items():
        row = next(row for row in rows if name.startswith(row.own))
        out[row.written + name.removeprefix(row.own)] = tensor
    return out


def like_llava(vision: str = "vision_tower.vision_model.") -> Prefixes:
  """Returns the names of LLaVA, which many families have taken over.

  Args:
    vision: what those of the encoder begin with in the Hub's files.
  """
  language = "language_model."
  return Prefixes(
    (
      Prefix("vision", r"(model\.)?vision_tower\.(vision_model\.)?", vision),
      Prefix(
        "connector",
        r"(model\.)?multi_modal_projector\.",
        "multi_modal_projector.",
      ),
      Prefix(
        "language",
        r"(model\.)?language_model\.lm_head\.",
        f"{language}lm_head.",
        "lm_head.",
      ),
      Prefix(
        "language",
        r"(model\.)?language_model\.(model\.)?",
        f"{language}model.",
        "model.",
      ),
      Prefix("language", r"lm_head\.", own="lm_head."),
    )
  )
