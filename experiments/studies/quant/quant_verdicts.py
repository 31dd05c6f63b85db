"""What the rows of a table say of claims about few bits.

Each function takes the rows that there are, and says nothing of what needs
others. Differences between rows are of means over the same tokens; an interval
is two standard errors of both to either side.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import stats

from experiments.core.stats import (
  Decision,
  Mean,
  above,
  below,
  every,
  mean,
)
from experiments.studies.protocol import Rows, Verdict
from experiments.studies.quant import bands
from research import intervals
from research.quant.format import Format
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.quantize import Quantize
from research.typing import Float


def good(rows: Rows) -> dict[str, Mapping[str, Any]]:
  """Returns the rows that were measured, packed in few bits."""
  return {
    name: row
    for name, row in rows.items()
    if "failed" not in row and row["bits_per_weight"] is not None
  }


def within(rows: Rows, low: float) -> dict[str, Mapping[str, Any]]:
  """Returns the rows of the band that begins at `low` bits."""
  out = {}
  for name, row in good(rows).items():
    band = bands.band(row["bits_per_weight"])
    if band is not None and band[0] == low:
      out[name] = row
  return out


def more_kl(a: Mapping[str, Any], b: Mapping[str, Any]) -> Decision:
  """Whether the divergence of `a` is above that of `b` by two errors."""
  two = 2 * math.hypot(a["kl_se"], b["kl_se"])
  return above(Mean(a["kl"] - b["kl"], two))


def quality(rows: Rows) -> list[Verdict]:
  """Returns what 4 bits keep, by three measures, of the best row there."""
  found = within(rows, 4.25)
  if not found:
    return []
  name, best = min(found.items(), key=lambda x: x[1]["kl"])
  shares = {
    "perplexity, base's over the quantized": best["base_perplexity"]
    / best["perplexity"],
    "accuracy of the next token, over the base's": best["accuracy"]
    / best["base_accuracy"],
    "tokens whose most likely one is the same": best["same_top"],
  }
  return [
    Verdict(
      f"at 4.25 to 4.5 bits {share:.0%} of the quality is kept: {measure}",
      f"{name}: {value:.1%}",
      value >= share,
    )
    for share in (0.95, 0.99)
    for measure, value in shares.items()
  ]


def formats(rows: Rows) -> list[Verdict]:
  """Returns what rows at equal bits say of formats and methods."""
  out = []
  rows = good(rows)
  if {"nf4-b64", "nf4-b64-dq", "fp4-b64"} <= rows.keys():
    plain, nested, fp4 = (rows[n] for n in ("nf4-b64", "nf4-b64-dq", "fp4-b64"))
    out += [
      Verdict(
        "double quantization is free: 0.37 bits for no sure loss",
        f"{_kl(nested)} against {_kl(plain)}",
        not more_kl(nested, plain),
      ),
      Verdict(
        "NF4 loses less than FP4",
        f"{_kl(plain)} against {_kl(fp4)}",
        more_kl(fp4, plain),
      ),
    ]
  pairs = [
    (a, b)
    for a, b in itertools.combinations(within(rows, 4.25).values(), 2)
    if (more_kl(a, b) and a["perplexity"] < b["perplexity"])
    or (more_kl(b, a) and b["perplexity"] < a["perplexity"])
  ]
  if len(within(rows, 4.25)) > 1:
    said = [f"{a['row']} and {b['row']}" for a, b in pairs]
    out.append(
      Verdict(
        "perplexity and divergence order rows of equal bits differently",
        "; ".join(said[:3]) + f" ({len(said)} pairs)" if said else "no pair",
        bool(pairs),
      )
    )
  for low in (4.25, 3.25):
    out += _calibrated(within(rows, low), low)
  return out


def _calibrated(rows: Rows, low: float) -> list[Verdict]:
  """Whether what is calibrated beats what is not."""
  groups = {
    calibrated: [
      r for r in rows.values() if (r["group"] == "calibrated") == calibrated
    ]
    for calibrated in (True, False)
  }
  if not all(groups.values()):
    return []
  read, blind = (min(groups[c], key=lambda r: r["kl"]) for c in (True, False))
  return [
    Verdict(
      f"from {low} bits on the best calibrated row beats the best other one",
      f"{read['row']} {_kl(read)} against {blind['row']} {_kl(blind)}",
      more_kl(blind, read),
    )
  ]


def weights_are_not_the_goal(rows: Rows) -> list[Verdict]:
  """Returns whether HQQ's smaller errors of weights are a better model."""
  out = []
  for bits in (4, 3):
    names = f"hqq{bits}-g64", f"int{bits}-asym-g64"
    if not all(n in good(rows) for n in names):
      continue
    fitted, plain = (rows[n] for n in names)
    out.append(
      Verdict(
        f"at {bits} bits HQQ has smaller errors of weights, and a worse model",
        f"weights {fitted['weight_error']:.4f} against"
        f" {plain['weight_error']:.4f}, KL {_kl(fitted)} against {_kl(plain)}",
        every(
          (
            fitted["weight_error"] < plain["weight_error"],
            more_kl(fitted, plain),
          )
        ),
      )
    )
  return out


def crossover(rows: Rows) -> list[Verdict]:
  """Returns from which block size on NF4 beats even grids of 4 bits.

  By errors of normal numbers, by errors of the model's matrices, and
  by divergence; each is a ratio, NF4 over asymmetric integers, with its
  standard error: over draws of numbers, over matrices, or of the two rows as
  if they were independent. A side of 1 counts from two errors on.
  """
  rows = good(rows)
  sizes = sorted(
    int(name.removeprefix("nf4-b"))
    for name in rows
    if re.fullmatch(r"nf4-b\d+", name)
  )
  pairs = {n: (f"nf4-b{n}", f"int4-asym-g{n}") for n in sizes}
  pairs = {
    n: (rows[a], rows[b])
    for n, (a, b) in pairs.items()
    if a in rows and b in rows
  }
  if not pairs:
    return []
  ratios = {
    "normal numbers": {n: normal_ratio(n) for n in pairs},
    "matrices": {n: _matrix_ratio(*p) for n, p in pairs.items()},
    "divergence": {n: _kl_ratio(*p) for n, p in pairs.items()},
  }
  out = []
  for what, ratio in ratios.items():
    by = ", ".join(f"{n}: {Mean(*found)}" for n, found in ratio.items())
    (first, early), (last, late) = ratio[min(ratio)], ratio[max(ratio)]
    out.append(
      Verdict(
        f"integers lose less than NF4 at small blocks, more at large: {what}",
        f"NF4 over int4 asymmetric by block, ± SE, {by}",
        every(
          (above(Mean(first, 2 * early), 1), below(Mean(last, 2 * late), 1))
        ),
      )
    )
  return out


def normal_ratio(block: int) -> tuple[float, float]:
  """Returns NF4's error of normal numbers over integers', and its SE."""
  formats = Codebook(block=block, nested=0), Affine(block=block)
  return _mean_ratio(*(normal_errors(format) for format in formats))


def normal_errors(format: Format) -> Float[np.ndarray, " D"]:
  """Returns root mean square errors of 8 draws of 2^15 normal numbers."""
  w = np.random.default_rng(0).standard_normal((1024, 256)).astype(np.float32)
  found = Quantize(format=format).pack(jnp.asarray(w)).dense()
  squares = (np.asarray(found, np.float64) - w) ** 2
  return np.sqrt(squares.reshape(1024, 8, 32).mean((0, 2)))


def _matrix_ratio(a: Any, b: Any) -> tuple[float, float]:
  """Returns the ratio of errors of weights, with its error over matrices."""
  same = sorted(a["matrices"].keys() & b["matrices"].keys())
  errors = [[x["matrices"][m]["weight"] for m in same] for x in (a, b)]
  return _mean_ratio(*map(np.array, errors))


def _mean_ratio(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
  """Returns the mean of `a / b` and its error: infinite for one of them."""
  ratios = a / b
  if len(ratios) < 2:
    return float(ratios.mean()), math.inf
  return float(ratios.mean()), float(stats.sem(ratios))


def _kl_ratio(a: Any, b: Any) -> tuple[float, float]:
  ratio = a["kl"] / b["kl"]
  shares = math.hypot(a["kl_se"] / a["kl"], b["kl_se"] / b["kl"])
  return ratio, ratio * shares


def too_few_tokens(rows: Rows) -> list[Verdict]:
  """Returns whether calibration on too little text is worse than none.

  Each draw of a calibration is a row; all of them must be on one side
  of rounding to nearest.
  """
  rows = good(rows)
  draws: dict[int, list[Mapping[str, Any]]] = {}
  for row in rows.values():
    if row.get("calibrated_on") and row["group"] == "calibration":
      draws.setdefault(row["calibrated_on"], []).append(row)
  blind = [r for r in rows.values() if r["group"] == "uncalibrated"]
  if len(draws) < 2 or not blind:
    return []
  least, most = draws[min(draws)], draws[max(draws)]
  return [
    Verdict(
      f"GPTQ on {min(draws):,} tokens is worse than rounding to nearest",
      f"{', '.join(map(_kl, least))} against {_kl(blind[0])} {_draws(least)}",
      every(more_kl(row, blind[0]) for row in least),
    ),
    Verdict(
      f"and on {max(draws):,} better",
      f"{', '.join(map(_kl, most))} {_draws(most)}",
      every(more_kl(blind[0], row) for row in most),
    ),
  ]


def _draws(rows: Sequence[Any]) -> str:
  return f"({len(rows)} draws)" if len(rows) > 1 else "(one draw)"


def outliers(rows: Rows) -> list[Verdict]:
  """Returns what matrices say of why few bits work, and where not."""
  probed = [r for r in good(rows).values() if r.get("matrices")]
  if not probed:
    return []
  row = min(probed, key=lambda r: abs(r["bits_per_weight"] - 4.3))
  found = row["matrices"]
  kinds: dict[str, list[float]] = {}
  for address, one in found.items():
    kinds.setdefault(address.rsplit("/", 1)[-1], []).append(one["inputs"])
  peak = max(found, key=lambda a: found[a]["inputs"])
  middle = {kind: float(np.median(x)) for kind, x in kinds.items()}
  weights = float(np.median([x["weights"] for x in found.values()]))
  inputs = float(np.median([x["inputs"] for x in found.values()]))
  errors = np.array([x["output"] for x in found.values()])
  worst = max(found, key=lambda a: found[a]["output"])
  return [
    Verdict(
      "weights have few outliers, inputs have many (largest over mean size)",
      f"median matrix: weights {weights:.0f}, inputs {inputs:.0f}",
      inputs > 2 * weights,
    ),
    Verdict(
      "the largest inputs are those of a down projection, 100 times the mean",
      f"{peak}: {found[peak]['inputs']:.0f}; medians by matrix "
      + ", ".join(f"{k} {x:.0f}" for k, x in middle.items()),
      peak.endswith("down") and found[peak]["inputs"] > 100,
    ),
    Verdict(
      "matrices differ: the worst errs twice as much as the median one",
      f"{row['row']}: {worst} {errors.max():.3f}, median {_median(errors)}",
      errors.max() > 2 * float(np.median(errors)),
    ),
  ]


def _median(errors: Float[np.ndarray, " M"]) -> str:
  """Returns a median over matrices, and its bootstrapped interval."""
  if len(errors) < 2:
    return f"{errors[0]:.3f}"
  found = intervals.bootstrap(
    lambda rows: np.median(errors[rows], axis=-1), len(errors)
  )
  middle = np.median(errors)
  return f"{middle:.3f} ({found.low:.3f} to {found.high:.3f}){found.note}"


def recovery(rows: Rows) -> list[Verdict]:
  """Returns what training through rounding wins back, over seeds.

  Rows are `arm, seed n` beside one of group `rounded`: the share of its
  divergence that is gone.
  """
  rows = good(rows)
  rounded = [r for r in rows.values() if r["group"] == "rounded"]
  arms: dict[str, list[Mapping[str, Any]]] = {}
  for name, row in rows.items():
    if ", seed " in name:
      arms.setdefault(name.rsplit(", seed ", 1)[0], []).append(row)
  if not rounded:
    return []
  return [
    Verdict(
      f"{arm}: half of what rounding lost comes back",
      f"of KL {recovered(rounded[0], some, 'kl')}, of the loss"
      f" {recovered(rounded[0], some, 'nll_change')}, {len(some)} seeds",
      above(recovered(rounded[0], some, "kl"), 0.5),
    )
    for arm, some in arms.items()
  ]


def recovered(
  rounded: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], name: str
) -> Mean:
  """Returns the share of a loss that is gone, with its interval over seeds."""
  return mean([1 - row[name] / rounded[name] for row in rows])


def _kl(row: Mapping[str, Any]) -> str:
  return f"{row['kl']:.4f} ± {row['kl_se']:.4f}"
