"""What points of policies say: lines, verdicts, and one picture.

A point is a policy at a speed: calls of a row, and how good the rows are. On
the chain that is nats a token under the truth, which has to be the entropy,
and the distance of pairs (`truth.off`); on sums the share that is
right, beside what a row costs. Differences are paired by seed, and hold where
their interval does.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from experiments.core.stats import (
  Mean,
  above,
  below,
  every,
  mean,
  paired,
)
from experiments.studies.protocol import Row, Rows, Verdict
from research.training.reports import plots

EXACT, CHAIN, SUMS = "the chain itself", "chain", "sums"
TASKS = (EXACT, CHAIN, SUMS)

QUOTA = ("low confidence", "largest probability", "margin", "entropy", "random")
ADAPTIVE = ("threshold", "factor", "hierarchy")

LOST = 0.01
"""The share of rows that may be wrong where slow sampling has them right."""

Point = tuple[str, Any]
"""A policy and its knob."""


def points(rows: Rows, task: str, seeds: int) -> dict[Point, list[Row]]:
  """Returns each point of a task, in every seed."""
  out: dict[Point, list[Row]] = {}
  for s in range(seeds):
    for point in rows[f"{task}, seed {s}"]["points"]:
      out.setdefault((point["policy"], point["knob"]), []).append(point)
  return out


def mean_of(repeats: Sequence[Row], name: str) -> Mean:
  """Returns a number's mean over seeds."""
  return mean([row[name] for row in repeats])


def less(a: Sequence[Row], b: Sequence[Row], name: str) -> Mean:
  """Returns how much less a number is in `a` than in `b`, seed by seed."""
  return paired([x[name] for x in b], [x[name] for x in a])


def table(rows: Rows, seeds: int) -> list[dict[str, Any]]:
  """Returns a line for each policy and speed."""
  exact, chain, sums = (points(rows, t, seeds) for t in (EXACT, CHAIN, SUMS))
  out = []
  for point in dict.fromkeys((*exact, *sums)):
    line: dict[str, Any] = {"policy": point[0], "knob": point[1]}
    for name, where in (("itself", exact), ("model", chain)):
      if point not in where:
        continue
      line[f"{name}: calls"] = mean_of(where[point], "calls").value
      line[f"{name}: nats"] = mean_of(where[point], "nats").value
      line[f"{name}: off"] = mean_of(where[point], "off")
    if point in sums:
      line["sums: calls"] = mean_of(sums[point], "calls").value
      line["sums: tokens a call"] = mean_of(sums[point], "tokens a call").value
      line["sums: GFLOP"] = mean_of(sums[point], "GFLOP").value
      line["sums: ms"] = mean_of(sums[point], "ms").value
      line["sums: right %"] = mean_of(sums[point], "row").times(100)
    out.append(line)
  return out


def verdicts(rows: Rows, seeds: int, entropy: float) -> list[Verdict]:
  """Returns what holds of D4 and of the policies.

  Args:
    rows: of all arms.
    seeds: of models.
    entropy: of the chain, nats a token.
  """
  exact, chain, sums = (points(rows, t, seeds) for t in (EXACT, CHAIN, SUMS))
  return [
    _places_matter(sums),
    *(_parallel(sums, name) for name in ADAPTIVE[:2]),
    _biased(exact, chain, entropy),
    _unbiased(exact),
    _again(exact, "on the chain itself"),
    _again(chain, "in models"),
    _fewer(chain),
  ]


def _fast(found: dict[Point, list[Row]], policy: str) -> list[Point]:
  """Returns a policy's points, slowest first."""
  mine = [point for point in found if point[0] == policy]
  return sorted(mine, key=lambda p: -mean_of(found[p], "calls").value)


def _places_matter(sums) -> Verdict:
  low, chance = (_fast(sums, p) for p in ("low confidence", "random"))
  apart = [
    less(sums[b], sums[a], "row") for a, b in zip(low, chance, strict=True)
  ]
  return Verdict(
    "sums: at every number of steps low confidence is right more often than"
    " random places",
    ", ".join(
      f"{mean_of(sums[a], 'calls').value:.0f} calls:"
      f" {mean_of(sums[a], 'row').value:.0%} and"
      f" {mean_of(sums[b], 'row').value:.0%}"
      for a, b in zip(low, chance, strict=True)
    ),
    every(map(above, apart)),
  )


def _parallel(sums, policy: str) -> Verdict:
  slow = sums[_fast(sums, "low confidence")[0]]
  right = mean_of(slow, "row")
  lost = {p: less(sums[p], slow, "row") for p in _fast(sums, policy)}
  good = [sums[p] for p, x in lost.items() if below(x, LOST)]
  best = max(
    good, key=lambda x: mean_of(x, "tokens a call").value, default=slow
  )
  saved = {name: less(best, slow, name) for name in ("GFLOP", "ms")}
  costs = ", ".join(
    f"{mean_of(best, name).value:.3g} instead of"
    f" {mean_of(slow, name).value:.3g} {name}"
    for name in saved
  )
  many = mean_of(best, "tokens a call")
  return Verdict(
    f"sums: {policy} fills over 2 tokens a call, and is as often right as one a"
    " call (1%), for fewer FLOPs and seconds",
    f"{many} tokens a call, {mean_of(best, 'row')} of rows right; {right} at"
    f" one a call; a row for {costs}",
    every((above(many, 2), *map(above, saved.values()))),
  )


def _biased(exact, chain, entropy: float) -> Verdict:
  slow = [_fast(x, "low confidence")[0] for x in (exact, chain)]
  mine = [x[p] for x, p in zip((exact, chain), slow, strict=True)]
  nats, off = ([mean_of(x, n).value for x in mine] for n in ("nats", "off"))
  chance = exact[_fast(exact, "random")[0]]
  least = mean_of(chance, "off").value
  twice = [2 * x["off"] for x in chance]
  return Verdict(
    "chain: low confidence, a token a step, does not sample: rows are likelier"
    " than the entropy, and their pairs are off",
    f"{nats[0]:.3f} (the chain itself) and {nats[1]:.3f} (models) of"
    f" {entropy:.3f} nats; pairs {off[0]:.3f} and {off[1]:.3f} off, chosen at"
    f" random {least:.3f}",
    every(
      (
        *(below(mean_of(x, "nats"), 0.95 * entropy) for x in mine),
        *(above(paired([y["off"] for y in x], twice)) for x in mine),
      )
    ),
  )


def _unbiased(exact) -> Verdict:
  names = ("random", "largest probability", "margin", "entropy")
  found = {n: exact[_fast(exact, n)[0]] for n in names}
  first = exact[_fast(exact, "first hitting")[0]]
  return Verdict(
    "chain: places chosen before their tokens leave samples as they are (as"
    " close as first hitting, 0.02)",
    ", ".join(f"{n}: {mean_of(x, 'off')}" for n, x in found.items())
    + f"; first hitting: {mean_of(first, 'off')}",
    every(below(less(first, x, "off"), 0.02) for x in found.values()),
  )


def _again(found, where: str) -> Verdict:
  mine = [found[p] for p in _fast(found, "ReMDM")]
  first = found[("first hitting", 1)]
  off = [mean_of(x, "off") for x in mine]
  nats = [mean_of(x, "nats") for x in mine]
  saved = [less(mine[0], x, "off") for x in (mine[-1], first)]
  return Verdict(
    f"chain, {where}: masking again, beyond a step a token, improves samples",
    f"pairs off {', '.join(map(str, off))} and nats"
    f" {', '.join(f'{x.value:.3f}' for x in nats)} (most steps first); first"
    f" hitting {mean_of(first, 'off')}; less off by {saved[0]} than with fewest"
    f" steps, by {saved[1]} than first hitting",
    every(map(above, saved)),
  )


def _fewer(chain) -> Verdict:
  slow = chain[("first hitting", 1)]
  half = chain[_fast(chain, "ancestral")[1]]
  cost = less(slow, half, "off")
  return Verdict(
    "chain, in models: two tokens a step by chance cost nothing (0.02)",
    f"pairs off {mean_of(half, 'off')} instead of {mean_of(slow, 'off')}:"
    f" {cost} more",
    below(cost, 0.02),
  )


def draw(
  rows: Rows, seeds: int, entropy: float, path: pathlib.Path, title: str
) -> None:
  """Draws quality against calls, of all policies, and of each task."""
  drawn = plots.figure(13, 4.4)
  panels = drawn.subplots(1, 3)
  kinds: list[tuple[str, str, str, Callable[[Mean], float]]] = [
    (EXACT, "off", "pairs off (total variation)", lambda x: x.value),
    (CHAIN, "off", "pairs off (total variation)", lambda x: x.value),
    (SUMS, "row", "rows that are right, %", lambda x: 100 * x.value),
  ]
  for axes, (task, name, label, shown) in zip(panels, kinds, strict=True):
    found = points(rows, task, seeds)
    for policy in dict.fromkeys(p[0] for p in found):
      mine = _fast(found, policy)
      number = list(
        dict.fromkeys(p[0] for t in (EXACT, SUMS) for p in points(rows, t, 1))
      )
      axes.plot(
        [mean_of(found[p], "calls").value for p in mine],
        [shown(mean_of(found[p], name)) for p in mine],
        marker="o",
        markersize=3,
        label=policy,
        **plots.style(number.index(policy)),
      )
    axes.set_xscale("log", base=2)
    axes.set(xlabel="calls of a row", ylabel=label, title=task)
    axes.grid(alpha=0.3)
  named = {
    label: line
    for axes in panels
    for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
  }
  drawn.legend(
    named.values(), named, loc="outside right", frameon=False, fontsize=7
  )
  drawn.suptitle(f"{title}; the chain's entropy is {entropy:.3f} nats a token")
  plots.save(drawn, path)
