"""What a training step holds in memory, by arithmetic: before anything runs.

lora.md section 5. Weights, gradients, masters and optimizer state follow from
the shapes of a tree; activations from what reverse-mode differentiation keeps
of the traced loss, whatever method, base and recomputation it has. Low-rank
methods shrink the former and not the latter.
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
  """Bytes, each kind apart.

  Attributes:
    frozen: weights that no gradient changes, as they are stored.
    learned: weights that are.
    gradients: of the learned ones.
    master: a second, exact copy of the learned ones, where they are rounded.
    optimizer: its state, and a moving average.
    activations: what the forward pass keeps for the backward pass.
    working: what one layer, or a chunk of logits, takes while it is computed.
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
    """All of it: the peak, where nothing is freed before the update."""
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
  """Bytes of a number.

  Attributes:
    weights, gradients, state: of what is learned, and of the optimizer.
    master: of a second copy; 0 for none.
  """

  weights: int = 4
  gradients: int = 4
  state: int = 4
  master: int = 0


MIXED = Precision(weights=2, gradients=2, master=4)
"""fp16 or bf16 beside a master in float32: 16 bytes a parameter with Adam."""

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
  """Returns what weights, gradients and optimizer of a run take.

  Args:
    params: a model's, or their shapes: nothing is computed.
    transforms: of an experiment, such as `Quantize()` and `Adapt()`.
    trainable: regular expression of the paths that are learned.
    optimizer: over those.
    precision: of what is learned.
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
  """Returns GaLore's memory, all else in 16 bits (lora.md 4.9).

  Each matrix of the layers, m the smaller side and n the other, has a
  projector of m r and two moments of r n numbers.

  Args:
    params: a model's, or their shapes.
    rank: r.
    state: bytes of a moment's number.
    layerwise: whether each layer's update follows its gradient, so that one
      matrix' gradient exists at a time.
  """
  projector = moments = largest = 0
  for path, x in tree.flatten_paths(params):
    if not re.match(r"run\d+/", path) or x.ndim < 3:
      moments += 2 * int(np.prod(x.shape))
      continue
    *lead, inputs, outputs = x.shape
    count, small = int(np.prod(lead)), min(inputs, outputs)
    projector += count * small * rank
    moments += 2 * count * rank * max(inputs, outputs)
    largest = max(largest, inputs * outputs)
  whole = tree.count(params)
  return Memory(
    frozen=0,
    learned=2 * whole,
    gradients=2 * (largest if layerwise else whole),
    optimizer=2 * projector + state * moments,
  )


def kept(loss: Callable[..., Any], learned: Any, *rest: Any) -> int:
  """Returns the bytes that differentiation keeps of `loss`, but its arguments.

  Those are the residuals of its trace: each distinct array that the backward
  pass needs and that was not there before.

  Args:
    loss: `(learned, *rest) -> scalar`.
    learned: differentiated in; shapes.
    *rest: shapes.
  """

  def backward(learned, *rest):
    return jax.tree.leaves(jax.vjp(lambda t: loss(t, *rest), learned)[1])

  jaxpr = jax.make_jaxpr(backward)(learned, *rest).jaxpr
  given = set(map(id, jaxpr.invars)) | set(map(id, jaxpr.constvars))
  found = {
    id(v): v.aval
    for v in jaxpr.outvars
    if isinstance(v, core.Var) and id(v) not in given
  }
  return sum(_bytes(aval) for aval in found.values())


def _bytes(aval: Any) -> int:
  if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
    return 0  # keys
  return int(np.prod(aval.shape)) * aval.dtype.itemsize


def step_memory(objective: Any, state: Any, batch: Any, key: Any) -> Memory:
  """Returns what a training step takes on one device.

  Args:
    objective: a `NextToken` or the like: has `model`, is called with
      parameters, batch and key.
    state: a `TrainState`, or its shapes.
    batch: of one microbatch, or its shapes.
    key: or its shape.
  """

  def loss(learned, *rest):
    return _loss(objective, learned, *rest)

  frozen = state.frozen
  if state.held is not None:
    frozen = tree.combine(state.held, frozen)
  arguments = (state.trainable, frozen, batch, key)
  activations = kept(loss, *arguments)
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
  """Returns what the backward pass of one layer holds.

  Those are the residuals of a model of that layer alone that keeps all.
  """
  run = tree.runs(tree.combine(learned, frozen))[0]

  def first(part):
    one = jax.tree.map(lambda x: x[:1], part[run])
    return tree.outer_params(part) | {run: one}

  learned, frozen = jax.eval_shape(lambda *x: [*map(first, x)], learned, frozen)
  model = objective.model
  stack = dataclasses.replace(model.stack, depth=len(frozen[run]))
  model = model.clone(remat="none", stack=stack)
  alone = dataclasses.replace(objective, model=model)

  def loss(learned, *rest):
    return _loss(alone, learned, *rest)

  return kept(loss, learned, frozen, batch, key)


def _logits(objective: Any, batch: Any) -> int:
  """Returns the bytes of a chunk of logits and of their gradient."""
  rows = min(objective.rows, int(np.prod(batch["tokens"].shape)))
  return 2 * 4 * rows * objective.model.vocab_size
