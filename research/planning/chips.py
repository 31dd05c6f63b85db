"""Device topologies to compile for without having the devices.

`v5e:4x4` is a slice of a TPU pod, for which the compiler in the package libtpu
can compile; `h100:4x8` are four hosts of eight GPUs, see `gpus`; `cpu:8` are
eight virtual devices of this machine.
"""

import collections
import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from kernels_pallas.common.chips import TPUS, Chip, find_by_kind
from research.planning import gpus
from research.typing import UserError

_LIBTPU = {
  # Otherwise libtpu queries a metadata server that exists on Google Cloud only.
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  # Nothing runs on a chip, so several processes may compile at the same time.
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
  """Devices to compile for.

  Attributes:
    name: the requested name.
    devices: JAX devices; those that are not here cannot execute programs.
    chip: specification of each device.
    compile_options: of XLA.
    notes: what a reader of numbers for it has to know.
  """

  name: str
  devices: Sequence[Any]
  chip: Chip
  compile_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()

  def compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Returns a program for these devices, from `lowering`."""
    return lowered.compile(dict(self.compile_options) or None)

  def lowering(self) -> contextlib.AbstractContextManager:
    """Within it programs are lowered for these devices.

    GPU kernels are written for the instructions of the default device.
    """
    first = self.devices[0]
    if first.platform != "gpu":
      return contextlib.nullcontext()
    return jax.default_device(first)


def topology(name: str) -> Topology:
  """Returns the topology with this name.

  Args:
    name: `cpu:8`, a TPU slice: `v5e:4x4`, `v5p:2x2x4`, `v6e:16x16`, ..., or
      GPUs: `h100:8` of one host, `h100:4x8` of four.

  Raises:
    UserError: there is no such slice, or its compiler is not installed.
  """
  kind, _, size = name.partition(":")
  if gpus.is_gpus(name):
    return Topology(
      name=name,
      devices=gpus.devices(name),
      chip=gpus.usable(kind),
      compile_options=gpus.compile_options(),
      notes=gpus.NOTES,
    )
  if kind == "cpu" and re.fullmatch(r"[1-9]\d*", size):
    return _cpu(name, int(size))
  if kind not in TPUS or not re.fullmatch(r"\d+(x\d+)*", size):
    raise UserError(
      f"topology {name!r}: expected a slice of a TPU pod such as v5e:4x4"
      f" ({', '.join(TPUS)}),\nGPUs such as h100:8 or h100:4x8, or"
      " virtual devices of this machine, cpu:8."
    )
  return _tpu(name)


def has_tpu_compiler() -> bool:
  """Whether the package libtpu is installed."""
  return importlib.util.find_spec("libtpu") is not None


def _cpu(name: str, count: int) -> Topology:
  if jax.config.jax_num_cpu_devices < count:
    # Raises if JAX has created its devices already.
    with contextlib.suppress(RuntimeError):
      jax.config.update("jax_num_cpu_devices", count)
  devices = jax.devices("cpu")
  if len(devices) < count:
    raise UserError(
      f"topology {name!r}: this process has {len(devices)} CPU devices already."
      f"\nStart it with JAX_NUM_CPU_DEVICES={count}."
    )
  pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  # The devices share the machine's memory; its bandwidth is unknown.
  chip = Chip(name="this machine", memory=pages / count)
  return Topology(name=name, devices=devices[:count], chip=chip)


def _tpu(name: str) -> Topology:
  if not has_tpu_compiler():
    raise UserError(
      f"topology {name!r}: needs XLA's compiler for TPUs, the package libtpu."
      "\nRun: pip install 'jax[tpu]' (Linux on x86-64; no TPU is needed)."
    )
  for key, value in _LIBTPU.items():
    os.environ.setdefault(key, value)
  try:
    found = topologies.get_topology_desc(
      platform="tpu",
      topology_name=name,
      # Both cores of a chip as one device, as on Cloud TPUs.
      **({"chip_config_name": "megacore"} if name.startswith("v4:") else {}),
    )
  except Exception as error:
    raise UserError(
      f"topology {name!r}: {str(error).splitlines()[0]}"
    ) from error
  devices = found.devices
  chip = find_by_kind(devices[0].device_kind)
  if chip is None:
    raise UserError(
      f"topology {name!r}: {devices[0].device_kind!r} is not in"
      f" kernels_pallas.common.chips.TPUS ({', '.join(TPUS)})."
    )
  # Some chips appear as two devices, one per core.
  shared = max(collections.Counter(str(d.coords) for d in devices).values())
  return Topology(name=name, devices=devices, chip=_part(chip, shared))


def _part(chip: Chip, parts: int) -> Chip:
  if parts == 1:
    return chip
  return dataclasses.replace(
    chip,
    name=f"1/{parts} {chip.name}",
    memory=chip.memory / parts,
    flops=chip.flops / parts if chip.flops else None,
    bandwidth=chip.bandwidth / parts if chip.bandwidth else None,
  )
