"""Instruction sets required by tests of the C++ kernels."""

import pytest


def supported(isa):
  """Skips if this CPU lacks the instruction set."""
  flags = ""
  try:
    with open("/proc/cpuinfo") as file:
      flags = file.read()
  except OSError:
    pass
  wanted = {"avx512": "avx512vl", "avx2": "avx2"}.get(isa, "")
  if wanted not in flags:
    pytest.skip(f"this CPU has no {isa}")
