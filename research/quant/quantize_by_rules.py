"""Mixed-precision post-training quantization by rules, with calibration.

  quantize_by_rules.Quantization(
    rules=(
      Rule(match=r"mlp/down$", format=Affine(bits=8)),
      Rule(match=r"^layers/", format=Affine(block=64), method=GPTQMethod()),
    ),
    calibration=Calibration(),
  )

The first rule whose pattern is found in a matrix's address applies:
`layers/3/attention/q`, `embed`, `head`. Other matrices are unchanged; a rule
that applies to no matrix is an error. With calibration, layers are quantized
first to last and their matrices in the order of use, each calibrated on the
outputs of the quantized ones before it (true sequential; Frantar et al. 2022,
arXiv:2210.17323).
"""

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from research import progress, tree, weights
from research.quant import methods
from research.quant.algorithms import calibrate, error_propagation
from research.quant.algorithms.calibrate import Calibration, NeedsModel
from research.quant.algorithms.outlier_rows import KeepOutlierRows
from research.quant.format import Format, format_for
from research.quant.methods import GPTQMethod, Method, RoundToNearest
from research.quant.numerics import finite
from research.quant.reports import Report, Row
from research.quant.untied_embedding import Untied
from research.taps.statistics import Covariance
from research.typing import Params, PRNGKey, UserError

Log = Callable[[str], None]

_STAGES = (
  r"attention/(q|k|v)$",
  r"attention/o$",
  r"mlp/(.+/)?(gate|up)$",
  r"mlp/(.+/)?down$",
)
_ROUTER = re.compile(r"mlp/router$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """Format and rounding method of the matrices that a pattern matches.

  Attributes:
    match: regular expression, searched for in addresses.
    format: format of these matrices; None leaves them unquantized.
  """

  match: str
  format: Format | None
  method: Method = RoundToNearest()

  def __post_init__(self):
    try:
      re.compile(self.match)
    except re.error as e:
      raise UserError(f"Rule.match: {self.match!r} is no pattern: {e}") from e


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization(NeedsModel):
  """Transform that quantizes a tree by rules.

  Attributes:
    calibration: data that inputs are measured on, or None for methods without
      calibration.
    sequential: which matrices are already quantized when inputs are measured:
      `"stages"`, earlier layers and earlier matrices of the same layer;
      `"layers"`, earlier layers; `"none"`, none, which compares methods on
      equal inputs.
    compare: whether the report includes the error of rounding to nearest.
  """

  rules: tuple[Rule, ...]
  calibration: Calibration | None = None
  sequential: Literal["stages", "layers", "none"] = "stages"
  compare: bool = True
  model: Any = None
  tokenizer: Any = None

  @property
  def calibrates(self) -> bool:
    return self.calibration is not None

  def __call__(self, params: Params, key: PRNGKey | None = None) -> Any:
    del key
    return self.run(params)[0]

  def run(
    self, params: Params, log: Log = lambda text: None
  ) -> tuple[dict[str, Any], "Report"]:
    """Quantizes `params` by the rules.

    Returns:
      (parameters, report of each matrix's errors).

    Raises:
      UserError: a rule applies to no matrix or does not fit one, a matrix is
        not finite, or a method needs calibration and there is none.
    """
    chosen = self.selected(params)
    _check_fit(params, chosen, self.calibration is not None)
    pairs = any(
      isinstance(r.method, GPTQMethod) and r.method.options.drift
      for r in chosen.values()
    )
    if pairs and self.sequential == "none":
      raise UserError(
        "GPTQ.drift: there is none with sequential = 'none', expected 0"
      )
    follow = "old" if self.sequential == "none" else "new"
    windows = None if self.calibration is None else self._windows()
    work = _Work(self, chosen, pairs, log)
    if windows is None:
      count = sum(map(len, tree.layer_indices(params).values()))
      layers = progress.track(tree.layers(params), "quantizing layers", count)
      layers = [work.alone(i, layer) for i, layer in enumerate(layers)]
    else:
      layers = work.walked(params, windows.tokens, "pairs" if pairs else follow)
    outside = {
      name: work.outside(name, w)
      for name, w in tree.outer_params(params).items()
    }
    kinds = None if self.model is None else self.model.layer_kinds()
    record = None if windows is None else windows.record()
    return (
      tree.stack(outside, [dict(x) for x in layers], kinds),
      Report(tuple(work.rows), record),
    )

  def _windows(self) -> calibrate.Windows:
    if self.model is None:
      raise UserError("Quantization: has no model; `with_model` sets it")
    return self.calibration.read(self.tokenizer)

  def selected(self, params: Params) -> dict[str, Rule]:
    """Returns address -> rule of every matrix to pack.

    Raises:
      UserError: a rule applies to no matrix.
    """
    found, used = {}, set()
    for address, _ in named_matrices(params):
      for k, rule in enumerate(self.rules):
        if re.search(rule.match, address):
          used.add(k)
          if rule.format is not None:
            found[address] = rule
          break
    for k, rule in enumerate(self.rules):
      if k not in used:
        raise UserError(
          f"Quantization: rule {k + 1}, {rule.match!r}, applies to no matrix: "
          "it matches none, or earlier rules match them first.\nMatrices are "
          f"such as {', '.join(sorted(_examples(params)))}."
        )
    return found


def named_matrices(params: Params) -> Iterator[tuple[str, Any]]:
  """Yields (address, weight) of all matrices except routers, in model order."""
  for i, layer in enumerate(tree.layers(params)):
    for path, w in matrices(layer).items():
      yield f"layers/{i}/{path}", w
  top = tree.outer_params(params)
  yield from ((name, top[name]) for name in ("embed", "head") if name in top)


def matrices(layer: Params) -> dict[str, Any]:
  """Returns path -> weight of a layer's matrices, except its router."""
  named = dict(weights.named_weights(layer))
  return {
    path: w
    for path, w in named.items()
    if len(w.shape) > 1 and not _ROUTER.search(path)
  }


def stages(paths: Sequence[str]) -> list[list[list[str]]]:
  """Groups a layer's matrices by stage, in the order of use.

  Returns:
    one list per stage, of groups of paths that multiply the same inputs.
  """
  out, left = [], list(paths)
  for pattern in _STAGES:
    groups: dict[str, list[str]] = {}
    for path in [p for p in left if re.search(pattern, p)]:
      groups.setdefault(path.rpartition("/")[0], []).append(path)
      left.remove(path)
    if groups:
      out.append(list(groups.values()))
  return out + [[[path]] for path in left]


def _check_fit(
  params: Params, chosen: dict[str, Rule], calibrated: bool
) -> None:
  """Raises UserError for a matrix that its rule does not fit.

  Runs before calibration, which takes longest.
  """
  outside = tree.outer_params(params)
  for address, w in named_matrices(params):
    rule = chosen.get(address)
    if rule is None:
      continue
    if address in outside and not _needs_no_data(rule.method):
      raise UserError(
        f"Quantization: {address} is packed without calibration, expected the "
        f"method RoundToNearest, found {rule.method.name}"
      )
    shape = w.shape if _axis(address) == -2 else w.shape[::-1]
    _check_rule(address, shape, rule, calibrated and address not in outside)
    _check_sound(address, w)


def _check_rule(
  address: str, shape: Sequence[int], rule: Rule, calibrated: bool
) -> None:
  format = format_for(address, rule.format, shape)
  try:
    rule.method.check(format, shape[-2], calibrated)
  except UserError as e:
    raise UserError(f"{address}: {e}") from e


def _check_sound(name: str, w: Any) -> None:
  """Raises UserError for a matrix that is adapted, or not finite."""
  _check_bare(name, w)
  if not weights.is_weight(w):
    finite.check(w, name)


def _needs_no_data(method: Method) -> bool:
  while isinstance(method, KeepOutlierRows):
    method = method.method
  return isinstance(method, RoundToNearest) and not method.weighted


def _axis(name: str) -> int:
  """Returns the `QTensor.axis`: an embedding's blocks run along its width."""
  return -1 if name == "embed" else -2


def _check_bare(name: str, w: Any) -> None:
  if weights.unwrap(weights.inner(w)) is not None:
    raise UserError(
      f"Quantization: {name} is adapted; quantize first, then adapt"
    )


def _examples(params: Params) -> set[str]:
  return {re.sub(r"/\d+/", "/0/", a) for a, _ in named_matrices(params)}


@dataclasses.dataclass(frozen=True)
class _Work:
  """State of one run: the selected rules and the report's rows so far."""

  how: Quantization
  chosen: dict[str, Rule]
  pairs: bool
  log: Log
  rows: list["Row"] = dataclasses.field(default_factory=list)

  def alone(self, i: int, layer: Params) -> Params:
    for path in matrices(layer):
      layer = self._replaced(layer, self._pack(i, layer, [path], None)[0])
    return layer

  def outside(self, name: str, w: Any) -> Any:
    """Returns an embedding or a head, packed if a rule applies.

    Packs both matrices of an untied embedding; the second one is reported as
    `head`.
    """
    rule = self.chosen.get(name)
    if rule is None:
      return w
    if isinstance(w, Untied):
      both = {"embed": w.table, "head": w.head}
      return Untied(
        *(self._outside(k, x, _axis(name), rule) for k, x in both.items())
      )
    return self._outside(name, w, _axis(name), rule)

  def _outside(self, name, w, axis, rule):
    w = _array(name, w)
    stored = w if axis == -2 else w.T
    packed, _ = self._one([name], [stored], None, rule)
    return dataclasses.replace(packed[0], axis=axis)

  def walked(self, params: Params, tokens: Any, follow: str) -> list[Params]:
    out = []
    count = sum(1 for _ in tree.layers(params))

    def visit(i, layer, inputs):
      start = time.perf_counter()
      dense, packed = layer, layer
      known, used = None, self._used(i, layer)
      if used and self.how.sequential != "stages":
        firsts = [group[0] for stage in used for group in stage]
        known = self._input_stats(layer, layer, inputs, firsts)
      for stage in used:
        stats = known or self._input_stats(
          layer, dense, inputs, [g[0] for g in stage]
        )
        for group in stage:
          found, plain = self._pack(i, layer, group, stats[group[0]])
          packed = self._replaced(packed, found)
          dense = self._replaced(dense, plain)
      out.append(packed)
      seconds = time.perf_counter() - start
      self.log(f"layer {i + 1}/{count}: {self._summary(i)}, {seconds:.1f} s")
      return dense

    how = self.how.calibration
    calibrate.walk(self.how.model, params, tokens, visit, how.batch, follow)
    return out

  def _used(self, i, layer):
    """Returns the stages of a layer's matrices that rules select."""
    paths = [p for p in matrices(layer) if f"layers/{i}/{p}" in self.chosen]
    return stages(paths)

  def _input_stats(self, old, new, inputs, paths):
    if self.pairs:
      return inputs.measure(
        error_propagation.pair_weights(old, new),
        paths,
        error_propagation.DriftStatistic(),
      )
    return inputs.measure(new, paths, Covariance())

  def _pack(self, i, layer, group, stats):
    """Returns ({path: packed}, {path: decoded}) of a group's matrices."""
    found, plain = {}, {}
    ws = matrices(layer)
    byrule: dict[Rule, list[str]] = {}
    for path in group:
      rule = self.chosen.get(f"layers/{i}/{path}")
      if rule is not None:
        byrule.setdefault(rule, []).append(path)
    for rule, paths in byrule.items():
      names = [f"layers/{i}/{path}" for path in paths]
      some = [_array(n, ws[p]) for n, p in zip(names, paths, strict=True)]
      packed, dense = self._one(names, some, stats, rule)
      found |= dict(zip(paths, packed, strict=True))
      plain |= dict(zip(paths, dense, strict=True))
    return found, plain

  def _one(self, names, ws, stats, rule):
    """Returns (packed, decoded) of matrices with one rule and one input."""
    fitted = [
      format_for(n, rule.format, w.shape)
      for n, w in zip(names, ws, strict=True)
    ]
    of = str(ws[0].dtype)
    packed, dense = [None] * len(ws), [None] * len(ws)
    for format in dict.fromkeys(fitted):
      at = [k for k, f in enumerate(fitted) if f == format]
      found = methods.round_matrices(
        tuple(ws[k] for k in at),
        stats,
        format,
        rule.method,
        self.how.compare,
        of,
      )
      for k, q, w, measures in zip(at, *found, strict=True):
        packed[k], dense[k] = q, w
        self.rows.append(
          Row.from_errors(names[k], q, rule.method.name, measures)
        )
    return packed, dense

  def _replaced(self, layer, found):
    def one(path, w):
      if path not in found:
        return w
      return weights.map_inner(w, lambda _: found[path])

    return tree.map_paths(one, layer, is_leaf=weights.is_weight)

  def _summary(self, i):
    mine = [r for r in self.rows if r.address.startswith(f"layers/{i}/")]
    if not mine:
      return "left alone"
    worst = max(mine, key=lambda r: r.output_error or 0)
    text = f"largest output error {worst.output_error:.4f}, {worst.address}"
    return "; ".join([text, *(w for r in mine for w in r.warnings())])


def _array(name: str, w: Any) -> jax.Array:
  """Returns a weight as a dense matrix.

  Raises:
    UserError: it is adapted, or not finite.
  """
  _check_bare(name, w)
  w = jnp.asarray(weights.dense(weights.inner(w)))
  finite.check(w, name)
  return w
