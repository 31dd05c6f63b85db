"""SpinQuant: learns the rotation of the residual stream.

Liu et al. 2024 (arXiv:2405.16406). All rotations preserve the unquantized
model, but some suit quantized activations better. R1 is initialised to a random
Hadamard matrix and trained on the loss of the model with rounded activations,
by gradient descent on the manifold of orthogonal matrices (Li et al. 2020,
arXiv:2002.01113). For a gradient G,

    A = (G Rᵀ - R Gᵀ) / 2,   R <- (I + t/2 A)^-1 (I - t/2 A) R

is the Cayley transform, solved exactly here: R stays orthogonal, and no step
increases the loss to first order.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.nn.transformer import Transformer
from research.quant import activations
from research.quant.activations import Op, Round
from research.quant.algorithms import rotate
from research.quant.algorithms.calibrate import Calibration, NeedsModel
from research.quant.numerics import hadamard
from research.ranges import PositiveFloat, PositiveInt, Ranged
from research.typing import Array, Float, Int, Params, PRNGKey, UserError


def cayley_step(
  r: Float[Array, "D D"], gradient: Float[Array, "D D"], rate: Any
) -> Float[Array, "D D"]:
  """Returns the orthogonal matrix after one descent step.

  Args:
    rate: maximum step size; reduced if A is large.
  """
  both = gradient @ r.T
  a = (both - both.T) / 2
  most = jnp.max(jnp.sum(jnp.abs(a), axis=0))
  half = 0.5 * jnp.minimum(rate, 1 / (most + 1e-8)) * a
  eye = jnp.eye(len(r), dtype=r.dtype)
  return jnp.linalg.solve(eye + half, (eye - half) @ r)


def loss(
  model: Transformer,
  params: Params,
  r: Float[Array, "D D"],
  tokens: Int[Array, "B T"],
  op: Op,
) -> Float[Array, ""]:
  """Returns the mean next-token loss in nats, with activations under `op`.

  Args:
    params: its parameters, arrays, with norms of gain 1, see
      `rotate.fold_norms`.
    op: operation on the inputs of all matrices except router and head.
  """
  turned = rotate.rotate_residual(model, params, r)
  turned = activations.Inputs(op=op)(turned)
  hidden, _ = model.apply({"params": turned}, tokens)
  logits = model.apply({"params": turned}, hidden[:, :-1], method="logits")
  log_p = jax.nn.log_softmax(logits)
  found = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)
  return -jnp.mean(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpinQuant(Ranged, NeedsModel):
  """Transform like `rotate.Rotate`, with a learned R1.

  Attributes:
    calibration: training data; a step uses `batch` of its windows.
    op: rounding of activations while R1 is trained.
    rate: first step size; it decreases along a cosine.
    values, hidden: see `rotate.Rotate`.
  """

  calibration: Calibration = Calibration(windows=32, length=128, batch=4)
  op: Op = Round(bits=4)
  steps: PositiveInt = 100
  rate: PositiveFloat = 1.5
  values: bool = True
  hidden: bool = True
  model: Any = None
  tokenizer: Any = None

  @property
  def rotates_residual(self) -> bool:
    return True

  def __call__(self, params: Params, key: PRNGKey) -> dict[str, Any]:
    """Returns `params` rotated; norms are folded, the head is untied.

    Raises:
      UserError: no model is set, or it cannot be rotated.
    """
    if self.model is None:
      raise UserError("SpinQuant: has no model; `with_model` sets it.")
    first, second = jax.random.split(key)
    tokens = self.calibration.read(self.tokenizer).tokens
    values = None
    if self.values:
      size = rotate.head_dim(self.model)
      values = hadamard.random_matrix(second, size)
    prepared = rotate.rotate_model(
      self.model, params, None, values, self.hidden
    )
    r = hadamard.random_matrix(first, self.model.width)
    r, _ = self.learn_rotation(prepared, r, tokens)
    return rotate.rotate_model(self.model, params, r, values, self.hidden)

  def learn_rotation(
    self,
    params: Params,
    r: Float[Array, "D D"],
    tokens: Int[Array, "N T"] | np.ndarray,
  ) -> tuple[Float[Array, "D D"], list[float]]:
    """Trains R1; returns (R1, the loss before each step).

    Args:
      params: parameters with all other rotations applied.
    """
    folded = rotate.fold_norms(self.model, params)
    model = self.model.clone(remat="layer")

    @jax.jit
    def step(folded, r, rows, rate):
      value, gradient = jax.value_and_grad(loss, argnums=2)(
        model, folded, r, rows, self.op
      )
      return cayley_step(r, gradient, rate), value

    losses = []
    turn = np.pi * np.arange(self.steps) / self.steps
    rates = self.rate * (1 + np.cos(turn)) / 2
    for rows, rate in zip(self._rows(tokens), rates, strict=False):
      r, value = step(folded, r, rows, float(rate))
      losses.append(value)
    return r, [float(value) for value in losses]

  def _rows(self, tokens) -> Iterator[Any]:
    """Yields one batch per step, cycling through the rows."""
    batch = min(self.calibration.batch, len(tokens))
    count = len(tokens) // batch
    for i in range(self.steps):
      start = i % count * batch
      yield jnp.asarray(tokens[start : start + batch])
