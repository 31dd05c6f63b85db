"""Static activation quantization: scales from calibration.

SmoothQuant's fastest form (O3; Xiao et al. 2022, arXiv:2211.10438, section 5):
one scale per matrix, from the largest magnitude of its inputs on a calibration
text. Larger values at run time are clipped.
"""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp

from research import tree, weights
from research.quant.activations import LINEAR, InputTensor, Round
from research.quant.algorithms import smoothquant
from research.quant.algorithms.calibrate import Calibration, NeedsModel
from research.typing import Params, PRNGKey, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticInputs(NeedsModel):
  """Transform that adds static activation quantization.

  `activations.Inputs` is the dynamic form, with a scale per token.

  Attributes:
    op: rounding with one scale per tensor and no zero point.
    targets: regular expression, searched for in a matrix's path.
  """

  calibration: Calibration = Calibration()
  op: Round = Round(per="tensor")
  targets: str = LINEAR
  model: Any = None
  tokenizer: Any = None

  def __post_init__(self):
    if self.op.per != "tensor" or not self.op.symmetric:
      raise UserError(
        "StaticInputs.op: calibration gives one scale per tensor and no zero"
        " point.\nExpected per='tensor' and symmetric=True."
      )

  def __call__(
    self, params: Params, key: PRNGKey | None = None
  ) -> dict[str, Any]:
    """Returns `params` whose matrices round their inputs with static scales.

    Raises:
      UserError: no model is set, or no path matches.
    """
    del key
    if self.model is None:
      raise UserError("StaticInputs: has no model; `with_model` sets it.")
    tokens = self.calibration.read(self.tokenizer).tokens
    found = smoothquant.magnitudes(
      self.model, params, tokens, self.calibration.batch
    )
    chosen = [path for path in found if re.search(self.targets, path)]
    if not chosen:
      raise UserError(
        f"StaticInputs.targets: {self.targets!r} matches no matrix."
      )

    def one(path: str, w: Any) -> Any:
      if path not in chosen:
        return w
      # One scale per layer of a run; a layer's experts share one.
      most = found[path]["most"]
      most = most.reshape(most.shape[0], -1).max(-1)
      scale = self.op.clip * most / self.op.top
      scale = jnp.where(scale > 0, scale, 1.0)
      return weights.map_inner(w, lambda w: InputTensor(w, scale, self.op))

    return tree.map_paths(one, params, is_leaf=weights.is_weight)
