"""AWQ: scales that protect the weights behind large activations, folded away.

Lin et al. 2023 (arXiv:2306.00978). A matrix is rounded as `s w`, its inputs
are divided by s > 0; with `s = mean|x|^alpha` the weights that meet large
activations are rounded more finely. What divides the inputs is folded into a
norm, `v` or `up`, so the model stays what it was until it is packed. Alpha is
chosen by what it is for: the squared error of the module's outputs (attention
for q, k, v; the feed-forward for gate and up; o and down by themselves), on
inputs from the unrounded model. Query heads that share a value head share its
scales, so `o` is scaled in grouped attention, too.

Then ranges are cut, each group of each output for itself, as its own outputs'
error says; queries and keys are left (their products are not linear in them).
"""

import dataclasses
from typing import Any, Literal

import numpy as np
from flax import traverse_util

from research import tree, weights
from research.quant.algorithms import awq_search, calibrate, folding
from research.quant.algorithms.calibrate import Calibration, OfModel
from research.quant.format import Format, fit
from research.quant.formats.affine import Affine
from research.quant.numerics import finite
from research.taps.statistics import Covariance, Magnitudes
from research.typing import Array, Int, Params, PRNGKey, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQ(OfModel):
  """The transform; `Quantize` with the same format comes after it.

  Experts' `down` is left: its inputs are those of few tokens.

  Attributes:
    calibration: what is read.
    format: what the matrices will be packed in.
    steps: alphas are `i / steps`, i < steps; the largest is below 1.
    duo: whether scales are over weights' sizes to the power 1 - alpha
      (AutoAWQ); no scaling at all is tried as well.
    loss: `"module"`, or `"diag"`, `Σ (mean|x_i| Δw_io)²`, which runs nothing.
    clip: whether ranges are cut.
    model, tokenizer: whose weights these are, given by `of`.
  """

  calibration: Calibration = Calibration(windows=4)
  format: Format = Affine(bits=4, block=64)
  steps: int = 20
  duo: bool = True
  loss: Literal["module", "diag"] = "module"
  clip: bool = True
  model: Any = None
  tokenizer: Any = None

  def __post_init__(self):
    if self.steps < 1:
      raise UserError(f"AWQ.steps: found {self.steps}, expected at least 1.")

  def check(self, params: Params) -> None:
    """Raises UserError where the format cannot hold a matrix, or be cut.

    Also where a matrix is not finite: encoders would say so inside a program.
    """
    for i, layer in enumerate(tree.layers(params)):
      flat = traverse_util.flatten_dict(layer, sep="/")
      for path in awq_search.rounded_paths(flat):
        where, shape = f"AWQ: layers/{i}/{path}", flat[path].shape
        if not weights.is_weight(flat[path]):
          finite.check(flat[path], where)
        format = fit(where, self.format, shape)
        cut = self.clip and path in awq_search.CLIPPED
        if cut and not format.separable:
          raise UserError(
            f"{where}: outputs share scales in {format.name}, so that no "
            "range can be cut for itself; expected AWQ.clip = False, or "
            "another format or block"
          )

  def __call__(
    self, params: Params, key: PRNGKey | None = None
  ) -> dict[str, Any]:
    """Returns `params` scaled and cut, ready to be packed.

    Raises:
      UserError: no model yet, or a format that does not fit, see `check`.
    """
    del key
    if self.model is None:
      raise UserError("AWQ: has no model; `of` gives it one.")
    self.check(params)
    windows = self.calibration.read(self.tokenizer)
    return self.scaled(params, windows.tokens)[0]

  def scaled(
    self, params: Params, tokens: Int[Array, "N T"] | np.ndarray
  ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns (`params` scaled and cut, a report of each layer).

    Args:
      params: matrices as arrays, or packed, which are decoded.
      tokens: what the model reads, all of it real.

    Returns:
      reports have, for each place, the losses without scales and of each
      alpha, and the alpha that was chosen (-1 for none).
    """
    self.check(params)
    reports = []
    search = awq_search.Search(
      format=self.format,
      steps=self.steps,
      duo=self.duo,
      diagonal=self.loss == "diag",
      clip=self.clip,
    )

    def visit(i: int, layer: Params, inputs: calibrate.Inputs) -> Params:
      del i
      flat = traverse_util.flatten_dict(layer, sep="/")
      flat = {path: folding.array(w, path) for path, w in flat.items()}
      paths = [p for p in ("attention/o", "mlp/down") if p in flat]
      xx = inputs.seen(layer, paths, Covariance())
      sizes = inputs.seen(layer, paths, Magnitudes())
      seen = {
        p: (sizes[p]["sizes"] / sizes[p]["n"], xx[p]["xx"] / xx[p]["n"])
        for p in paths
      }
      new, report = awq_search.layer(search, inputs.block, flat, inputs.x, seen)
      reports.append(report)
      return traverse_util.unflatten_dict(new, sep="/")

    out = calibrate.walk(
      self.model,
      params,
      tokens,
      visit,
      batch=self.calibration.batch,
      follow="old",
    )
    return out, reports
