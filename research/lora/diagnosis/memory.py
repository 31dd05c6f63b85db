"""Estimates a training step's memory from shapes, without running it.

research/lora/MATH.md 6. Weights, gradients, master weights and optimizer state
follow from the tree's shapes; activations from the residuals that reverse-mode
differentiation saves of the traced loss, for any method, base and
rematerialisation. Low-rank methods reduce the former, not the latter.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.extend import core

from research import tree
from research.typing import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
  """Memory of a training step in bytes, by kind.

  Attributes:
    frozen: weights without gradients, in their storage format.
    master: full-precision copy of the trained weights in mixed precision.
    optimizer: optimizer state and moving average of the weights.
    activations: residuals that the forward pass saves for the backward pass.
    working: temporary memory of one layer or one chunk of logits.
  """

  frozen: int
  learned: int
  gradients: int
  master: int = 0
  optimizer: int
  activations: int = 0
  working: int = 0

  @property
  def total(self) -> int:
    """The sum: the peak memory if nothing is freed before the update."""
    return sum(dataclasses.astuple(self))

  def __str__(self) -> str:
    parts = [
      f"{name} {value / 1e9:.2f}"
      for name, value in dataclasses.asdict(self).items()
      if value
    ]
    whole = f"{self.total / 1e9:.1f} GB ({self.total / 2**30:.1f} GiB)"
    return f"{' + '.join(parts)} = {whole}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
  """Bytes per element.

  Attributes:
    weights, gradients, state: bytes of trained weights, gradients, optimizer
      state.
    master: bytes of master weights; 0 for none.
  """

  weights: int = 4
  gradients: int = 4
  state: int = 4
  master: int = 0


MIXED = Precision(weights=2, gradients=2, master=4)
"""fp16 or bf16 with float32 master weights: 16 bytes a parameter with Adam."""

HALF = Precision(weights=2, gradients=2, state=2)
"""All in 16 bits: 8 bytes a parameter with Adam."""

ADAM = optax.scale_by_adam()

Transform = Callable[[Params, Any], Params]


def lora_memory(
  params: Params,
  transforms: Sequence[Transform] = (),
  trainable: str = r"/trained/",
  optimizer: optax.GradientTransformation = ADAM,
  precision: Precision = Precision(),
) -> Memory:
  """Returns the memory of a run's weights, gradients and optimizer.

  Args:
    transforms: an experiment's transforms, such as `Quantize()` and `Adapt()`.
    trainable: regular expression of the trained paths.
    precision: bytes per element of the trained part.
  """
  key = jax.eval_shape(jax.random.key, 0)
  for transform in transforms:
    params = jax.eval_shape(transform, params, key)
  learned, frozen = tree.partition(params, trainable)
  count = tree.count(learned)
  state = jax.eval_shape(optimizer.init, learned)
  numbers = [x for x in jax.tree.leaves(state) if x.ndim]
  return Memory(
    frozen=tree.nbytes(frozen),
    learned=count * precision.weights,
    gradients=count * precision.gradients,
    master=count * precision.master,
    optimizer=tree.count(numbers) * precision.state,
  )


def galore_memory(
  params: Params, rank: int, state: int = 2, layerwise: bool = False
) -> Memory:
  """Returns GaLore's memory in 16 bits (research/lora/MATH.md 5).

  A matrix of a layer with smaller side m and larger side n has a projector of
  m r elements and two moments of r n elements.

  Args:
    rank: r; at most m of each matrix.
    state: bytes per element of a moment.
    layerwise: whether each layer is updated as soon as its gradient exists, so
      that memory holds one matrix's gradient at a time.
  """
  projector = moments = largest = 0
  for path, x in tree.flatten_paths(params):
    if not re.match(r"run\d+/", path) or x.ndim < 3:
      moments += 2 * int(np.prod(x.shape))
      continue
    *lead, inputs, outputs = x.shape
    count, small = int(np.prod(lead)), min(inputs, outputs)
    least = min(rank, small)
    projector += count * small * least
    moments += 2 * count * least * max(inputs, outputs)
    largest = max(largest, inputs * outputs)
  whole = tree.count(params)
  return Memory(
    frozen=0,
    learned=2 * whole,
    gradients=2 * (largest if layerwise else whole),
    optimizer=2 * projector + state * moments,
  )


def residual_bytes(loss: Callable[..., Any], learned: Any, *rest: Any) -> int:
  """Returns the bytes of the residuals of `loss`, arguments not counted.

  Residuals are the distinct arrays that the traced forward pass saves for the
  backward pass.

  Args:
    loss: `(learned, *rest) -> scalar`.
    learned: shapes of the arguments to differentiate by.
    *rest: shapes of the other arguments.
  """

  def backward(learned, *rest):
    return jax.tree.leaves(jax.vjp(lambda t: loss(t, *rest), learned)[1])

  jaxpr = jax.make_jaxpr(backward)(learned, *rest).jaxpr
  inputs = set(map(id, jaxpr.invars)) | set(map(id, jaxpr.constvars))
  residuals = {
    id(v): v.aval
    for v in jaxpr.outvars
    if isinstance(v, core.Var) and id(v) not in inputs
  }
  return sum(_bytes(aval) for aval in residuals.values())


def _bytes(aval: Any) -> int:
  if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
    return 0  # keys
  return int(np.prod(aval.shape)) * aval.dtype.itemsize


def step_memory(objective: Any, state: Any, batch: Any, key: Any) -> Memory:
  """Returns a training step's memory on one device.

  Args:
    state: a `TrainState` or its shapes.
  """

  def loss(learned, *rest):
    return _loss(objective, learned, *rest)

  frozen = state.frozen
  if state.transformed is not None:
    frozen = tree.combine(state.transformed, frozen)
  arguments = (state.trainable, frozen, batch, key)
  activations = residual_bytes(loss, *arguments)
  working = max(_layer(objective, *arguments), _logits(objective, batch))
  learned = tree.nbytes(state.trainable)
  return Memory(
    frozen=tree.nbytes(frozen) + tree.nbytes(dict(batch)),
    learned=learned,
    gradients=learned,
    optimizer=tree.nbytes((state.opt_state, state.ema)),
    activations=activations,
    working=working,
  )


def _loss(objective, learned, frozen, batch, key):
  return objective(tree.combine(learned, frozen), batch, key)[0]


def _layer(objective, learned, frozen, batch, key) -> int:
  """Returns the bytes that the backward pass of one layer holds.

  These are the residuals of a one-layer model without rematerialisation.
  """
  run = tree.runs(tree.combine(learned, frozen))[0]

  def first(part):
    layer_params = jax.tree.map(lambda x: x[:1], part[run])
    return tree.outer_params(part) | {run: layer_params}

  learned, frozen = jax.eval_shape(lambda *x: [*map(first, x)], learned, frozen)
  model = objective.model
  stack = dataclasses.replace(model.stack, depth=len(frozen[run]))
  model = model.clone(remat="none", stack=stack)
  alone = dataclasses.replace(objective, model=model)

  def loss(learned, *rest):
    return _loss(alone, learned, *rest)

  return residual_bytes(loss, learned, frozen, batch, key)


def _logits(objective: Any, batch: Any) -> int:
  rows = min(objective.rows, int(np.prod(batch["tokens"].shape)))
  return 2 * 4 * rows * objective.model.vocab_size
