"""Mixed-precision bit allocation: chooses each layer's format under a budget.

Measures, for each unit (a layer, a kind of matrix) and format, the KL
divergence of the model with only that unit quantized. Then chooses one format
per unit within the bit budget that minimises the sum of divergences, by exact
search. This is optimal if the divergences of units add up.
"""

import dataclasses
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from research import tree, weights
from research.nn.transformer import Transformer
from research.quant import quantize_by_rules
from research.quant.algorithms.calibrate import Calibration, NeedsModel
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
  """Solves the multiple-choice knapsack problem exactly.

  Minimises total cost within the budget; among equal costs it prefers fewer
  bits. Dynamic programming over units keeps the partial solutions that may
  still be optimal: Pareto-optimal in (bits, cost), and with a lower bound (cost
  so far plus the linear relaxation of the remaining units; Sinha and Zoltners
  1979, "The multiple-choice knapsack problem") of at most the cost of `greedy`.

  Args:
    choices: unit -> (bits, cost) of each choice, both additive over units.
    budget: total bits allowed.

  Returns:
    unit -> index of its choice.

  Raises:
    UserError: the cheapest choices exceed the budget.
  """
  known = greedy(choices, budget)
  most = sum(choices[unit][k][1] for unit, k in known.items())
  most += 1e-9 * abs(most)  # tolerance for another order of summation
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
  """Returns lower bounds of the units' cost within budgets; inf if infeasible.

  The bound is the linear relaxation: the steps of all hulls in descending
  order of gain per bit, the last one fractional.
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
  """Solves the problem of `allocate` greedily, by gain per bit.

  Optimal for the bits spent until a step exceeds the remaining budget.
  `allocate` uses the result as an upper bound.

  Raises:
    UserError: the cheapest choices exceed the budget.
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
  """Returns indices of the choices on the lower convex hull, fewest bits first.

  Along it the cost decreases, with decreasing gain per bit.
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
class Allocation(NeedsModel):
  """Transform that quantizes units with formats of least measured divergence.

  Attributes:
    formats: the formats to choose from.
    bits: average bits per weight over the matrices that `unit` matches.
    unit: regular expression, searched for in addresses; matrices with the same
      match form a unit, matrices without a match are not quantized.
    calibration: data for the rounding method's input statistics, or None.
    probe: data that divergences are measured on.
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
    del key
    return self.run(params)[0]

  def run(
    self, params: Params, log: quantize_by_rules.Log = lambda text: None
  ) -> tuple[dict[str, Any], Report]:
    """Chooses formats and quantizes `params`.

    Returns:
      (parameters, report of each matrix's errors).

    Raises:
      UserError: the budget is too small, or `unit` matches nothing.
    """
    if self.model is None:
      raise UserError("Allocation: has no model; `with_model` sets it")
    units = self.units(params)
    choices = self.measure(params, units, log)
    every = packable_weights(params)
    count = sum(
      weights.count(every[path]) for paths in units.values() for path in paths
    )
    chosen = []
    for unit, k in allocate(choices, self.bits * count).items():
      rule = self._rule(units[unit], self.formats[k])
      log(f"{unit} is quantized to {rule.format.name}")
      chosen.append(rule)
    return self._quantization(chosen).run(params, log)

  def units(self, params: Params) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for address, _ in quantize_by_rules.named_matrices(params):
      text = re.search(self.unit, address)
      if text:
        out.setdefault(text.group(), []).append(address)
    if not out:
      raise UserError(f"Allocation.unit: {self.unit!r} matches no matrix")
    return out

  def measure(
    self,
    params: Params,
    units: Mapping[str, Sequence[str]],
    log: quantize_by_rules.Log,
  ) -> dict[str, list[Choice]]:
    """Returns unit -> (bits, divergence in nats) in each format."""
    tokens = self.probe.read(self.tokenizer).tokens
    known = compare.base_outputs(self.model, params, tokens, self.probe.batch)
    every = [path for paths in units.values() for path in paths]
    old, out = packable_weights(params), {unit: [] for unit in units}
    for format in self.formats:
      packed = packable_weights(
        self._quantization([self._rule(every, format)])(params)
      )
      for unit, paths in units.items():
        new = {path: packed[path] for path in paths}
        bits = sum(8.0 * tree.nbytes(w) for w in new.values())
        mixed = with_weights(self.model, params, old | new)
        kl = compare.compare(known, self.model, mixed).kl
        out[unit].append((bits, kl))
        log(f"{unit} alone in {format.name}: divergence {kl:.5f}")
    return out

  def _rule(self, paths: Sequence[str], format: Format) -> Rule:
    pattern = "|".join(f"^{re.escape(path)}$" for path in paths)
    return Rule(match=pattern, format=format, method=self.method)

  def _quantization(self, chosen: Sequence[Rule]) -> Quantization:
    return Quantization(
      rules=tuple(chosen),
      calibration=self.calibration,
      compare=False,
      model=self.model,
      tokenizer=self.tokenizer,
    )


def packable_weights(params: Params) -> dict[str, Any]:
  """Returns address -> weight of all matrices that rules may pack."""
  layers = {
    f"layers/{i}/{path}": w
    for i, layer in enumerate(tree.layers(params))
    for path, w in quantize_by_rules.matrices(layer).items()
  }
  top = tree.outer_params(params)
  return layers | {k: top[k] for k in ("embed", "head") if k in top}


def with_weights(
  model: Transformer, params: Params, every: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns `params` with replaced matrices, all decoded so that layers stack.

  Operations on their inputs stay.

  Args:
    every: address -> weight that replaces the one of `params`.
  """

  def decoded(w: Any) -> Any:
    return weights.map_inner(w, weights.dense)

  layers = [
    tree.map_paths(
      lambda path, w, i=i: decoded(every.get(f"layers/{i}/{path}", w)),
      layer,
      is_leaf=weights.is_weight,
    )
    for i, layer in enumerate(tree.layers(params))
  ]
  outside = {k: every.get(k, w) for k, w in tree.outer_params(params).items()}
  return tree.stack(outside, layers, model.layer_kinds())
