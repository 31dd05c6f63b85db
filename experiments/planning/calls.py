"""Calls of a model, compiled ahead of time: sampling's, and verifiers'.

Each is planned by itself, from shapes. The arrays that one leaves (a cache, the
state of rows) are the arguments of the next, cut as XLA has left them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.core import cli
from research import progress, weights
from research.nn import flops
from research.planning import forecast, text
from research.planning.chips import Topology
from research.training import global_batch
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
  """A batch whose tokens are generated.

  Attributes:
    count: rows of the batch.
    prompt: tokens of each prompt.
    length: tokens that are generated.
  """

  count: int
  prompt: int
  length: int


def rows(given: str, flag: str = "generate") -> Rows:
  """Returns what `16x1024+256` stands for: rows, prompt, generated tokens.

  Raises:
    UserError: it stands for nothing.
  """
  count, _, rest = given.partition("x")
  prompt, _, length = rest.partition("+")
  parts = (count, prompt, length)
  if not all(p.isdecimal() and len(p) < 8 and int(p) for p in parts):
    raise UserError(
      f"--{flag}={given}: expected ROWSxPROMPT+LENGTH, e.g. 16x1024+256"
    )
  return Rows(count=int(count), prompt=int(prompt), length=int(length))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planner:
  """Compiles calls for one topology, and says what each costs."""

  mesh: Mesh
  topology: Topology

  @property
  def devices(self) -> dict[str, Any]:
    """What a plan's result says of its devices."""
    return {
      "topology": self.topology.name,
      "chip": self.topology.chip.name,
      "devices": self.mesh.size,
    }

  def plan(
    self,
    words: str,
    call: Callable[..., Any],
    *args: Any,
    tokens: int,
    donate: tuple[int, ...] = (),
    loops: int = 0,
  ) -> tuple[dict[str, Any], Any]:
    """Returns a call's cost, and the shapes of its results.

    Args:
      *args: arrays' shapes, sharded.
      tokens: that the call is for, over all rows.
      donate: arguments whose memory the results may take.
      loops: of the call whose length depends on data, and of which one round
        is what is asked for.

    Returns:
      The cost, as `text.as_json` has it; results as sharded shapes, or None
      where the compiler says that the program does not fit.
    """
    with jax.set_mesh(self.mesh), self.topology.lowering():
      made = jax.eval_shape(call, *args)
      work = flops.count_flops(call, *args)
      lowered = jax.jit(call, donate_argnums=donate).lower(*args)
    cli.say(f"{words}:\n")
    try:
      with progress.phase(f"compiling for {self.topology.name}"):
        compiled = self.topology.compile(lowered)
    except jax.errors.JaxRuntimeError as error:
      return refused(error), None
    cost = forecast.forecast(compiled, self.mesh, self.topology)
    cost = dataclasses.replace(
      cost, unknown_loops=max(0, cost.unknown_loops - loops)
    )
    found = text.as_json(cost, work, tokens)
    cli.say(text.describe(cost, found, self.topology.notes))
    out = jax.tree.map(placed, made, compiled.output_shardings)
    return found, out


def largest(made: Mapping[str, Any]) -> dict[str, Any]:
  """Returns whether all calls fit, and the bytes of the largest.

  Args:
    made: calls by name, among other things, as `Planner.plan` returns them.
  """
  each = [x for x in made.values() if isinstance(x, Mapping) and "fits" in x]
  sizes = [x for x in each if "total_bytes" in x]
  top = max(sizes, key=lambda x: x["total_bytes"], default={})
  return {
    "fits": all(x["fits"] for x in each),
    **{name: top.get(name) for name in ("total_bytes", "limit_bytes")},
  }


def placed(x: Any, where: Any) -> jax.ShapeDtypeStruct:
  """Returns the shape of an array that has a sharding."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def batch_shape(shape: tuple[int, ...], whole: Any) -> jax.ShapeDtypeStruct:
  """Returns the shape of ids of rows, cut as a batch is.

  Args:
    shape: `[B]` or `[B, T]`.
    whole: the sharding of batches, `Layout.batch`.
  """
  where = global_batch.array_sharding(whole, shape)
  return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)


def served(params: Any) -> Any:
  """Returns weights as they are served: in bfloat16, or as they are packed."""

  def one(leaf):
    if weights.is_weight(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf
    return jax.ShapeDtypeStruct(
      leaf.shape, jnp.bfloat16, sharding=leaf.sharding
    )

  return jax.tree.map(one, params, is_leaf=weights.is_weight)


def refused(error: jax.errors.JaxRuntimeError) -> dict[str, Any]:
  """Returns the compiler's numbers of a program that does not fit in memory.

  Raises:
    JaxRuntimeError: the error is another one.
  """
  message = str(error)
  if "RESOURCE_EXHAUSTED" not in message:
    raise error
  found = text.parse_out_of_memory(message)
  cli.say(text.describe_out_of_memory(found))
  return found
