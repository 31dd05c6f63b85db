"""Bits where they count: formats chosen layer by layer under a budget.

Each unit (a layer, a kind of matrix) is kept in each format by itself, the
rest of the model as it was, and the divergence from the model is measured. Of
all ways to choose a format for each unit within the budget, one is taken whose
divergences sum to least: the best there is, if divergences of units add up.
"""

import dataclasses
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from research import tree, weights
from research.nn.transformer import Transformer
from research.quant import quantize_by_rules
from research.quant.algorithms.calibrate import Calibration, OfModel
from research.quant.format import Format
from research.quant.methods import Method, RoundToNearest
from research.quant.quantize_by_rules import Quantization, Rule
from research.quant.reports import Report, compare
from research.typing import Float, Params, PRNGKey, UserError

Choice = tuple[float, float]
"""(bits, cost) of one unit in one format."""


def allocate(
  choices: Mapping[Hashable, Sequence[Choice]], budget: float
) -> dict[Hashable, int]:
  """Returns which choice each unit gets: none within the budget costs less.

  Of equal costs it is one of fewest bits. Units are taken in turn; of what was
  chosen for those so far, every way is kept that may still be the best: none
  has both fewer bits and less cost, and its cost with the least possible of
  the units to come (the bound of Sinha and Zoltners 1979, "The multiple-choice
  knapsack problem") is not above that of `greedy`.

  Args:
    choices: of each unit, (bits, cost), both summed over units.
    budget: of the bits of all.

  Raises:
    UserError: the cheapest choices take more than the budget.
  """
  known = greedy(choices, budget)
  most = sum(choices[unit][k][1] for unit, k in known.items())
  most += 1e-9 * abs(most)  # sums in another order
  left = list(choices.values())
  bits, cost = np.zeros(1), np.zeros(1)
  steps = []
  for given in choices.values():
    del left[0]
    each = np.asarray(given, np.float64)
    more = (bits[:, None] + each[:, 0]).ravel()
    total = (cost[:, None] + each[:, 1]).ravel()
    order = np.lexsort((total, more))
    order = order[(total + _least(left, budget - more) <= most)[order]]
    before = np.minimum.accumulate(np.append(np.inf, total[order]))[:-1]
    order = order[total[order] < before]
    bits, cost = more[order], total[order]
    steps.append(np.divmod(order, len(each)))
  found, at = {}, len(bits) - 1
  for unit, (parent, choice) in zip(
    reversed(choices), reversed(steps), strict=True
  ):
    found[unit] = int(choice[at])
    at = parent[at]
  return {unit: found[unit] for unit in choices}


def _least(
  left: Sequence[Sequence[Choice]], budgets: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
  """Returns what units cost at least within budgets; inf where none will do.

  That is if shares of choices could be had: the steps of all hulls, those that
  gain most a bit first, the last one in part.
  """
  hulls = [np.asarray([given[k] for k in hull(given)]) for given in left]
  first = np.sum([h[0] for h in hulls], axis=0) if hulls else np.zeros(2)
  moves = np.concatenate(
    [np.diff(h, axis=0) for h in hulls] or [np.zeros((0, 2))]
  )
  moves = moves[np.argsort(moves[:, 1] / moves[:, 0], kind="stable")]
  ends = np.cumsum(np.concatenate([first[None], moves]), axis=0)
  cost = np.interp(budgets, ends[:, 0], ends[:, 1])
  return np.where(budgets < first[0], np.inf, cost)


def greedy(
  choices: Mapping[Hashable, Sequence[Choice]], budget: float
) -> dict[Hashable, int]:
  """Returns choices by single steps, those first that gain most a bit.

  The best there are for what they take until a step is too large for what is
  left; `allocate` bounds its search by them.

  Args:
    choices, budget: see `allocate`.

  Raises:
    UserError: the cheapest choices take more than the budget.
  """
  hulls = {unit: hull(given) for unit, given in choices.items()}
  at = dict.fromkeys(hulls, 0)
  spent = sum(choices[unit][steps[0]][0] for unit, steps in hulls.items())
  if spent > budget:
    raise UserError(
      f"bits: the cheapest formats take {spent:.6g}, more than the budget of "
      f"{budget:.6g}; give it more, or a cheaper format"
    )
  while True:
    best = None
    for unit, steps in hulls.items():
      if at[unit] + 1 == len(steps):
        continue
      now, then = (choices[unit][steps[at[unit] + k]] for k in (0, 1))
      more = then[0] - now[0]
      gain = (now[1] - then[1]) / more
      if spent + more <= budget and (best is None or gain > best[0]):
        best = (gain, unit, more)
    if best is None:
      return {unit: steps[at[unit]] for unit, steps in hulls.items()}
    at[best[1]] += 1
    spent += best[2]


def hull(choices: Sequence[Choice]) -> list[int]:
  """Returns the choices on the lower convex hull, cheapest first.

  Each costs less than the one before, and less and less so a bit.
  """
  order = sorted(range(len(choices)), key=lambda k: choices[k])
  kept: list[int] = []
  for k in order:
    if kept and choices[k][1] >= choices[kept[-1]][1]:
      continue
    while kept and choices[kept[-1]][0] == choices[k][0]:
      kept.pop()
    while len(kept) > 1 and _slope(choices, *kept[-2:]) >= _slope(
      choices, kept[-1], k
    ):
      kept.pop()
    kept.append(k)
  return kept


def _slope(choices, a, b):
  (bits, cost), (more, less) = choices[a], choices[b]
  return (less - cost) / (more - bits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation(OfModel):
  """Quantizes with the formats that measured divergences ask for.

  Attributes:
    formats: to choose among.
    bits: of a weight, on average over what `unit` matches.
    unit: regular expression, searched for in addresses; matrices in which it
      finds the same text are kept alike, those without it left alone.
    method: how codes are chosen.
    calibration: what inputs are measured on, or None.
    probe: what divergences are measured on.
    model, tokenizer: filled in by `of`.
  """

  formats: tuple[Format, ...]
  bits: float
  unit: str = r"^layers/\d+/"
  method: Method = RoundToNearest()
  calibration: Calibration | None = None
  probe: Calibration = Calibration(windows=4, seed=1)
  model: Any = None
  tokenizer: Any = None

  def __call__(self, params: Params, key: PRNGKey | None = None) -> Any:
    """Returns `params`, packed; see `run`."""
    del key
    return self.run(params)[0]

  def run(
    self, params: Params, say: quantize_by_rules.Say = lambda text: None
  ) -> tuple[dict[str, Any], Report]:
    """Returns `params`, packed, and what became of each matrix.

    Args:
      params: any tree of weights without adapters.
      say: is told of progress.

    Raises:
      UserError: the budget is too small, or nothing matches.
    """
    if self.model is None:
      raise UserError("Allocation: has no model; `of` gives it one")
    units = self.units(params)
    choices = self.measured(params, units, say)
    every = held(params)
    count = sum(
      math.prod(every[path].shape) for paths in units.values() for path in paths
    )
    chosen = []
    for unit, k in allocate(choices, self.bits * count).items():
      rule = self._rule(units[unit], self.formats[k])
      say(f"{unit} is kept in {rule.format.name}")
      chosen.append(rule)
    return self._how(chosen).run(params, say)

  def units(self, params: Params) -> dict[str, list[str]]:
    """Returns the addresses of each unit's matrices."""
    out: dict[str, list[str]] = {}
    for address, _ in quantize_by_rules.named(params):
      text = re.search(self.unit, address)
      if text:
        out.setdefault(text.group(), []).append(address)
    if not out:
      raise UserError(f"Allocation.unit: {self.unit!r} matches no matrix")
    return out

  def measured(
    self,
    params: Params,
    units: Mapping[str, Sequence[str]],
    say: quantize_by_rules.Say,
  ) -> dict[str, list[Choice]]:
    """Returns (bits, divergence) of each unit in each format."""
    tokens = self.probe.read(self.tokenizer).tokens
    known = compare.base(self.model, params, tokens, self.probe.batch)
    every = [path for paths in units.values() for path in paths]
    old, out = held(params), {unit: [] for unit in units}
    for format in self.formats:
      packed = held(self._how([self._rule(every, format)])(params))
      for unit, paths in units.items():
        new = {path: packed[path] for path in paths}
        bits = sum(8.0 * tree.nbytes(w) for w in new.values())
        mixed = replaced(self.model, params, old | new)
        kl = compare.compare(known, self.model, mixed).kl
        out[unit].append((bits, kl))
        say(f"{unit} alone in {format.name}: divergence {kl:.5f}")
    return out

  def _rule(self, paths: Sequence[str], format: Format) -> Rule:
    pattern = "|".join(f"^{re.escape(path)}$" for path in paths)
    return Rule(match=pattern, format=format, method=self.method)

  def _how(self, chosen: Sequence[Rule]) -> Quantization:
    return Quantization(
      rules=tuple(chosen),
      calibration=self.calibration,
      compare=False,
      model=self.model,
      tokenizer=self.tokenizer,
    )


def held(params: Params) -> dict[str, Any]:
  """Returns address -> weight of all that rules may pack."""
  layers = {
    f"layers/{i}/{path}": w
    for i, layer in enumerate(tree.layers(params))
    for path, w in quantize_by_rules.matrices(layer).items()
  }
  top = tree.outer_params(params)
  return layers | {k: top[k] for k in ("embed", "head") if k in top}


def replaced(
  model: Transformer, params: Params, every: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns `params` with other matrices, decoded so that layers are alike."""
  layers = [
    tree.map_paths(
      lambda path, w, i=i: weights.dense(every.get(f"layers/{i}/{path}", w)),
      layer,
      is_leaf=weights.is_weight,
    )
    for i, layer in enumerate(tree.layers(params))
  ]
  outside = {k: every.get(k, w) for k, w in tree.outer_params(params).items()}
  return tree.stack(outside, layers, model.layer_kinds())
