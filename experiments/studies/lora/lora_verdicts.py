"""What the rows of a study say of LoRA's claims.

research/lora/MATH.md 3, 9.1 and 9.3 have the claims. Losses are held out, each
arm at its own best rate; differences are paired by seed. An interval is
Student's, 95%, over seeds.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats as scipy_stats

from experiments.core.stats import (
  Decision,
  Mean,
  above,
  below,
  equivalent,
  every,
  holm,
  mean,
  p_value,
  paired,
)
from experiments.studies.protocol import Lines, Row, Rows, Verdict

ALPHA = 0.05
"""Of a corrected p, below which a difference is no accident."""

CLOSE = 0.02
"""Share of a loss within which two tie: the 1 to 2% of arXiv:2602.04998."""


def at_best(row: Row, name: str = "heldout") -> list[float]:
  """Returns a measure of each seed at the best rate."""
  return row[name][row["best"]]


def best_k(row: Row) -> int:
  """Returns k of the best rate, 10^(k/2)."""
  return row["ks"][row["best"]]


def optimum(row: Row) -> float:
  """Returns the best rate between the grid's: a parabola's, in log rate."""
  k, losses = row["best"], np.array(row["validation"], float).mean(1)
  if not row["inside"] or not np.isfinite(losses[k - 1 : k + 2]).all():
    return 10 ** (best_k(row) / 2)
  before, at, after = losses[k - 1 : k + 2]
  shift = 0.5 * (before - after) / (before - 2 * at + after)
  return float(10 ** ((best_k(row) + shift) / 2))


def lead(rows: Rows, first: str, second: str, name: str = "heldout") -> Mean:
  """Returns by how much `first` is below `second`, paired by seed."""
  a, b = (at_best(rows[arm], name) for arm in (first, second))
  return paired(b, a)


def leads(rows: Rows, first: str, second: str) -> Decision:
  """Whether `first` has a lower loss than `second`, over seeds."""
  return above(lead(rows, first, second))


def ahead(rows: Rows, arms: Sequence[str], other: str) -> dict[str, float]:
  """Returns arms with a lower loss than another, and Holm's p of each.

  Args:
    rows: by arm.
    arms: that are compared with `other`; corrected for their number.
    other: an arm.
  """
  losses = {n: np.array(at_best(rows[n]), float) for n in (*arms, other)}
  gains = [losses[other] - losses[n] for n in arms]
  p = holm([p_value(x) for x in gains])
  return {n: q for n, x, q in zip(arms, gains, p, strict=True) if x.mean() > 0}


def _said(rows: Rows, names: Sequence[str], name: str = "heldout") -> str:
  return ", ".join(
    f"{arm}: {mean(at_best(rows[arm], name)).value:.3f}" for arm in names
  )


def _rates(rows: Rows, names: Sequence[str]) -> str:
  return ", ".join(f"{arm}: {optimum(rows[arm]):.1e}" for arm in names)


def capacity(rows: Rows) -> list[Verdict]:
  """Returns verdicts on ranks, places and scales (`lora_arms.capacity`)."""
  ranks = [n for n, row in rows.items() if row["group"] == "rank"]
  attention, mlp = (n for n, row in rows.items() if row["group"] == "place")
  scaled = next(n for n, row in rows.items() if row["group"] == "scale")
  top, full = ranks[-1], rows["full"]
  steps = list(zip(ranks[1:], ranks, strict=False))
  rates = [optimum(rows[n]) for n in ranks]
  rising = list(zip([*ranks[1:], "full"], ranks, strict=True))
  tie = lead(rows, scaled, top)
  size = mean(at_best(rows[top])).value
  early = _early(rows, ranks[1:])
  return [
    Verdict(
      "rank is capacity: every larger rank learns more",
      _said(rows, (*ranks, "full")),
      every(leads(rows, more, less) for more, less in steps),
    ),
    Verdict(
      "LoRA of full rank reaches full training (within 2%)",
      f"{top} above full by {lead(rows, 'full', top)}",
      below(lead(rows, "full", top), CLOSE * size),
    ),
    _recovery(rows, ranks),
    Verdict(
      "with alpha / r the best rate does not depend on the rank",
      _rates(rows, ranks),
      max(rates) < 2 * min(rates),
    ),
    Verdict(
      "nor do the first 20 steps (losses within 2%, r > 1)",
      f"largest difference {early:.1%}",
      early < CLOSE,
    ),
    Verdict(
      "LoRA's best rate is at least twice that of full training",
      _rates(rows, ("full", *ranks)),
      min(rates) >= 2 * optimum(full),
    ),
    Verdict(
      "adapters on the MLP learn more than on attention, with fewer parameters",
      f"{_said(rows, (attention, mlp))}; parameters"
      f" {rows[attention]['trained']:,} and {rows[mlp]['trained']:,}",
      every(
        (
          leads(rows, mlp, attention),
          rows[mlp]["trained"] < rows[attention]["trained"],
        )
      ),
    ),
    Verdict(
      "what learns less forgets less: forgetting grows with the rank",
      _said(rows, (*ranks, "full"), "known"),
      every(above(lead(rows, a, b, "known")) for b, a in rising),
    ),
    Verdict(
      "rsLoRA has the same optimum at a smaller rate, not a better one",
      f"{scaled} below {top} by {tie}; rates {_rates(rows, (scaled, top))}",
      every(
        (
          equivalent(tie, 0.5 * CLOSE * size),
          2 * optimum(rows[scaled]) <= optimum(rows[top]),
        )
      ),
    ),
    Verdict(
      "full training's change has low rank (90% of its energy in half)",
      f"{mean(at_best(full, 'rank90')).value:.1f} of {full['side']} directions",
      below(mean(at_best(full, "rank90")), full["side"] / 2),
    ),
  ]


def recovered(rows: Rows, arm: str) -> float:
  """Returns an arm's gain over the base as a share of full training's."""
  before = rows["full"]["before"]["heldout"]
  gain, whole = (before - mean(at_best(rows[n])).value for n in (arm, "full"))
  return gain / whole


def _early(rows: Rows, names: Sequence[str]) -> float:
  """The largest spread of the first 20 losses at one rate, as a share."""
  k = best_k(rows[names[-1]])
  curves = np.array(
    [
      np.mean(rows[n]["curve"][rows[n]["ks"].index(k)], 0)[:20]
      for n in names
      if k in rows[n]["ks"]
    ]
  )
  return float(np.max(np.ptp(curves, 0) / curves.mean(0)))


def methods(rows: Rows) -> list[Verdict]:
  """Returns verdicts on equal parameters (`lora_arms.methods`)."""
  kin = [
    n for n, r in rows.items() if r["group"] in ("LoRA", "start", "optimizer")
  ]
  equal = [n for n, r in rows.items() if r["group"] not in ("full", "few")]
  loss = {n: mean(at_best(r)).value for n, r in rows.items()}
  own = {n: optimum(rows[n]) / optimum(rows["LoRA"]) for n in equal}
  far = [n for n in equal if not 0.2 < own[n] < 5]
  gains = [loss[n] for n in rows]
  forgot = [mean(at_best(r, "known")).value for r in rows.values()]
  agree = scipy_stats.spearmanr(gains, [-x for x in forgot]).statistic
  return [
    Verdict(
      "variants of LoRA tie at equal parameters (within 2%)",
      _spread(loss, kin),
      _near(loss, kin) == len(kin),
    ),
    Verdict(
      "and so do all methods",
      _spread(loss, equal),
      _near(loss, equal) == len(equal),
    ),
    _none_ahead(rows, [n for n in equal if n != "LoRA"]),
    Verdict(
      "methods need rates of their own (some 5 times LoRA's, or a fifth)",
      _rates(rows, far),
      bool(far),
    ),
    Verdict(
      "what learns more forgets more (rank correlation at least 0.5)",
      f"{agree:.2f} over {len(rows)} arms",
      bool(agree >= 0.5),
    ),
  ]


def _none_ahead(rows: Rows, others: Sequence[str]) -> Verdict:
  """Many are compared: an interval of each alone would find some by chance."""
  better = {n: p for n, p in ahead(rows, others, "LoRA").items() if p < ALPHA}
  alone = [n for n in others if leads(rows, n, "LoRA")]
  said = ", ".join(f"{n} by {lead(rows, n, 'LoRA')}" for n in alone)
  sure = f"; after Holm's correction for {len(others)}: "
  return Verdict(
    "no method has a lower loss than plain LoRA",
    "lower by its own interval: "
    + (said or "none")
    + sure
    + (", ".join(better) or "none"),
    _none(better, alone),
  )


def _none(better: Mapping[str, float], alone: Sequence[str]) -> Decision:
  """One that stays after the correction decides; one that does not, nothing."""
  if better:
    return False
  return None if alone else True


def _near(loss: Mapping[str, float], names: Sequence[str]) -> int:
  """Returns how many are within 2% of LoRA."""
  size = loss["LoRA"]
  return sum(abs(loss[n] - size) <= CLOSE * size for n in names)


def _spread(loss: Mapping[str, float], names: Sequence[str]) -> str:
  low, high = (f(names, key=loss.get) for f in (min, max))
  return (
    f"{_near(loss, names)} of {len(names)}; from {low} {loss[low]:.3f} to"
    f" {high} {loss[high]:.3f}, LoRA {loss['LoRA']:.3f}"
  )


def width(rows: Rows) -> list[Verdict]:
  """Returns verdicts on a wider base (`lora_arms.width`)."""
  ranks = [n for n, row in rows.items() if row["group"] == "rank"]
  ratios = [optimum(rows[n]) / optimum(rows["full"]) for n in ranks]
  return [
    Verdict(
      "LoRA's best rate is at least twice that of full training",
      f"{_rates(rows, list(rows))}: {min(ratios):.1f} times",
      min(ratios) >= 2,
    ),
    _recovery(rows, ranks),
  ]


def _recovery(rows: Rows, ranks: Sequence[str]) -> Verdict:
  """The first of the ranks is the 1%."""
  whole = rows["full"]["trained"]
  before = rows["full"]["before"]["heldout"]
  gain, most = (
    before - np.array(at_best(rows[n]), float) for n in (ranks[0], "full")
  )
  return Verdict(
    "about 1% of the parameters recover full training (90% of its gain)",
    ", ".join(
      f"{n} ({rows[n]['trained'] / whole:.1%}): {recovered(rows, n):.0%}"
      for n in ranks
    ),
    above(paired(gain, 0.9 * most)),
  )


def pretraining(rows: Rows) -> list[Verdict]:
  """Returns verdicts on training from scratch (`lora_arms.pretraining`)."""
  low = next(n for n in rows if n.startswith("ReLoRA")).removeprefix("ReLoRA ")
  re, plain = f"ReLoRA {low}", f"LoRA {low}"
  order = ["full", f"GaLore {low}", re, plain]
  bare = f"{re}, no reset"
  share = int(low.removeprefix("r=")) / rows[re]["side"]
  ranks = {n: mean(at_best(rows[n], "rank")).value for n in (plain, re)}
  segments = ranks[re] / share
  return [
    Verdict(
      "full < GaLore < ReLoRA < LoRA",
      _said(rows, order),
      every(
        leads(rows, better, worse)
        for better, worse in zip(order, order[1:], strict=False)
      ),
    ),
    Verdict(
      "the change's rank is r for LoRA, and r times the cycles for ReLoRA",
      f"{plain}: {ranks[plain] / share:.2f} r, {re}: {segments:.2f} r",
      abs(ranks[plain] - share) < 0.01 and abs(segments - 5) < 0.15,
    ),
    Verdict(
      "without reset and re-warming ReLoRA is worse than with",
      _said(rows, (re, bare, plain)),
      leads(rows, re, bare),
    ),
    Verdict(
      "and worse than plain LoRA",
      f"{bare} above {plain} by {lead(rows, plain, bare)}",
      leads(rows, plain, bare),
    ),
  ]


def policy(rows: Rows) -> list[Verdict]:
  """Returns verdicts on policy gradients (`lora_arms.policy`)."""
  reward = {n: 1 - np.array(at_best(r), float) for n, r in rows.items()}
  first = next(n for n, r in rows.items() if r["group"] == "rank")
  return [
    Verdict(
      "rank 1 suffices: 95% of full training's reward",
      ", ".join(f"{n}: {mean(x)}" for n, x in reward.items()),
      above(paired(reward[first], 0.95 * reward["full"])),
    ),
    Verdict(
      "and its best rate is at least twice that of full training",
      _rates(rows, list(rows)),
      optimum(rows[first]) >= 2 * optimum(rows["full"]),
    ),
  ]


def table(rows: Rows) -> Lines:
  """Returns a line an arm, best first."""
  lines = [
    {
      "arm": n,
      "trained": r["trained"],
      "best rate": f"{optimum(r):.1e}" + ("" if r["inside"] else "*"),
      "heldout": mean(at_best(r)),
      "known": mean(at_best(r, "known")) if "known" in r else None,
      "rank": mean(at_best(r, "rank")).value,
      "rank90": mean(at_best(r, "rank90")).value,
    }
    for n, r in rows.items()
  ]
  return sorted(lines, key=lambda line: line["heldout"])
