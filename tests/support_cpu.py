"""What tests of the C++ kernels ask of the machine."""

import pytest


def supported(isa):
  """Skips where this CPU has no such instructions."""
  flags = ""
  try:
    with open("/proc/cpuinfo") as file:
      flags = file.read()
  except OSError:
    pass
  wanted = {"avx512": "avx512vl", "avx2": "avx2"}.get(isa, "")
  if wanted not in flags:
    pytest.skip(f"this CPU has no {isa}")
