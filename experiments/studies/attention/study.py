"""FlashAttention's claims as a study: memory, exactness, bytes moved.

F1: memory of a forward and backward pass, naive against tiles, by the compilers
for this CPU and, where the package libtpu is installed, for TPUs. F2: errors
against float64. F3: bytes that our TPU kernel moves, counted from its index
maps, against the formula, and FLOPs a byte against what each chip needs.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.studies import protocol
from experiments.studies.attention import attention_claims as claims
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from research.planning import chips
from research.typing import UserError

CPU, EXACTNESS, TRAFFIC = "memory cpu", "exactness", "traffic"


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
    """Memory by each compiler, then errors, then bytes."""
    return [CPU, *(f"memory {x}" for x in self.topologies), EXACTNESS, TRAFFIC]

  def settings(self, arm: str) -> str:
    """Returns the arm and its own lengths: others' may change."""
    of = {EXACTNESS: self.exact_length}
    of[TRAFFIC] = (self.traffic_length, self.blocks)
    return protocol.describe((arm, of.get(arm, self.lengths)))

  def run(self, arm: str, before: Rows, shared: Any) -> Row:
    """Returns an arm's rows, those of `attention_claims`."""
    del before, shared
    if arm == EXACTNESS:
      return {"rows": claims.exactness(self.exact_length)}
    if arm == TRAFFIC:
      rows = claims.moved(self.traffic_length, self.blocks)
      return {"rows": rows, "ridges": claims.ridges()}
    topology = None if arm == CPU else arm.removeprefix("memory ")
    if topology and not chips.has_tpu_compiler():
      return {"failed": "the package libtpu is not installed"}
    return {"rows": claims.memory(self.lengths, topology)}

  def table(self, rows: Rows) -> Lines:
    """Returns a line for each thing measured, naive attention beside tiles."""
    lines = []
    for arm, row in rows.items():
      if "rows" not in row:
        lines.append({"measured": arm, "unit": row["failed"]})
      elif arm == EXACTNESS:
        lines += [_exact(x) for x in row["rows"]]
      elif arm == TRAFFIC:
        lines += _traffic(row["rows"], row["ridges"])
      else:
        lines += [_memory(arm, x) for x in row["rows"]]
    return lines

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns F1 of each compiler, F2 and F3."""
    memory = [(n, x["rows"]) for n, x in _measured(rows).items()]
    exact, moved = rows[EXACTNESS]["rows"], rows[TRAFFIC]
    worst = max(exact, key=lambda x: x["error"] / x["naive"])
    plain, *tiled = moved["rows"]
    return [
      *(
        Verdict(
          f"F1: {arm.removeprefix('memory ')} needs memory for tiles that is"
          " linear in the length, for scores quadratic",
          ", then ".join(map(_growth, found[-2:])),
          linear(found),
        )
        for arm, found in memory
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

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Draws memory.png of this CPU, and traffic.png."""
    del title
    import matplotlib

    matplotlib.use("Agg")
    from experiments.notebooks import attention_pictures as pictures

    traffic = rows[TRAFFIC]
    memory = pictures.memory(rows[CPU]["rows"])
    memory.savefig(folder / "memory.png")
    drawn = pictures.traffic(traffic["rows"], traffic["ridges"])
    drawn.savefig(folder / "traffic.png")


def _measured(rows: Rows) -> dict[str, Row]:
  """Returns the rows of memory, of compilers that are here."""
  return {
    arm: row
    for arm, row in rows.items()
    if arm.startswith("memory ") and "rows" in row
  }


def _memory(arm: str, x: Mapping[str, Any]) -> dict[str, Any]:
  naive, tiles = (x[n] and x[n] / 1e9 for n in ("naive", "flash"))
  return _line(f"{arm}, {x['length']:,} tokens", naive, tiles, "GB")


def _exact(x: Mapping[str, Any]) -> dict[str, Any]:
  what = f"error, {x['backend']}, {x['dtype']}"
  return _line(what, x["naive"], x["error"], "of the largest value")


def _traffic(
  rows: Sequence[Mapping[str, Any]], ridges: Sequence[Mapping[str, Any]]
) -> Lines:
  plain, *tiled = rows
  lines = []
  for x in tiled:
    of = f"tiles of {x['block']}"
    naive, tiles = plain["bytes"] / 1e9, x["bytes"] / 1e9
    lines.append(_line(f"bytes, {of}", naive, tiles, "GB"))
    naive, tiles = plain["intensity"], x["intensity"]
    lines.append(_line(f"intensity, {of}", naive, tiles, "FLOPs a byte"))
  for x in ridges:
    what = f"intensity that {x['chip']} needs"
    lines.append(_line(what, x["ridge"], x["ridge"], "FLOPs a byte"))
  return lines


def _line(
  what: str, naive: float | None, tiles: float | None, unit: str
) -> dict[str, Any]:
  return {"measured": what, "naive": naive, "tiles": tiles, "unit": unit}


def _growth(row: Mapping[str, Any]) -> str:
  naive = row["naive"] and f"{row['naive'] / 1e9:.3g}"
  return (
    f"{row['flash'] / 1e9:.3g} GB for {row['length']:,} tokens"
    f" (naive {naive or 'does not fit'})"
  )


def linear(rows: Sequence[Mapping[str, Any]]) -> bool:
  """Returns whether the last doubling is one of tiles' memory, not of scores'.

  Args:
    rows: of `attention_claims.memory`.
  """
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

  Args:
    moved: of `attention_claims.moved`.
    ridges: of `attention_claims.ridges`.
  """
  plain, *tiled = moved
  constants = [row["constant"] for row in tiled]
  return (
    all(row["bytes"] == row["formula"] for row in tiled)
    and max(constants) < 1.2 * min(constants)
    and all(plain["intensity"] < row["ridge"] for row in ridges)
    and all(tiled[-1]["intensity"] > row["ridge"] for row in ridges)
  )
