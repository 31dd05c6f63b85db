"""Process memory: peak usage, and returning freed memory to the system."""

import ctypes
import gc
import resource
import sys

import jax


def peak_memory_bytes() -> int:
  """Returns the peak memory use so far: the device's, else the process's."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    return int(stats["peak_bytes_in_use"])
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def release() -> None:
  """Collects garbage and returns freed memory to the system.

  Importing a model and compiling a step free hundreds of megabytes, which glibc
  keeps; a step's temporaries would come on top of them.
  """
  gc.collect()
  trim()


def trim() -> None:
  """Returns freed memory to the system, without garbage collection: fast."""
  if not sys.platform.startswith("linux"):
    return
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
  if trim is not None:  # not in musl
    trim(0)
