"""SmoothQuant: moves outliers from activations to weights, exactly.

Xiao et al. 2022 (arXiv:2211.10438). The output of a norm is divided by

    s_i = max|x_i|^alpha / max|w_i|^(1 - alpha)

and the matrices that multiply it are scaled by s, so that both have moderate
outliers. Maxima are over the calibration set, and over all matrices after the
norm. Inputs of `o` and `down`, which follow no norm, are not smoothed.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import taps
from research.nn.transformer import Transformer
from research.quant.algorithms import folding
from research.quant.algorithms.calibrate import Calibration, NeedsModel
from research.quant.algorithms.folding import Flat
from research.ranges import Ranged, Share
from research.taps.statistics import Magnitudes
from research.typing import Array, Float, Int, Params, PRNGKey, UserError


def scales(
  most: Float[Array, "*L D"], w: Float[Array, "*L D"], alpha: float
) -> Float[Array, "*L D"]:
  """Returns SmoothQuant's scales; 1 where activations or weights are all 0.

  Args:
    most: largest magnitude of each input.
    w: largest magnitude of each input's weights.
    alpha: 0 to 1; the larger, the smoother the activations.
  """
  s = most**alpha / jnp.maximum(w, 1e-5) ** (1 - alpha)
  return jnp.where((most > 0) & (w > 0), jnp.maximum(s, 1e-5), 1.0)


def smooth(
  model: Transformer, params: Params, found: Any, alpha: float
) -> dict[str, Any]:
  """Smooths the activations after norms; the model's outputs are unchanged.

  Args:
    found: path in `params` -> `Magnitudes` of each matrix, stacked as it is.
  """

  def layer(flat: Flat, block: Any, where: str) -> Flat:
    for norm in folding.READERS:
      paths = folding.readers(flat, norm)
      width = flat[f"{norm}/scale"].shape
      most = [
        _over_experts(found[f"{where}/{path}"]["most"], width)
        for path in paths
        if f"{where}/{path}" in found
      ]
      sizes = [
        _over_experts(
          jnp.abs(folding.dense_array(flat[path], path)).max(-1), width
        )
        for path in paths
      ]
      s = scales(_largest(most), _largest(sizes), alpha)
      flat = folding.scale_norm(flat, norm, s, block.norm.offset)
    return flat

  return folding.map_layers(layer, model, params)


def magnitudes(
  model: Transformer,
  params: Params,
  tokens: Int[Array, "N T"] | np.ndarray,
  batch: int = 4,
) -> dict[str, dict[str, Array]]:
  """Returns path in `params` -> `Magnitudes` of each matrix's inputs.

  Args:
    tokens: rows from position 0, without padding.
  """

  def loss(params, rows):
    hidden, _ = model.apply({"params": params}, rows)
    return hidden.astype(jnp.float32).sum()

  @jax.jit
  def one(params, rows):
    return taps.collect(lambda p: loss(p, rows), params, Magnitudes())

  total = None
  for i in range(0, len(tokens), batch):
    found = one(params, jnp.asarray(tokens[i : i + batch]))
    if total is not None:
      found = {k: Magnitudes().join(total[k], found[k]) for k in found}
    total = found
  return total


def _largest(arrays):
  return jnp.max(jnp.stack(arrays), axis=0)


def _over_experts(x, width):
  return x.max(-2) if x.ndim > len(width) else x


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothQuant(Ranged, NeedsModel):
  """Transform that smooths activations; follow it by `Quantize` and `Inputs`.

  Attributes:
    calibration: data that magnitudes are measured on.
    alpha: 0.5 for OPT, 0.8 for Llama.
  """

  calibration: Calibration = Calibration()
  alpha: Share = 0.5
  model: Any = None
  tokenizer: Any = None

  def __call__(
    self, params: Params, key: PRNGKey | None = None
  ) -> dict[str, Any]:
    """Returns `params` smoothed.

    Raises:
      UserError: no model is set.
    """
    del key
    if self.model is None:
      raise UserError("SmoothQuant: has no model; `with_model` sets it.")
    tokens = self.calibration.read(self.tokenizer).tokens
    batch = self.calibration.batch
    found = magnitudes(self.model, params, tokens, batch)
    return smooth(self.model, params, found, self.alpha)
