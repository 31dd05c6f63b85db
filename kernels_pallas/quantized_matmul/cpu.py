"""The product by `panels.cc`, compiled at first use and called by XLA.

The library lies in the user's cache directory under a name that says what it
was made from: source, compiler, flags and XLA's headers. Where there is no
C++ compiler, or it fails, that is said once and plain XLA computes instead.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels_pallas.quantized_matmul.panels import Panels

TARGET = "heptad_panels"
"""The name by which compiled programs call the library."""

SOURCE = pathlib.Path(__file__).with_name("panels.cc")
PARTS = (
  "problem.h",
  "lanes.h",
  "tile.inc",
  "many.inc",
  "vnni.h",
  "bfloat16.h",
  "multiply.h",
)
"""What it includes, beside it."""

FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-pthread", "-Wno-psabi")
COMPILERS = ("c++", "g++", "clang++")
ISAS = ("auto", "vnni", "bfloat16", "avx512", "avx2", "portable")
_SECONDS = 120


class Unavailable(RuntimeError):
  """The library cannot be compiled or loaded here; says why."""


def compiler() -> str:
  """Returns the path of a C++ compiler: `$CXX`, or the first that is found.

  Raises:
    Unavailable: there is none.
  """
  named = os.environ.get("CXX")
  for name in (named,) if named else COMPILERS:
    if found := shutil.which(name):
      return found
  raise Unavailable(
    f"no C++ compiler (looked for {named or ', '.join(COMPILERS)})"
  )


def build(folder: pathlib.Path) -> pathlib.Path:
  """Returns the compiled library in `folder`, made unless it is there.

  Raises:
    Unavailable: it cannot be made.
  """
  cxx = compiler()
  try:
    version = subprocess.run(
      [cxx, "--version"], capture_output=True, timeout=_SECONDS, check=True
    ).stdout
    include = pathlib.Path(jax.ffi.include_dir())
    api = include / "xla" / "ffi" / "api"
    parts = [SOURCE.with_name(name).read_bytes() for name in PARTS]
    parts += [SOURCE.read_bytes(), version, " ".join(FLAGS).encode()]
    parts += [platform.machine().encode()]
    parts += [header.read_bytes() for header in sorted(api.glob("*.h"))]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
    made = folder / f"panels-{digest}.so"
    if is_whole(made):
      return made
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
      new = pathlib.Path(place) / made.name
      subprocess.run(
        [cxx, *FLAGS, "-isystem", str(include), str(SOURCE), "-o", str(new)],
        capture_output=True,
        timeout=_SECONDS,
        check=True,
      )
      data = new.read_bytes()
      new.write_bytes(data + hashlib.sha256(data).digest())
      # Whole or not at all, whoever else compiles it at the same time.
      os.replace(new, made)
  except subprocess.CalledProcessError as error:
    lines = error.stderr.decode("utf-8", "replace").splitlines()
    said = next((line for line in lines if "error" in line), "no message")
    raise Unavailable(f"{cxx} failed: {said[:200]}") from error
  except (OSError, subprocess.TimeoutExpired) as error:
    raise Unavailable(f"{cxx}: {error}") from error
  return made


def is_whole(made: pathlib.Path) -> bool:
  """Whether a library ends with its own digest: half of one kills a process.

  What stands after its end, a loader does not look at.
  """
  if not made.is_file():
    return False
  data = made.read_bytes()
  return hashlib.sha256(data[:-32]).digest() == data[-32:]


def cache_folder() -> pathlib.Path:
  """Returns where the user's compiled libraries lie."""
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(home) / "heptad" / "libraries"


def load(folder: pathlib.Path) -> None:
  """Compiles the library if needed, and tells XLA of it.

  Raises:
    Unavailable: it cannot be compiled or loaded.
  """
  made = build(folder)
  if made.stat().st_uid not in (os.getuid(), 0):
    raise Unavailable(f"{made}: belongs to another user")
  try:
    handler = ctypes.CDLL(str(made)).HeptadPanels
  except (OSError, AttributeError) as error:
    raise Unavailable(f"{made}: {error}") from error
  jax.ffi.register_ffi_target(
    TARGET, jax.ffi.pycapsule(handler), platform="cpu"
  )


@functools.cache
def available() -> bool:
  """Whether the library is there; compiles it at first, warns once if not."""
  try:
    load(cache_folder())
  except Unavailable as error:
    warnings.warn(
      f"quantized_matmul: {error}; packed weights are multiplied by XLA, "
      "several times slower. Install g++ or clang++, or set CXX.",
      RuntimeWarning,
      stacklevel=2,
    )
    return False
  return True


def cpu_matmul(
  x: Float[Array, "B I"], w: Panels, isa: str = "auto"
) -> Float[Array, "B O"]:
  """Returns `x W` in the dtype of x, sums in float32.

  The order of sums depends on `W`'s shape alone, and on whether there are few
  rows, some or many: a row's result is the same whatever the number of threads
  and what the other rows hold.

  Args:
    x: float32 or bfloat16.
    w: without leading axes.
    isa: of `ISAS`; "auto" is the best that the running CPU has.

  Raises:
    Unavailable: the library is not; see `available`.
  """
  if not available():
    raise Unavailable("quantized_matmul: no compiled kernel here")
  nothing = jnp.zeros((0,), jnp.float32)
  call = jax.ffi.ffi_call(
    TARGET,
    jax.ShapeDtypeStruct((x.shape[0], w.outputs), x.dtype),
    vmap_method="sequential",
  )
  return call(
    x,
    w.words,
    nothing if w.scale is None else w.scale,
    nothing if w.offset is None else w.offset,
    codebook=np.array(w.codebook or (0.0,), np.float32),
    bits=np.int64(w.bits),
    group=np.int64(w.group),
    isa=isa,
  )


def supports(dtype: Any) -> bool:
  """Whether the kernel takes activations of this type."""
  return dtype in (jnp.float32, jnp.bfloat16)
