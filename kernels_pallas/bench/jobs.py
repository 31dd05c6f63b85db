"""Jobs of a benchmark: each checks or times one call.

A check compares a kernel with the expected result elementwise, with a tolerance
per element, on memory filled with NaN, and calls it again: kernels without
atomics are bitwise reproducible, and if results differ, something is read
before it is written. A time is the median over rounds of calls that are queued
back to back.
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
"""Stages: one call of each kernel, all checks, benchmarks."""

REPEATS = 3
"""Calls of a check, whose results must be identical."""

HOPELESS = 1e9
"""The largest error ratio reported, since JSON has no infinity."""

ROUNDS = 7
ROUND_SECONDS = 0.05
POISON_BYTES = 1 << 29


@dataclasses.dataclass(frozen=True)
class Target:
  """The chip to benchmark.

  Attributes:
    platform: 'gpu' or 'tpu'.
    kind: Device kind, as JAX calls it.
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
    """Returns the argument `interpret` of `pl.pallas_call`; None to compile."""
    if not self.tiny:
      return None
    if self.platform == "tpu":
      return True
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams()


@dataclasses.dataclass(frozen=True)
class Job:
  """A check or benchmark, one line of the results.

  Attributes:
    name: Unique name, with '/' from general to specific.
    stage: One of `SMOKE`, `CHECK`, `TIME`; stages run in this order.
    cost: FLOPs or bytes, by which the jobs of a stage are ordered.
    measure: Returns the line's fields; for a check 'ok' is one of them.
    program: Returns our function, and the shapes of its operands.
  """

  name: str
  stage: int
  cost: float
  measure: Callable[[], dict[str, Any]]
  program: Callable[[], tuple[Callable[..., Any], Any]]


@dataclasses.dataclass(frozen=True)
class Check:
  """A comparison of a kernel with its expected result.

  Attributes:
    run: Our function of the operands; returns named arrays.
    operands: Makes the operands, a tuple.
    expected: Computes what `run` should return; it may return more names.
    tolerances: Computes the maximum error of each named array, per element or
      for all, from the operands and the expected result.
    donates: Whether `run` may write into its first operand.
    around: Makes a context for calling `run`, such as a mesh.
  """

  run: Callable[..., Mapping[str, Any]]
  operands: Callable[[], tuple[Any, ...]]
  expected: Callable[..., Mapping[str, Any]]
  tolerances: Callable[[tuple[Any, ...], Mapping[str, Any]], Mapping[str, Any]]
  donates: bool = False
  around: Callable[[], Any] = contextlib.nullcontext


def in_order(jobs: list[Job]) -> list[Job]:
  """Sorts jobs by stage, and by cost within each."""
  return sorted(jobs, key=lambda job: (job.stage, job.cost))


def check(
  target: Target, name: str, found: Check, cost: float, smoke: bool = False
) -> Job:
  """Returns a job that runs a check.

  Args:
    target: The chip.
    name: Name of the job.
    found: The check.
    cost: As in `Job`.
    smoke: Whether it is its kernel's smoke test.
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
  """Returns the largest error over its tolerance; NaN counts as `HOPELESS`."""
  found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
  error = jnp.where(found == expected, 0, jnp.abs(found - expected))
  # A tolerance of 0 allows no error at all.
  share = jnp.where(error == 0, 0, error / tolerance)
  share = jnp.where(jnp.isnan(share), HOPELESS, share)
  return round(min(HOPELESS, float(jnp.max(share, initial=0))), 4)


def _equal(found: Any, other: Any) -> bool:
  """Whether all arrays are identical, including NaN."""
  wide = lambda tree: [x.astype(jnp.float32) for x in jax.tree.leaves(tree)]  # noqa: E731
  return all(
    bool(jnp.array_equal(a, b, equal_nan=True))
    for a, b in zip(wide(found), wide(other), strict=True)
  )


def poison(target: Target) -> None:
  """Fills free memory with NaN, where the next results may be allocated."""
  if target.tiny:
    return
  full = jnp.full(POISON_BYTES // 4, jnp.nan, jnp.float32)
  jax.block_until_ready(full).delete()


def seconds(run: Callable[..., Any], *operands: Any, tiny: bool) -> float:
  """Returns the median seconds of a call, among several queued ones.

  Args:
    run: The function to time, compiled if desired.
    *operands: Its arguments.
    tiny: Whether to call it only once.
  """
  jax.block_until_ready(run(*operands))
  first = _round(run, operands, 1)
  if tiny:
    return first
  calls = min(200, max(1, int(ROUND_SECONDS / max(first, 1e-6))))
  found = sorted(_round(run, operands, calls) for _ in range(ROUNDS))
  return found[ROUNDS // 2]


def chained_seconds(run: Callable[[Any], Any], state: Any, calls: int) -> float:
  """Returns the seconds of a call among several, each using the last result.

  Args:
    run: Returns the next state, and may overwrite its argument.
    state: The first state.
    calls: Number of calls.
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
  size: float | Mapping[str, float] = 0.0,
) -> dict[str, Any]:
  """Times several implementations with the same operands.

  Args:
    target: The chip.
    implementations: By name, makers of the function, 'ours' among them; if one
      raises, its message is reported, and the others continue.
    operands: Makes the operands.
    flops: FLOPs per call.
    size: Bytes that a call has to move; by name, if they differ.
  """
  given, line = operands(), {}
  chip = None if target.tiny else chips.find_by_kind(target.kind)
  for name, make in implementations.items():
    try:
      took = seconds(jax.jit(make()), *given, tiny=target.tiny)
    except Exception as problem:  # noqa: BLE001
      line[name] = {"reason": reason(problem)}
      continue
    own = size[name] if isinstance(size, Mapping) else size
    line[name] = {"ms": round(took * 1e3, 5)} | _rates(took, flops, own, chip)
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
  """Returns an exception's type and message in one line."""
  lines = str(problem).strip().splitlines() or [""]
  return f"{type(problem).__name__}: {lines[0][:300]}"


def untuned_jit(f: Callable[..., Any]) -> Callable[..., Any]:
  """Compiles `f` without autotuning, for a reference that is called once.

  On a GPU XLA would otherwise benchmark every matmul's kernels, for seconds.
  """
  quick = {"xla_gpu_autotune_level": 0}
  here = jax.default_backend() == "gpu"
  return jax.jit(f, compiler_options=quick if here else None)


def max_abs(x: Any) -> Any:
  """Returns the largest finite absolute value of `x`."""
  return jnp.max(jnp.abs(jnp.where(jnp.isfinite(x), x, 0)), initial=0.0)


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
  """Returns standard normal random numbers."""
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def roundoff(dtype: Any) -> float:
  """Returns the largest relative error of rounding to a dtype."""
  return float(jnp.finfo(dtype).eps) / 2
