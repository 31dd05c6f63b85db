"""Quality against bytes: models of several widths, each in several bits.

A `Ladder` is one training, done at each width with each seed, and rows: ways to
keep what came out. All models read the same text for equally long and share a
vocabulary, so their losses compare. Bytes are those of all arrays.

Everything is kept: DIR/w128-s0/ is a run of `experiments.train` with its rows
beside it (`experiments.studies.quant.quant_study`).
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.core import cli, stats, train_eval
from experiments.core.experiment import Experiment, Pretrained
from experiments.studies import claims
from experiments.studies.quant import quant_study
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
class Ladder:
  """What is trained, and how it is kept.

  Attributes:
    training: of every model; its `model` is a `from_scratch.FromScratch`.
    text: windows that no model saw.
    rows: by families.
    widths: of the models; heads keep their size, hidden units their share.
    seeds: of weights and of data's order.
    verdicts: points -> claims, what was found, and whether they hold.
  """

  training: Experiment
  text: Calibration
  rows: Sequence[Sequence[Row]]
  widths: Sequence[int]
  seeds: int = 3
  verdicts: Sequence[Callable[[Sequence[Point]], list[Any]]] = ()

  def __post_init__(self):
    sizes = self.training.model.sizes
    for width in self.widths:
      if width % sizes.head_dim:
        raise UserError(
          f"Ladder.widths: found {width}, expected a multiple of the heads'"
          f" {sizes.head_dim}."
        )

  @property
  def rungs(self) -> dict[str, tuple[int, int]]:
    """Name -> (width, seed); all of a seed before the next."""
    return {
      f"w{width}-s{seed}": (width, seed)
      for seed in range(self.seeds)
      for width in self.widths
    }

  def experiment(self, width: int, seed: int) -> Experiment:
    """Returns the training of one rung."""
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


def measured(
  ladder: Ladder, folder: pathlib.Path, wanted: re.Pattern[str] = claims.ALL
) -> list[dict[str, Any]]:
  """Returns all points, trained and measured now or before.

  Args:
    ladder: what is measured.
    folder: keeps models and rows.
    wanted: finds the rungs' names that are looked at.
  """
  points = []
  for name, (width, seed) in ladder.rungs.items():
    if not wanted.search(name):
      continue
    place = folder / name
    if not (place / "result.json").exists():
      place.mkdir(parents=True, exist_ok=True)
      train_eval.train(ladder.experiment(width, seed), place)
    cli.say(f"{name}:")
    table = quant_study.Table(
      model=Pretrained(name=str(place / "model"), packed=False),
      rows=ladder.rows,
      text=ladder.text,
    )
    for row in quant_study.measured(table, place).values():
      if "failed" in row:
        raise UserError(f"{name}, {row['row']}: {row['failed']}")
      points.append(
        row
        | {
          "width": width,
          "seed": seed,
          "loss": float(np.log(row["perplexity"])),
        }
      )
  return points


def table(points: Sequence[Point]) -> list[dict[str, Any]]:
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
        "loss": loss.value,
        "± 95%": loss.half if np.isfinite(loss.half) else None,
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


def fewer_bits(points: Sequence[Point]) -> list[claims.Verdict]:
  """Returns whether fewer bits win at equal bytes, bit by bit.

  Each claim is held surely: by more than the interval over seeds.
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
      claims.Verdict(
        f"at equal bytes a larger model in {fewer} beats a smaller one in"
        f" {more}",
        f"loss lower by {mean} nats a token, {len(found)} seeds",
        mean.value > mean.half,
      )
    )
  return out
