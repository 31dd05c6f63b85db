"""Quality against bytes: models of several widths, each in several bits.

A `Ladder` is one training, done at each width with each seed, and rows: ways to
keep what came out. All models read the same text for equally long and share a
vocabulary, so their losses compare. Bytes are those of all arrays.

An arm is one training: DIR/w128-s0/ is a run of `experiments.train`, and its
row has a point for each way to pack it (`quant_study.measure`).
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.core import cli, stats, train_eval
from experiments.core.experiment import Experiment, Pretrained
from experiments.studies import protocol
from experiments.studies.protocol import Lines, Rows, Verdict
from experiments.studies.quant import pictures, quant_study
from experiments.studies.quant.quant_study import Row
from research.quant.algorithms.calibrate import Calibration
from research.quant.algorithms.gptq import GPTQ
from research.quant.format import Format
from research.quant.formats.affine import Affine
from research.quant.methods import GPTQMethod, RoundToNearest
from research.quant.quantize_by_rules import Quantization, Rule
from research.typing import UserError

Point = Mapping[str, Any]
"""A row of `quant_study` with `width`, `seed` and `loss`, nats a token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ladder(protocol.Study):
  """What is trained, and how it is packed.

  Attributes:
    training: of every model; its `model` is a `from_scratch.FromScratch`.
    text: windows that no model saw.
    rows: by families.
    widths: of the models; heads keep their size, hidden units their share.
    seeds: of weights and of data's order.
    rules: points -> verdicts.
  """

  training: Experiment
  text: Calibration
  rows: Sequence[Sequence[Row]]
  widths: Sequence[int]
  seeds: int = 3
  rules: Sequence[Callable[[Sequence[Point]], list[Verdict]]] = ()

  def __post_init__(self):
    sizes = self.training.model.sizes
    for width in self.widths:
      if width % sizes.head_dim:
        raise UserError(
          f"Ladder.widths: found {width}, expected a multiple of the heads'"
          f" {sizes.head_dim}."
        )

  @property
  def sizes(self) -> dict[str, tuple[int, int]]:
    """Arm -> (width, seed); all of a seed before the next."""
    return {
      f"w{width}-s{seed}": (width, seed)
      for seed in range(self.seeds)
      for width in self.widths
    }

  def experiment(self, width: int, seed: int) -> Experiment:
    """Returns the training of one model."""
    base = self.training
    sizes = base.model.sizes
    heads = width // sizes.head_dim
    sizes = dataclasses.replace(
      sizes,
      width=width,
      heads=heads,
      kv_heads=heads,
      hidden=width * sizes.hidden // sizes.width,
    )
    return dataclasses.replace(
      base,
      model=dataclasses.replace(base.model, sizes=sizes, seed=seed),
      data=dataclasses.replace(base.data, seed=seed),
      plan=dataclasses.replace(base.plan, seed=seed),
      seed=seed,
    )

  @property
  def arms(self) -> list[str]:
    """One for each width and seed."""
    return list(self.sizes)

  def settings(self, arm: str) -> str:
    """Returns one training, the text and the rows."""
    training = protocol.describe(self.experiment(*self.sizes[arm]))
    return f"{training}, {protocol.describe([self.text, self.rows])}"

  def run(self, arm: str, before: Rows, workdir: pathlib.Path) -> protocol.Row:
    """Trains a model, unless the folder has it; returns its points.

    Raises:
      UserError: a model there is of other settings, or a row fails.
    """
    del before
    width, seed = self.sizes[arm]
    self._train(arm, workdir / arm)
    table = quant_study.Table(
      model=Pretrained(name=str(workdir / arm / "model"), packed=False),
      rows=self.rows,
      text=self.text,
    )
    shared, points = table.prepare(workdir), []
    for name in table.arms:
      row = table.run(name, {}, shared)
      if "failed" in row:
        raise UserError(f"{arm}, {name}: {row['failed']}")
      cli.say(f"{arm}, {name}: {table.summary(row)}")
      loss = float(np.log(row["perplexity"]))
      points.append(row | {"width": width, "seed": seed, "loss": loss})
    return {"points": points}

  def _train(self, arm: str, folder: pathlib.Path) -> None:
    note = folder / "settings.txt"
    settings = protocol.describe(self.experiment(*self.sizes[arm]))
    if note.exists() or (folder / "result.json").exists():
      found = note.read_text("utf-8") if note.exists() else None
      protocol.check_settings(note, found, settings)
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(settings, "utf-8")
    if not (folder / "result.json").exists():
      train_eval.train(self.experiment(*self.sizes[arm]), folder)

  def table(self, rows: Rows) -> Lines:
    """Returns a line a width and way to pack; see `table`."""
    return table(_points(rows))

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what the rules say."""
    return [verdict for rule in self.rules for verdict in rule(_points(rows))]

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves ladder.png: loss against bytes."""
    pictures.ladder(table(_points(rows)), folder / "ladder.png", title)


def _points(rows: Rows) -> list[Point]:
  return [point for row in rows.values() for point in row["points"]]


def rows(
  calibration: Calibration,
  bits: Sequence[int] = (8, 4, 3, 2),
  block: int = 32,
  nearest: Sequence[int] = (),
) -> tuple[Row, ...]:
  """Returns integers by GPTQ, and some rounded to nearest.

  The embedding, which also makes the logits, is in 8 bits in all of them.

  Args:
    calibration: what GPTQ reads.
    bits: of a code; those above 6 are rounded to nearest.
    block: inputs that share a scale.
    nearest: bits that are rounded to nearest as well.
  """

  def one(b: int, name: str, method: Any, reads: Calibration | None) -> Row:
    eight: Format = Affine(bits=8, block=block, symmetric=True)
    rules = (
      Rule(match="^(embed|head)$", format=eight),
      Rule(match="^layers/", format=Affine(bits=b, block=block), method=method),
    )
    whole = Quantization(rules=rules, calibration=reads, compare=False)
    return Row(name=name, transforms=(whole,), group=name, errors=False)

  gptq = GPTQMethod(options=GPTQ(drift=0.0))
  return tuple(
    one(
      b,
      f"{b} bits",
      *((RoundToNearest(), None) if b > 6 else (gptq, calibration)),
    )
    for b in bits
  ) + tuple(
    one(b, f"{b} bits, nearest", RoundToNearest(), None) for b in nearest
  )


def table(points: Sequence[Point]) -> Lines:
  """Returns a line a width and row, means over seeds."""
  lines = []
  for width, name in dict.fromkeys((p["width"], p["row"]) for p in points):
    some = [p for p in points if (p["width"], p["row"]) == (width, name)]
    whole = float(np.mean(np.log([p["base_perplexity"] for p in some])))
    loss = stats.mean([p["loss"] for p in some])
    lines.append(
      {
        "width": width,
        "row": name,
        "bits": some[0]["bits_per_weight"],
        "kB": some[0]["nbytes"] / 1e3,
        "loss": loss,
        "unrounded": whole,
        "KL": float(np.mean([p["kl"] for p in some])),
        "seeds": len(some),
      }
    )
  return lines


def curves(
  points: Sequence[Point], seed: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns row -> (log bytes, loss) over widths, of one seed."""
  out = {}
  mine = sorted((p for p in points if p["seed"] == seed), key=_bytes)
  for name in dict.fromkeys(p["row"] for p in mine):
    some = [p for p in mine if p["row"] == name]
    size, loss = np.log([_bytes(p) for p in some]), [p["loss"] for p in some]
    out[name] = size, np.asarray(loss)
  return out


def _bytes(point: Point) -> int:
  return point["nbytes"]


def gain(points: Sequence[Point], fewer: str, more: str) -> dict[int, float]:
  """Returns seed -> how much lower the loss is in fewer bits, at equal bytes.

  Losses of either row are straight lines in log bytes between widths; the
  difference is the mean over the sizes that both rows reach, nats a token.
  """
  out = {}
  for seed in sorted({p["seed"] for p in points}):
    found = curves(points, seed)
    if not {fewer, more} <= found.keys():
      continue
    a, b = found[fewer], found[more]
    low, high = max(a[0][0], b[0][0]), min(a[0][-1], b[0][-1])
    if low >= high:
      continue
    at = np.linspace(low, high, 101)
    out[seed] = float(np.mean(np.interp(at, *b) - np.interp(at, *a)))
  return out


def fewer_bits(points: Sequence[Point]) -> list[Verdict]:
  """Returns whether fewer bits win at equal bytes, bit by bit.

  Over seeds: a gain's interval decides.
  """
  names = dict.fromkeys(p["row"] for p in points)
  plain = [n for n in names if re.fullmatch(r"\d+ bits", n)]
  plain.sort(key=lambda n: -int(n.split()[0]))
  out = []
  for more, fewer in zip(plain, plain[1:], strict=False):
    found = gain(points, fewer, more)
    if not found:
      continue
    mean = stats.mean(list(found.values()))
    out.append(
      Verdict(
        f"at equal bytes a larger model in {fewer} beats a smaller one in"
        f" {more}",
        f"loss lower by {mean} nats a token, {len(found)} seeds",
        stats.above(mean),
      )
    )
  return out
