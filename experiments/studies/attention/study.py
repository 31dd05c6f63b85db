"""FlashAttention's claims as a study: memory, exactness, bytes moved.

F1: memory of a forward and backward pass, naive against tiles, by the compilers
for this CPU and, where the package libtpu is installed, for TPUs. F2: errors
against float64. F3: bytes that our TPU kernel moves, counted from its index
maps, against the formula, and FLOPs a byte against what each chip needs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.notebooks import attention_costs as costs
from experiments.studies import protocol
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from research.planning import chips
from research.typing import UserError

EXACTNESS, TRAFFIC = "exactness", "traffic"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(protocol.Study):
  """One head of attention: nothing large is computed.

  Attributes:
    lengths: tokens that memory is compiled for, in increasing order.
    topologies: TPUs to compile for, beside this machine's CPU.
    exact_length: tokens that errors are measured on.
    traffic_length: tokens whose bytes are counted.
    blocks: queries and keys of the tiles that they are counted for.
  """

  lengths: Sequence[int] = (4096, 8192, 16384, 32768)
  topologies: Sequence[str] = ("v5e:2x2",)
  exact_length: int = 512
  traffic_length: int = 32768
  blocks: Sequence[int] = (128, 256, 512, 1024, 2048)

  def __post_init__(self):
    rising = sorted({n for n in self.lengths if n > 0})
    if len(rising) < 2 or rising != list(self.lengths):
      raise UserError(
        f"Study.lengths: found {tuple(self.lengths)}, expected two or more"
        " different, positive numbers of tokens, in increasing order"
      )
    protocol.distinct(self.arms, "Study.topologies")

  @property
  def arms(self) -> list[str]:
    memory = [f"memory {x}" for x in ("cpu", *self.topologies)]
    return [*memory, EXACTNESS, TRAFFIC]

  def run(self, arm: str, before: Rows, shared: Any) -> Row:
    del before, shared
    if arm == EXACTNESS:
      return {"rows": costs.exactness(self.exact_length)}
    if arm == TRAFFIC:
      rows = costs.moved(self.traffic_length, self.blocks)
      return {"rows": rows, "ridges": costs.ridges()}
    topology = arm.removeprefix("memory ")
    if topology == "cpu":
      return {"rows": costs.memory(self.lengths)}
    if not chips.has_tpu_compiler():
      return {"failed": "the package libtpu is not installed"}
    return {"rows": costs.memory(self.lengths, topology)}

  def table(self, rows: Rows) -> Lines:
    """Returns a line for each thing measured: bytes, errors, FLOPs a byte."""
    return [
      {"measured": arm, **line}
      for arm, row in rows.items()
      for line in (*row.get("rows", [row]), *row.get("ridges", ()))
    ]

  def tables(self, rows: Rows) -> list[Lines]:
    return [self.table({arm: row}) for arm, row in rows.items()]

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns F1 of each compiler, F2 and F3."""
    exact, moved = rows[EXACTNESS]["rows"], rows[TRAFFIC]
    worst = max(exact, key=lambda x: x["error"] / x["naive"])
    plain, *tiled = moved["rows"]
    return [
      *(
        Verdict(
          f"F1: {arm.removeprefix('memory ')} needs memory for tiles that is"
          " linear in the length, for scores quadratic",
          ", then ".join(map(_growth, row["rows"][-2:])),
          linear(row["rows"]),
        )
        for arm, row in rows.items()
        if arm.startswith("memory ") and "rows" in row
      ),
      Verdict(
        "F2: tiles are exact: at most twice the error of the definition",
        f"largest: {worst['backend']} in {worst['dtype']},"
        f" {worst['error']:.2g}, the definition's {worst['naive']:.2g}",
        worst["error"] <= 2 * worst["naive"],
      ),
      Verdict(
        "F3: scores in memory wait for it on every chip, large tiles on none",
        f"{plain['intensity']:.0f} FLOPs a byte, in tiles of"
        f" {tiled[-1]['block']} {tiled[-1]['intensity']:.0f}",
        bandwidth_bound(moved["rows"], moved["ridges"]),
      ),
    ]


def _growth(row: Mapping[str, Any]) -> str:
  naive = row["naive"] and f"{row['naive'] / 1e9:.3g}"
  return (
    f"{row['flash'] / 1e9:.3g} GB for {row['length']:,} tokens"
    f" (naive {naive or 'does not fit'})"
  )


def linear(rows: Sequence[Mapping[str, Any]]) -> bool:
  """Returns whether the last doubling is of tiles' memory, not of scores'."""
  before, row = rows[-2:]
  growth = row["flash"] / before["flash"]
  longer = row["length"] / before["length"]
  naive = row["naive"] is None or row["naive"] >= row["scores"]
  return growth < 1.1 * longer and naive


def bandwidth_bound(
  moved: Sequence[Mapping[str, Any]], ridges: Sequence[Mapping[str, Any]]
) -> bool:
  """Returns whether standard attention waits for memory, large tiles do not.

  And whether bytes are as counted, and fall with the size of a tile as the
  paper says.
  """
  plain, *tiled = moved
  constants = [row["constant"] for row in tiled]
  return (
    all(row["bytes"] == row["formula"] for row in tiled)
    and max(constants) < 1.2 * min(constants)
    and all(plain["intensity"] < row["ridge"] for row in ridges)
    and all(tiled[-1]["intensity"] > row["ridge"] for row in ridges)
  )
