"""What a bench runs: jobs, of which each checks or times one call.

A check compares a kernel with what it should compute, element by element and
within a tolerance of its own, on memory full of NaN, and calls it again: the
results of kernels without atomics repeat to the bit, and where they do not,
something is read before it is written. A time is the median of rounds of calls
that are queued one after the other.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.common import chips

SMOKE, CHECK, TIME = 0, 1, 2
"""Stages: one call of each kernel, all checks, times."""

REPEATS = 3
"""Calls of a check whose results must be the same."""

HOPELESS = 1e9
"""The largest ratio, since JSON has no infinity."""

ROUNDS = 7
ROUND_SECONDS = 0.05
POISON_BYTES = 1 << 29


@dataclasses.dataclass(frozen=True)
class Target:
  """What is benched.

  Attributes:
    platform: 'gpu' or 'tpu'.
    kind: Of the device, as JAX calls it.
    tiny: Whether shapes are tiny and kernels interpreted, on a CPU.
  """

  platform: str
  kind: str
  tiny: bool = False

  @property
  def backend(self) -> str:
    """The backend of attention and of decoding."""
    return f"mosaic_{self.platform}"

  def interpret(self) -> Any:
    """As of `pl.pallas_call`; None to compile."""
    if not self.tiny:
      return None
    if self.platform == "tpu":
      return True
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams()


@dataclasses.dataclass(frozen=True)
class Job:
  """A line of the result.

  Attributes:
    name: What identifies it, by '/' from the general to the particular.
    stage: Of `SMOKE`, `CHECK`, `TIME`; stages run in this order.
    cost: FLOPs or bytes, by which the jobs of a stage are ordered.
    measure: Returns the line's fields; of a check 'ok' is one of them.
    program: Returns our function, and the shapes of its operands.
  """

  name: str
  stage: int
  cost: float
  measure: Callable[[], dict[str, Any]]
  program: Callable[[], tuple[Callable[..., Any], Any]]


@dataclasses.dataclass(frozen=True)
class Check:
  """What a kernel should compute.

  Attributes:
    run: Ours, of the operands; returns named arrays.
    operands: Makes the operands, a tuple.
    expected: What `run` should return, of the operands; it may have more names.
    tolerances: The most that each named array may be off by, element by element
      or throughout, of the operands and what is expected.
    donates: Whether `run` may write into its first operand.
    around: Makes a context that `run` is called in, such as a mesh.
  """

  run: Callable[..., Mapping[str, Any]]
  operands: Callable[[], tuple[Any, ...]]
  expected: Callable[..., Mapping[str, Any]]
  tolerances: Callable[[tuple[Any, ...], Mapping[str, Any]], Mapping[str, Any]]
  donates: bool = False
  around: Callable[[], Any] = contextlib.nullcontext


def in_order(jobs: list[Job]) -> list[Job]:
  """By stage, and the cheapest first within each."""
  return sorted(jobs, key=lambda job: (job.stage, job.cost))


def check(
  target: Target, name: str, found: Check, cost: float, smoke: bool = False
) -> Job:
  """A job that compares.

  Args:
    target: What it is of.
    name: Of the job.
    found: What is compared.
    cost: As of `Job`.
    smoke: Whether it stands for all of its kernel.
  """
  return Job(
    name=name,
    stage=SMOKE if smoke else CHECK,
    cost=cost,
    measure=functools.partial(_compare, target, found),
    program=lambda: (found.run, jax.eval_shape(found.operands)),
  )


def _compare(target: Target, x: Check) -> dict[str, Any]:
  operands = x.operands()
  run = jax.jit(x.run, donate_argnums=(0,) if x.donates else ())

  def call():
    poison(target)
    given = jax.tree.map(jnp.copy, operands) if x.donates else operands
    with x.around():
      return jax.block_until_ready(run(*given))

  found = call()
  again = [call() for _ in range(0 if target.tiny else REPEATS - 1)]
  expected = x.expected(*operands)
  tolerances = x.tolerances(operands, expected)
  ratios = {n: _ratio(y, expected[n], tolerances[n]) for n, y in found.items()}
  steady = all(_equal(found, other) for other in again)
  line = {
    "ok": steady and all(ratio <= 1 for ratio in ratios.values()),
    "error_ratio": ratios,
  }
  return line if steady else line | {"repeats": False}


def _ratio(found: Any, expected: Any, tolerance: Any) -> float:
  """The largest error over its tolerance: `HOPELESS` of NaN; equal infs: 0."""
  found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
  error = jnp.where(found == expected, 0, jnp.abs(found - expected))
  # Where nothing may be off, anything is too much.
  share = jnp.where(error == 0, 0, error / tolerance)
  share = jnp.where(jnp.isnan(share), HOPELESS, share)
  return round(min(HOPELESS, float(jnp.max(share, initial=0))), 4)


def _equal(found: Any, other: Any) -> bool:
  """Whether all arrays are the same, NaN included."""
  wide = lambda tree: [x.astype(jnp.float32) for x in jax.tree.leaves(tree)]  # noqa: E731
  return all(
    bool(jnp.array_equal(a, b, equal_nan=True))
    for a, b in zip(wide(found), wide(other), strict=True)
  )


def poison(target: Target) -> None:
  """Leaves NaN in memory that is free, which the next results may get."""
  if target.tiny:
    return
  full = jnp.full(POISON_BYTES // 4, jnp.nan, jnp.float32)
  jax.block_until_ready(full).delete()


def seconds(run: Callable[..., Any], *operands: Any, tiny: bool) -> float:
  """Median seconds of a call among several that are queued.

  Args:
    run: What is timed; compiled, if it is to be.
    *operands: Its arguments.
    tiny: Whether one call is enough.
  """
  jax.block_until_ready(run(*operands))
  first = _round(run, operands, 1)
  if tiny:
    return first
  calls = min(200, max(1, int(ROUND_SECONDS / max(first, 1e-6))))
  found = sorted(_round(run, operands, calls) for _ in range(ROUNDS))
  return found[ROUNDS // 2]


def chained_seconds(run: Callable[[Any], Any], state: Any, calls: int) -> float:
  """Seconds of a call among several, each of what the one before returned.

  Args:
    run: Returns the next state, and may overwrite its argument.
    state: The first one.
    calls: How many.
  """
  state = jax.block_until_ready(run(state))
  start = time.perf_counter()
  for _ in range(calls):
    state = run(state)
  jax.block_until_ready(state)
  return (time.perf_counter() - start) / calls


def _round(run, operands, calls: int) -> float:
  start = time.perf_counter()
  for _ in range(calls):
    found = run(*operands)
  jax.block_until_ready(found)
  return (time.perf_counter() - start) / calls


def time_all(
  target: Target,
  implementations: Mapping[str, Callable[[], Callable[..., Any]]],
  operands: Callable[[], tuple[Any, ...]],
  flops: float = 0.0,
  size: float = 0.0,
) -> dict[str, Any]:
  """Times of several implementations' functions of the same operands.

  Args:
    target: What they run on.
    implementations: By name, what makes the function, 'ours' among them; one
      that raises says why, and the others go on.
    operands: Makes the operands.
    flops: Of a call.
    size: Bytes that it has to move.
  """
  given, line = operands(), {}
  chip = None if target.tiny else chips.of_kind(target.kind)
  for name, make in implementations.items():
    try:
      took = seconds(jax.jit(make()), *given, tiny=target.tiny)
    except Exception as problem:  # noqa: BLE001
      line[name] = {"reason": reason(problem)}
      continue
    line[name] = {"ms": round(took * 1e3, 5)} | _rates(took, flops, size, chip)
  return {"ok": "ms" in line["ours"], **line}


def _rates(took: float, flops: float, size: float, chip: Any) -> dict[str, Any]:
  found = {}
  if flops:
    found["tflops"] = round(flops / took / 1e12, 2)
  if size:
    found["gb_per_s"] = round(size / took / 1e9, 1)
  if chip is not None and flops:
    found["of_peak"] = round(flops / took / chip.flops, 3)
  if chip is not None and size:
    found["of_bandwidth"] = round(size / took / chip.bandwidth, 3)
  return found


def reason(problem: BaseException) -> str:
  """What went wrong, in a line."""
  lines = str(problem).strip().splitlines() or [""]
  return f"{type(problem).__name__}: {lines[0][:300]}"


def untuned_jit(f: Callable[..., Any]) -> Callable[..., Any]:
  """`f` of a definition, which is called once: nothing is tried to be fast.

  On a GPU XLA would time every matmul's kernels, for seconds.
  """
  quick = {"xla_gpu_autotune_level": 0}
  here = jax.default_backend() == "gpu"
  return jax.jit(f, compiler_options=quick if here else None)


def max_abs(x: Any) -> Any:
  """The largest finite number of `x`, without its sign."""
  return jnp.max(jnp.abs(jnp.where(jnp.isfinite(x), x, 0)), initial=0.0)


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
  """Random numbers near 1."""
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def roundoff(dtype: Any) -> float:
  """The most that rounding to a type changes a number by, relatively."""
  return float(jnp.finfo(dtype).eps) / 2
