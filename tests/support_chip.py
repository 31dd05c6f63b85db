"""Runs tests of GPU kernels: interpreted, or on the local GPU.

A fixture with `params=MODES` runs its tests twice; the second time, marked
`gpu`, nothing is interpreted. Expected results are computed on the CPU in
either case, in float32 without TF32.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

INTERPRETED, ON_CHIP = "interpreted", "on_chip"
MODES = [INTERPRETED, pytest.param(ON_CHIP, marks=pytest.mark.gpu)]

# Interpreted kernels are large programs over tiny arrays.
quick = functools.partial(
  jax.jit,
  compiler_options={
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
  },
)


@dataclasses.dataclass(frozen=True)
class KernelRunner:
  """How kernels are run.

  Attributes:
    interpret: The kernels' `interpret` argument; None on a chip.
  """

  interpret: Any

  @property
  def kind(self) -> str | None:
    """The JAX device kind; None where kernels are interpreted."""
    return None if self.interpret else jax.devices()[0].device_kind

  def run(self, f: Callable[..., Any], *args: Any, jit: Any = quick) -> Any:
    """Compiles and calls `f(*args)`; detects races where it is interpreted.

    Args:
      f: Calls kernels with `interpret`.
      *args: Arguments of `f`.
      jit: Compiles `f` for the interpreter.
    """
    if self.interpret is None:
      # Committed arrays determine where a program runs.
      args = jax.device_put(args, jax.devices()[0])
      return jax.device_get(jax.block_until_ready(jax.jit(f)(*args)))

    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    found = jax.block_until_ready(jit(f)(*args))
    assert not interpret_pallas_call.get_races().races_found
    return found

  def needs(self, cores: str | None, needed: str) -> None:
    """Skips a test if the local chip lacks the instructions.

    Args:
      cores: The chip's matrix instructions, or None.
      needed: The instructions that the kernel's tiles use.
    """
    if self.interpret is None and cores != needed:
      pytest.skip(f"{self.kind} has {cores}, not {needed}")


def runner(name: str) -> Iterator[KernelRunner]:
  """Yields the fixture's `KernelRunner`.

  Args:
    name: One of `MODES`.
  """
  if name == ON_CHIP:
    with jax.default_device(jax.devices("cpu")[0]):
      yield KernelRunner(None)
    return

  from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

  yield KernelRunner(
    plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
  )
  gpu_callbacks.reset_gpu_interpret_mode_state()
