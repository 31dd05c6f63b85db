"""Every method of adaptation on every kind of packed matrix, and what holds.

A matrix [512, 64] is packed, adapted by each method at its defaults, and
multiplied, cut over a mesh of eight devices: rows of the batch, inputs and
outputs by two each. A cell of the table says how much of a regression's loss is
left after some steps of gradient descent, if

  a fresh adapter computes what its base does, bit by bit ("~" in front where
    it does up to rounding, "*" where the method's base is not the matrix),
  the loss falls, and
  outputs and gradients, those of inputs too, are before and after what the
    decoded matrix gives on one device;

else what does not hold. `research/quant/RESULTS.md` has the table.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.notebooks.lora_story import ABSTRACT, OPTIONS
from research import sharding, weights
from research.lora.adapted import AdaptedTensor
from research.lora.method import MatrixSpec, Method
from research.lora.methods import all_methods
from research.quant import methods, qtensor
from research.quant.algorithms.gptq import GPTQ
from research.quant.formats import ggml
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.formats.nvfp4 import NVFP4
from research.typing import Array, Float

SIZE_IN, SIZE_OUT = 512, 64
BATCH, LENGTH, CALL = 4, 8, 0
STEPS = 12

ADDRESS = "layers/0/mlp/up"
DEVICES = 8

NOT_THE_BASE = ("KaSA",)
"""Methods that take something out of their base, which no matrix gives back."""

ROUNDED = 64 * float(jnp.finfo(jnp.float32).eps)
"""Sums of 512 numbers, in two orders, differ by less, over the largest."""

CUT = 1e-3
"""The same of gradients that are sums over a whole matrix, which cancel."""


def kinds() -> dict[str, Method]:
  """Returns every method by its class's name."""
  return {
    name: kind(**OPTIONS.get(name, {}))
    for name, kind in sorted(all_methods().items())
    if name not in ABSTRACT
  }


def packings() -> dict[str, Callable[[], qtensor.QTensor]]:
  """Returns what packs the matrix, by the column's name."""

  def nearest(format):
    pack = functools.partial(qtensor.pack, format=format)
    if format.traceable:
      pack = jax.jit(pack)
    return lambda: pack(problem().w)

  return {
    "NF4 + DQ": nearest(Codebook(block=64)),
    "int4 g64": nearest(Affine(bits=4, block=64)),
    "Q4_1": nearest(ggml.TYPES["Q4_1"]),
    "Q4_K": nearest(ggml.TYPES["Q4_K"]),
    "NVFP4": nearest(NVFP4()),
    "GPTQ act-order": _ordered,
  }


@functools.cache
def packed(name: str) -> qtensor.QTensor:
  """Returns the matrix in a packing."""
  return jax.tree.map(jnp.asarray, packings()[name]())


def _ordered() -> qtensor.QTensor:
  """Returns the matrix by GPTQ, rows of large inputs first."""
  x = problem().x.reshape(-1, SIZE_IN)
  seen = {
    "xx": jnp.asarray(x.T @ x),
    "n": jnp.full((1,), float(len(x)), jnp.float32),
  }
  method = methods.GPTQMethod(options=GPTQ(order="activations"))
  ws = (jnp.asarray(problem().w),)
  (q,), _, _ = methods.round_matrices(
    ws, seen, Affine(bits=4, block=64), method
  )
  return q


@dataclasses.dataclass(frozen=True)
class Problem:
  """A regression.

  Attributes:
    w: `[I, O]`, to be packed.
    x: `[B, T, I]`; some inputs are much larger than others.
    y: `[B, T, O]`, of another matrix.
    tokens: `[B, T]`, with a call of the methods that wait for one.
  """

  w: np.ndarray
  x: np.ndarray
  y: np.ndarray
  tokens: np.ndarray


@functools.cache
def problem() -> Problem:
  """Returns what every cell is about."""
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  w = draw(SIZE_IN, SIZE_OUT) * SIZE_IN**-0.5
  moved = w * (1 + 0.3 * draw(SIZE_OUT)) * (1 + 0.3 * draw(SIZE_IN, 1))
  moved += draw(SIZE_IN, 4) @ draw(4, SIZE_OUT) * 0.4 * SIZE_IN**-0.5
  x = draw(BATCH, LENGTH, SIZE_IN) * np.exp(0.5 * draw(SIZE_IN))
  tokens = np.ones((BATCH, LENGTH), np.int32)
  tokens[:, 1] = CALL
  return Problem(w, x, x @ moved, tokens)


def started(name: str, w: qtensor.QTensor) -> AdaptedTensor:
  """Returns a fresh adapter of a method around a packed matrix."""
  method = kinds()[name].for_matrix(ADDRESS, {ADDRESS: (SIZE_IN, SIZE_OUT)})
  place = MatrixSpec(SIZE_IN, SIZE_OUT)
  arrays = _start(
    method, place, jax.random.key(0), w, _calibration_inputs(name, w)
  )
  t = AdaptedTensor(w, *arrays, method=method)
  return t.with_tokens(jnp.asarray(problem().tokens), None)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(
  method: Method, place: MatrixSpec, key: Any, w: Any, seen: Any
) -> Any:
  return method.init_arrays(key, place, w, seen)


_dense = jax.jit(weights.dense)


def _calibration_inputs(name: str, w: qtensor.QTensor) -> np.ndarray | None:
  """Returns what a method's start has to know of the inputs, or None."""
  x = problem().x.reshape(-1, SIZE_IN)
  if name == "CorDA":
    return x.T @ x / len(x)
  if name == "EVA":
    return np.linalg.svd(x, full_matrices=False)[2][: kinds()[name].rank]
  if name == "LoRAGA":
    data = jnp.asarray(problem().x), jnp.asarray(problem().y)
    slope = jax.jit(jax.grad(lambda w: _loss(w, *data)[0]))
    return np.asarray(slope(_dense(w)))
  return None


def _loss(w, x, y):
  """Returns (loss, outputs)."""
  out = weights.einsum("...d,df->...f", x, w)
  return ((out - y) ** 2).mean(), out


def step(
  trained: Any, rest: AdaptedTensor, x: Any, y: Any
) -> tuple[Float[Array, ""], Float[Array, "B T O"], Any, Float[Array, "B T I"]]:
  """Returns (loss, outputs, gradients of what is trained and of inputs)."""

  def loss(trained, x):
    return _loss(dataclasses.replace(rest, trained=trained), x, y)

  f = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  (value, out), (grads, dx) = f(trained, x)
  return value, out, grads, dx


@dataclasses.dataclass(frozen=True)
class Cell:
  """What holds of a method on a packed matrix.

  Attributes:
    start: of a fresh adapter's outputs, the largest difference to its base's,
      over the largest output.
    left: loss at the end over that at the start.
    cut: the largest difference that the mesh and the packing make, of outputs
      and of gradients, over the largest.
    based: whether the method's base is the matrix.
  """

  start: float
  left: float
  cut: float
  based: bool = True

  @property
  def text(self) -> str:
    """Returns the table's text."""
    wrong = []
    if self.based and not self.start <= ROUNDED:
      wrong.append(f"starts {self.start:.1g} off")
    if not self.left < 1:
      wrong.append(f"{self.left:.3f} of the loss left")
    if not self.cut <= CUT:
      wrong.append(f"{self.cut:.1g} off when cut")
    if wrong:
      return ", ".join(wrong)
    mark = "*" if not self.based else "~" if self.start else ""
    return f"{mark}{self.left:.3f}"


def cell(name: str, packing: str) -> Cell:
  """Computes a cell of the table."""
  p, w = problem(), packed(packing)
  t = started(name, w)
  run, base = _cut(t), _base(packing)
  whole = dataclasses.replace(t, w=_dense(w), trained={})
  first = run(t.trained)
  trained, value = descended(run, t.trained, first)
  cut = 0.0
  for at, found in ((t.trained, first), (trained, run(trained))):
    want = _alone(at, whole, p.x, p.y)
    cut = max(cut, *map(_relative_error, found, want))
  start, left = _relative_error(first[1], base), value / float(first[0])
  return Cell(start, left, cut, name not in NOT_THE_BASE)


_alone = jax.jit(step)


@functools.cache
def _mesh() -> tuple[sharding.Layout, Any]:
  layout = sharding.Layout(data=2, fsdp=2, tensor=2)
  return layout, layout.mesh(jax.devices()[:DEVICES])


def _placed(w: Any) -> Any:
  """Returns where a weight's parts lie."""
  layout, mesh = _mesh()
  return layout.shardings({"mlp": {"up": w}}, mesh)["mlp"]["up"]


@functools.cache
def _base(packing: str) -> Float[Array, "B T O"]:
  """Returns outputs of the base alone, over the mesh."""
  (layout, mesh), w = _mesh(), packed(packing)
  x = jax.device_put(problem().x, layout.batch(mesh))
  with jax.set_mesh(mesh):
    f = jax.jit(functools.partial(weights.einsum, "...d,df->...f"))
    return f(x, jax.device_put(w, _placed(w)))


def _cut(t: AdaptedTensor) -> Callable[[Any], Any]:
  """Returns `step` over the mesh, as a function of the trained arrays."""
  (layout, mesh), p = _mesh(), problem()
  rows = layout.batch(mesh)
  where = _placed(dataclasses.replace(t, gate=None))
  if t.gate is not None:
    where = dataclasses.replace(where, gate=rows)
  rest = dataclasses.replace(t, trained={})
  rest = jax.device_put(rest, dataclasses.replace(where, trained={}))
  x, y = jax.device_put((p.x, p.y), rows)
  program = jax.jit(step)

  def run(trained):
    with jax.set_mesh(mesh):
      return program(jax.device_put(trained, where.trained), rest, x, y)

  return run


def descended(
  run: Callable[[Any], Any], trained: Any, first: Any
) -> tuple[Any, float]:
  """Returns (arrays, loss) after steps along the gradient.

  A step is as long as the last one and a half if the loss fell, else it is
  taken back and the next is a quarter of it: no rate is tuned to a method.
  """
  value, grads = float(first[0]), first[2]
  size, best = 0.1, trained
  for _ in range(STEPS):
    length = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in grads.values()))
    tried = {
      k: np.asarray(x) - np.float32(size / length) * np.asarray(grads[k])
      for k, x in best.items()
    }
    now, _, slopes, _ = run(tried)
    if float(now) < value:
      best, value, grads, size = tried, float(now), slopes, 1.5 * size
    else:
      size /= 4
  return best, value


def _relative_error(a: Any, b: Any) -> float:
  """Returns the largest difference of arrays, over the largest of `b`."""
  a, b = (jax.tree.map(np.asarray, x) for x in (a, b))
  top = max(float(np.abs(x).max()) for x in jax.tree.leaves(b))
  gaps = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), a, b)
  return max(jax.tree.leaves(gaps)) / top
