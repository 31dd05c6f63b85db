"""What points of policies say: lines, verdicts, and one picture.

A point is a policy at a speed: calls of a row, and how good the rows are. On
the chain that is nats a token under the truth, which has to be the entropy,
and the distance of pairs (`diffusion_truth.off`); on sums the share that is
right.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.claims import Verdict
from experiments.diffusion_study import Row, Rows, surely
from experiments.lora_verdicts import Mean, mean
from research.training import plots

EXACT, CHAIN, SUMS = "the chain itself", "chain", "sums"
TASKS = (CHAIN, SUMS)

QUOTA = ("low confidence", "largest probability", "margin", "entropy", "random")
ADAPTIVE = ("threshold", "factor", "hierarchy")

Point = tuple[str, Any]
"""A policy and its knob."""


def points(rows: Rows, task: str, seeds: int) -> dict[Point, list[Row]]:
  """Returns each point of a task, in every seed."""
  arms = (
    [EXACT] if task == EXACT else [f"{task}, seed {s}" for s in range(seeds)]
  )
  out: dict[Point, list[Row]] = {}
  for arm in arms:
    for point in rows[arm]["points"]:
      out.setdefault((point["policy"], point["knob"]), []).append(point)
  return out


def of(found: Sequence[Row], name: str) -> Mean:
  """Returns a number's mean over seeds."""
  return mean([point[name] for point in found])


def table(rows: Rows, seeds: int) -> list[dict[str, Any]]:
  """Returns a line for each policy and speed."""
  exact, chain, sums = (points(rows, t, seeds) for t in (EXACT, CHAIN, SUMS))
  out = []
  for point in exact:
    line: dict[str, Any] = {"policy": point[0], "knob": point[1]}
    for name, where in (("itself", exact), ("model", chain)):
      line[f"{name}: calls"] = of(where[point], "calls").value
      line[f"{name}: nats"] = of(where[point], "nats").value
      line[f"{name}: off"] = of(where[point], "off").value
    if point in sums:
      line["sums: calls"] = of(sums[point], "calls").value
      line["sums: right %"] = 100 * of(sums[point], "row").value
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
  return sorted(mine, key=lambda p: -of(found[p], "calls").value)


def _places_matter(sums) -> Verdict:
  low, chance = (_fast(sums, p) for p in ("low confidence", "random"))
  apart = [
    mean(np.subtract([x["row"] for x in sums[a]], [x["row"] for x in sums[b]]))
    for a, b in zip(low, chance, strict=True)
  ]
  return Verdict(
    "sums: at every number of steps low confidence is right more often than"
    " random places",
    ", ".join(
      f"{of(sums[a], 'calls').value:.0f} calls:"
      f" {of(sums[a], 'row').value:.0%} and {of(sums[b], 'row').value:.0%}"
      for a, b in zip(low, chance, strict=True)
    ),
    all(x.value > 0 for x in apart) and any(surely(x) for x in apart),
  )


def _parallel(sums, policy: str) -> Verdict:
  slow = of(sums[_fast(sums, "low confidence")[0]], "row")
  good = [
    p
    for p in _fast(sums, policy)
    if of(sums[p], "row").value >= slow.value - 0.01
  ]
  best = max((of(sums[p], "tokens a call").value for p in good), default=0.0)
  return Verdict(
    f"sums: {policy} fills over 2 tokens a call, and is as often right as one a"
    " call (1%)",
    f"{best:.2f} tokens a call; {slow} of rows are right at one",
    best > 2,
  )


def _biased(exact, chain, entropy: float) -> Verdict:
  slow = [_fast(x, "low confidence")[0] for x in (exact, chain)]
  nats = [
    of(x[p], "nats").value for x, p in zip((exact, chain), slow, strict=True)
  ]
  off = [
    of(x[p], "off").value for x, p in zip((exact, chain), slow, strict=True)
  ]
  least = of(exact[_fast(exact, "random")[0]], "off").value
  return Verdict(
    "chain: low confidence, a token a step, does not sample: rows are likelier"
    " than the entropy, and their pairs are off",
    f"{nats[0]:.3f} (the chain itself) and {nats[1]:.3f} (models) of"
    f" {entropy:.3f} nats; pairs {off[0]:.3f} and {off[1]:.3f} off, chosen at"
    f" random {least:.3f}",
    max(nats) < 0.95 * entropy and min(off) > 2 * least,
  )


def _unbiased(exact) -> Verdict:
  names = ("random", "largest probability", "margin", "entropy")
  off = {n: of(exact[_fast(exact, n)[0]], "off").value for n in names}
  first = of(exact[_fast(exact, "first hitting")[0]], "off").value
  return Verdict(
    "chain: places chosen before their tokens leave samples as they are (as"
    " close as first hitting, 0.02)",
    ", ".join(f"{n}: {x:.3f}" for n, x in off.items())
    + f"; first hitting: {first:.3f}",
    all(x < first + 0.02 for x in off.values()),
  )


def _again(found, where: str) -> Verdict:
  mine = _fast(found, "ReMDM")
  first = of(found[("first hitting", 1)], "off")
  off = [of(found[p], "off") for p in mine]
  nats = [of(found[p], "nats") for p in mine]
  return Verdict(
    f"chain, {where}: masking again, beyond a step a token, improves samples",
    f"pairs off {', '.join(f'{x.value:.3f}' for x in off)} and nats"
    f" {', '.join(f'{x.value:.3f}' for x in nats)} (most steps first); first"
    f" hitting {first.value:.3f}",
    off[0].value < off[-1].value and off[0].value < first.value,
  )


def _fewer(chain) -> Verdict:
  slow = of(chain[("first hitting", 1)], "off")
  half = of(chain[_fast(chain, "ancestral")[1]], "off")
  return Verdict(
    "chain, in models: two tokens a step by chance cost nothing (0.02)",
    f"pairs off {half} instead of {slow}",
    half.value < slow.value + 0.02,
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
      number = list(dict.fromkeys(p[0] for p in points(rows, EXACT, 1)))
      axes.plot(
        [of(found[p], "calls").value for p in mine],
        [shown(of(found[p], name)) for p in mine],
        marker="o",
        markersize=3,
        label=policy,
        **plots.style(number.index(policy)),
      )
    axes.set_xscale("log", base=2)
    axes.set(xlabel="calls of a row", ylabel=label, title=task)
    axes.grid(alpha=0.3)
  panels[0].legend(frameon=False, fontsize=7)
  drawn.suptitle(f"{title}; the chain's entropy is {entropy:.3f} nats a token")
  plots.save(drawn, path)
