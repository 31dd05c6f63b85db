"""Hosts of GPUs to compile for without a GPU: `h100:8`, `h100:4x8`.

XLA's compiler for CUDA needs a description of the chip in place of the chip
(`kernels_pallas/inspect/*.textproto`). Without a device nothing can be timed,
so that XLA takes default tiles for matrix products and never a routine of
cuBLAS or cuDNN: memory is what this program takes, and times are bounds.
"""

import dataclasses
import pathlib
import re
from typing import Any

from jax.experimental import topologies

from kernels_pallas.common.chips import GPUS, Chip
from kernels_pallas.inspect import gpu
from research.typing import UserError

NOTES = (
  "compiled without a GPU, so without autotuning: seconds are bounds by the"
  " data sheet, not a forecast of this program",
  "JAX takes 75% of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says"
  " more; NCCL and CUDA take some of the rest",
)
"""What a reader of a plan for GPUs has to know."""

_NAME = re.compile(rf"({'|'.join(GPUS)}):(?:([1-9]\d*)x)?([1-9]\d*)")
_RELATIVES = {"h200": "h100"}
"""Chips with the multiprocessors of another, and other memory."""


def is_gpus(name: str) -> bool:
  """Whether a topology's name is one of hosts of GPUs."""
  return name.partition(":")[0] in GPUS


def hosts(name: str) -> tuple[str, int, int]:
  """Returns the chip, the number of hosts and the GPUs of each.

  Args:
    name: `h100:8` is one host of 8, `h100:4x8` are 4 hosts of 8.

  Raises:
    UserError: it is neither.
  """
  found = _NAME.fullmatch(name)
  if not found:
    raise UserError(
      f"topology {name!r}: expected GPUs of a host, h100:8, or hosts and GPUs"
      f" of each, h100:4x8; of {', '.join(GPUS)}."
    )
  chip, count, each = found.groups()
  return chip, int(count or 1), int(each)


def devices(name: str) -> list[Any]:
  """Returns JAX devices that can be compiled for, those of a host in a row.

  Raises:
    UserError: the name is no topology, or the compiler is not installed.
  """
  chip, count, each = hosts(name)
  if (missing := gpu.missing()) is not None:
    raise UserError(
      f"topology {name!r}: {missing}.\nRun: pip install -e '.[cuda-compile]' in"
      " a checkout (Linux on x86-64; no GPU is needed)."
    )
  found = topologies.get_topology_desc(
    chip,
    platform="cuda",
    target_config=description(chip),
    topology=f"1x{count}x{each}",
  )
  return list(found.devices)


def description(name: str) -> str:
  """Returns XLA's description of a chip, a `GpuTargetConfigProto` as text."""
  like = _RELATIVES.get(name, name)
  file = pathlib.Path(gpu.__file__).with_name(f"{like}.textproto")
  text, chip = file.read_text("utf-8"), GPUS[name]
  if like == name:
    return text
  for field, value in (
    ("memory_bandwidth", f"{chip.bandwidth:.0f}"),
    ("device_memory_size", f"{chip.memory:.0f}"),
    ("device_description_str", f'"{chip.kind}"'),
  ):
    text = re.sub(rf"(?m)^(\s*{field}): .*$", rf"\1: {value}", text)
  return text


def usable(name: str) -> Chip:
  """Returns a chip with the memory that CUDA leaves of the data sheet's."""
  found = re.search(r"device_memory_size: (\d+)", description(name))
  chip = GPUS[name]
  left = float(found.group(1)) if found else chip.memory
  return dataclasses.replace(chip, memory=min(chip.memory, left))


def compile_options() -> dict[str, Any]:
  """Returns XLA's options where there is no device to time programs on."""
  return {
    "xla_gpu_autotune_level": 0,
    "xla_gpu_cuda_data_dir": str(gpu.toolkit()),
  }
