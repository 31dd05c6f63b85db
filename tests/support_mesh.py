"""Tiny models of every kind of tree, and their training step on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research import sharding, tree
from research.interop.gguf import tensor_types
from research.lora import adapt, wrap
from research.lora.methods.lora import LoRA
from research.lora.methods.mora import MoRA
from research.nn.moe.routing import Routing
from research.nn.presets import Sparse
from research.quant.formats import ggml
from research.training import state, step
from research.training.objectives.experts import Balance
from research.training.objectives.objective import NextToken
from tests import support

BATCH, LENGTH, DEPTH = 8, 16, 3
WIDTH = 64  # two blocks of packed weights, so that an axis of two shards them

LAYOUTS = {
  "one": sharding.Layout(data=1),
  "data": sharding.Layout(data=8),
  "fsdp": sharding.Layout(data=1, fsdp=8),
  "tensor": sharding.Layout(data=1, tensor=8),
  "mixed": sharding.Layout(data=2, fsdp=2, tensor=2),
  "sequence": sharding.Layout(data=2, sequence=2, tensor=2),
  "ring": sharding.Layout(data=1, ring=4, tensor=2),
  "ulysses": sharding.Layout(data=2, ulysses=2, tensor=2),
  "expert": sharding.Layout(data=2, expert=2, tensor=2),
  "experts": sharding.Layout(data=1, fsdp=2, expert=4),
}

# Adam's eps is large enough for a gradient of rounding errors to stay small.
OPTIMIZER = optax.adam(3e-3, eps=1e-3)
# Only of the machine code, not of the program: collectives are unchanged.
QUICKLY = {"xla_backend_optimization_level": 0}
MEMORY = 0.1  # of the first moment: 1 - b1


@functools.cache
def model(kind: str):
  """Returns the model of a tree, with 4 query heads and 2 key heads."""
  sizes = dict(
    vocab=64, width=WIDTH, hidden=64, head_dim=16, depth=DEPTH, tied=True
  )
  if not kind.startswith("experts"):
    return support.model("llama", **sizes)
  experts = Sparse(routing=Routing(experts=4, active=2), hidden=64)
  return support.model("mixtral", sparse=experts, **sizes)


def packed(params, kind: str = "Q4_1"):
  """Returns `params` with every matrix in blocks, routers excepted."""

  def pack(path, x):
    if x.ndim < 2 or path.endswith(("scale", "router")):
      return x
    axis = -1 if path == "embed" else -2
    stored = np.asarray(x if axis == -1 else x.swapaxes(-1, -2))
    matrices = stored.reshape(-1, *stored.shape[-2:])
    raw = tensor_types.encode(kind, matrices)
    raw = raw.reshape(*matrices.shape[:2], -1)
    w = ggml.from_ggml(kind, list(raw), axis)
    return jax.tree.map(lambda a: a.reshape(*x.shape[:-2], *a.shape[1:]), w)

  return tree.map_paths(pack, params)


EXPERTS = ("q", "o", "router", "experts/gate", "experts/up", "experts/down")
TRAINABLE = {"plain": ".*", "experts": ".*", "packed": "norm/scale$"}


@functools.cache
def start(kind: str) -> state.TrainState:
  """Returns the state at step 0, on one device.

  Args:
    kind: plain, lora, mora, packed, qlora, experts, or experts-qlora.
  """
  params = support.params(model(kind))
  if kind.endswith(("packed", "qlora")):
    params = packed(params)
  if kind.endswith(("lora", "mora")):
    method = MoRA(rank=4) if kind == "mora" else LoRA(rank=4)
    targets = EXPERTS if kind.startswith("experts") else adapt.ALL_LINEAR
    params = adapt.Adapt(targets=targets, method=method)(
      params, jax.random.key(0)
    )
    # Not at initialization, where a factor's gradient is zero.
    rng = np.random.default_rng(7)
    params = tree.map_paths(
      lambda path, x: (
        jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32)
        if path.endswith("/b")
        else x
      ),
      params,
    )
  return state.create(params, TRAINABLE.get(kind, wrap.TRAINABLE), OPTIMIZER)


@functools.cache
def batch(seed: int = 3):
  """Returns packed rows: documents, masked targets, padding at some ends."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 64, (BATCH, LENGTH + 1)).astype(np.int32)
  segments = np.sort(rng.integers(0, 3, (BATCH, LENGTH)), 1).astype(np.int32)
  positions = np.stack([_positions(row) for row in segments])
  weights = rng.integers(0, 2, (BATCH, LENGTH)).astype(np.float32)
  for row in range(0, BATCH, 3):
    for array in (segments, positions):
      array[row, -3:] = -1
    weights[row, -3:] = 0
  return dict(
    tokens=tokens[:, :-1],
    targets=tokens[:, 1:],
    positions=positions,
    segments=segments,
    weights=weights,
  )


def _positions(row):
  return np.concatenate(
    [np.arange(n, dtype=np.int32) for n in np.unique_counts(row).counts]
  )


def objective(kind: str) -> NextToken:
  """Returns the loss; experts are balanced."""
  balance = Balance() if kind.startswith("experts") else None
  return NextToken(model(kind), rows=32, experts=balance)


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A training step for a mesh, with the shardings of its state and batches."""

  layout: sharding.Layout
  mesh: jax.sharding.Mesh
  state_shardings: state.TrainState
  step: jax.stages.Compiled

  def run(self, start, batches):
    """Returns the final state and each metric's values, on the host."""
    place = self.layout.batch(self.mesh)
    # A step donates its state: the caller's must be copied.
    start = jax.tree.map(np.asarray, start)
    now = jax.device_put(start, self.state_shardings)
    key = jax.device_put(jax.random.key(0), sharding.replicated(self.mesh))
    found = []
    for batch in batches:
      now, metrics = self.step(now, jax.device_put(batch, place), key)
      found.append(metrics)
    return jax.tree.map(
      np.asarray, (now, jax.tree.map(lambda *x: np.stack(x), *found))
    )


@functools.cache
def compiled(kind: str, layout: str) -> Compiled:
  """Returns `make_train_step` of a tree compiled for a mesh."""
  plan, like = LAYOUTS[layout], start(kind)
  mesh = plan.mesh()
  shardings = plan.shardings(like, mesh, sharding.head_counts(model(kind)))
  whole = sharding.replicated(mesh)
  with jax.set_mesh(mesh):
    step_ = jax.jit(
      step.make_train_step(objective(kind), OPTIMIZER),
      in_shardings=(shardings, plan.batch(mesh), whole),
      out_shardings=(shardings, whole),
      donate_argnums=0,
    )
    like, key = jax.eval_shape(lambda: (like, jax.random.key(0)))
    done = step_.lower(like, batch(), key).compile(QUICKLY)
  return Compiled(plan, mesh, shardings, done)
