"""AWQ: activation-aware weight quantization (scaling and clipping).

Lin et al. 2023 (arXiv:2306.00978). AWQ rounds `s w` and divides the inputs by
s > 0; with `s = mean|x|^alpha` weights of large activations are rounded more
finely. The division is folded into the preceding norm, `v` or `up`, so the
model is unchanged until it is packed. Alpha minimises the squared error of the
module's outputs (attention for q, k, v; the feed-forward for gate and up; o and
down by themselves) on inputs from the unquantized model. Query heads that share
a value head share its scales, so `o` is scaled in grouped-query attention, too.

Then the range of each group of each output is clipped to minimise the error of
that group's contribution. Queries and keys are not clipped, since attention is
not linear in them.
"""

import dataclasses
from typing import Any, Literal

import numpy as np
from flax import traverse_util

from research import tree, weights
from research.quant.algorithms import awq_search, calibrate, folding
from research.quant.algorithms.calibrate import Calibration, NeedsModel
from research.quant.format import Format, format_for
from research.quant.formats.affine import Affine
from research.quant.numerics import finite
from research.ranges import PositiveInt, Ranged
from research.taps.statistics import Covariance, Magnitudes
from research.typing import Array, Int, Params, PRNGKey, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQ(Ranged, NeedsModel):
  """Transform that scales and clips; follow it by `Quantize` of that format.

  Does not scale experts' `down`, which few tokens reach.

  Attributes:
    steps: alphas are `i / steps`, i < steps.
    duo: whether scales are divided by the weights' relative magnitudes to the
      power 1 - alpha (AutoAWQ); the search includes no scaling.
    loss: `"module"`, or `"diag"`, `Σ (mean|x_i| Δw_io)²`, which needs no
      forward pass.
    clip: whether ranges are clipped.
  """

  calibration: Calibration = Calibration(windows=4)
  format: Format = Affine(bits=4, block=64)
  steps: PositiveInt = 20
  duo: bool = True
  loss: Literal["module", "diag"] = "module"
  clip: bool = True
  model: Any = None
  tokenizer: Any = None

  def check(self, params: Params) -> None:
    """Raises UserError for what cannot be scaled, quantized or clipped.

    Checks that matrices are finite here, since a compiled encoder cannot raise.
    """
    for i, block in enumerate(self.model.layer_kinds()):
      a = block.attention
      if a.v_norm is not None or a.values == "keys" or a.kv != "own":
        raise UserError(
          f"AWQ: layers/{i}: found values that are normalised, are keys, or are"
          " shared with other layers, as in Gemma 4; their scales cannot be"
          " moved to o.\nTake another method."
        )
    for i, layer in enumerate(tree.layers(params)):
      flat = traverse_util.flatten_dict(layer, sep="/")
      for path in awq_search.rounded_paths(flat):
        where, shape = f"AWQ: layers/{i}/{path}", flat[path].shape
        if not weights.is_weight(flat[path]):
          finite.check(flat[path], where)
        format = format_for(where, self.format, shape)
        cut = self.clip and path in awq_search.CLIPPED
        if cut and not format.separable:
          raise UserError(
            f"{where}: outputs share scales in {format.name}, so that their "
            "ranges cannot be clipped separately; expected AWQ.clip = False, "
            "or another format or block"
          )

  def __call__(
    self, params: Params, key: PRNGKey | None = None
  ) -> dict[str, Any]:
    """Returns `params` scaled and clipped, ready to be packed.

    Raises:
      UserError: no model is set, or the format does not fit, see `check`.
    """
    del key
    if self.model is None:
      raise UserError("AWQ: has no model; `with_model` sets it.")
    self.check(params)
    windows = self.calibration.read(self.tokenizer)
    return self.scale_and_clip(params, windows.tokens)[0]

  def scale_and_clip(
    self, params: Params, tokens: Int[Array, "N T"] | np.ndarray
  ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns (`params` scaled and clipped, a report per layer).

    Args:
      tokens: calibration tokens, without padding.

    Returns:
      reports contain, for qkv, o, mlp and down, the losses (without scales,
      then of each alpha) and the chosen alpha (-1 for no scales). Without a
      gate, down is not scaled: its inputs come from the activation.
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

    def visit(i: int, layer: Params, inputs: calibrate.LayerInputs) -> Params:
      del i
      flat = traverse_util.flatten_dict(layer, sep="/")
      flat = {path: folding.dense_array(w, path) for path, w in flat.items()}
      paths = [p for p in ("attention/o", "mlp/down") if p in flat]
      xx = inputs.measure(layer, paths, Covariance())
      sizes = inputs.measure(layer, paths, Magnitudes())
      seen = {
        p: (sizes[p]["sizes"] / sizes[p]["n"], xx[p]["xx"] / xx[p]["n"])
        for p in paths
      }
      new, report = awq_search.search_layer(
        search, inputs.block, flat, inputs.x, seen
      )
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
