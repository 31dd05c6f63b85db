"""Memory of the process: its peak, and giving back what is only held."""

import ctypes
import gc
import resource
import sys

import jax


def peak_memory_bytes() -> int:
  """Returns the highest memory so far: the device's, else the process's."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    return int(stats["peak_bytes_in_use"])
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def release() -> None:
  """Gives freed memory back to the system, where the C library can.

  Importing a model and compiling a step free hundreds of megabytes that glibc
  keeps; a step's temporaries then come on top of them.
  """
  gc.collect()
  trim()


def trim() -> None:
  """Gives back what is free already, without looking for garbage: quick."""
  if not sys.platform.startswith("linux"):
    return
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
  if trim is not None:  # not in musl
    trim(0)
