"""C++ kernels for CPUs: compiled at first use, called through XLA's FFI.

A compiled library is cached in the user's cache directory, under a hash of its
source, compiler, flags and XLA's headers. Without a working C++ compiler a
warning is issued once, and plain XLA is used instead.
"""

import ctypes
import dataclasses
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
import warnings

import jax

FLAGS = (
  "-std=c++17",
  "-O2",
  "-ffp-contract=fast",
  "-shared",
  "-fPIC",
  "-pthread",
  "-Wno-psabi",
)
COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 120


class LibraryUnavailable(RuntimeError):
  """A library cannot be compiled or loaded here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Library:
  """A library of kernels: one C++ source and the files it includes.

  Attributes:
    name: File name, before the hash.
    source: The C++ source.
    includes: Included files, relative to the source's folder.
    targets: (FFI target name, symbol) of each handler.
    warning: Warning issued if the library is unavailable.
  """

  name: str
  source: pathlib.Path
  includes: tuple[str, ...]
  targets: tuple[tuple[str, str], ...]
  warning: str

  def build(self, folder: pathlib.Path) -> pathlib.Path:
    """Returns the path of the compiled library, compiling it if not cached.

    Raises:
      Unavailable: It cannot be compiled.
    """
    cxx = compiler()
    try:
      include = pathlib.Path(jax.ffi.include_dir())
      made = folder / f"{self.name}-{self._digest(cxx, include)}.so"
      if is_intact(made):
        return made
      folder.mkdir(mode=0o700, parents=True, exist_ok=True)
      with tempfile.TemporaryDirectory(dir=folder) as place:
        new = pathlib.Path(place) / made.name
        subprocess.run(
          [cxx, *FLAGS, "-isystem", str(include), str(self.source)]
          + ["-o", str(new)],
          capture_output=True,
          timeout=_SECONDS,
          check=True,
        )
        data = new.read_bytes()
        new.write_bytes(data + hashlib.sha256(data).digest())
        # Atomic, since other processes may compile the same library.
        os.replace(new, made)
    except subprocess.CalledProcessError as error:
      lines = error.stderr.decode("utf-8", "replace").splitlines()
      message = next((line for line in lines if "error" in line), "no message")
      raise LibraryUnavailable(f"{cxx} failed: {message[:200]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
      raise LibraryUnavailable(f"{cxx}: {error}") from error
    return made

  def _digest(self, cxx: str, include: pathlib.Path) -> str:
    """Hashes everything that the compiled library depends on."""
    version = subprocess.run(
      [cxx, "--version"], capture_output=True, timeout=_SECONDS, check=True
    ).stdout
    files = [self.source.parent / name for name in self.includes]
    files += [self.source, *sorted((include / "xla/ffi/api").glob("*.h"))]
    parts = [path.read_bytes() for path in files]
    parts += [version, " ".join(FLAGS).encode(), platform.machine().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]

  def load(self, folder: pathlib.Path) -> None:
    """Compiles the library if needed, and registers its handlers with XLA.

    Raises:
      Unavailable: It cannot be compiled or loaded.
    """
    made = self.build(folder)
    if made.stat().st_uid not in (os.getuid(), 0):
      raise LibraryUnavailable(f"{made}: belongs to another user")
    try:
      loaded = ctypes.CDLL(str(made))
      handlers = [
        (target, getattr(loaded, symbol)) for target, symbol in self.targets
      ]
    except (OSError, AttributeError) as error:
      raise LibraryUnavailable(f"{made}: {error}") from error
    for target, handler in handlers:
      jax.ffi.register_ffi_target(
        target, jax.ffi.pycapsule(handler), platform="cpu"
      )


@functools.cache
def available(library: Library) -> bool:
  """Whether the library can be used; compiles it once, warns once if not."""
  try:
    library.load(cache_folder())
  except LibraryUnavailable as error:
    warnings.warn(
      f"{library.warning.format(error=error)} Install g++ or clang++, or set "
      "CXX.",
      RuntimeWarning,
      stacklevel=2,
    )
    return False
  return True


def compiler() -> str:
  """Returns the path of a C++ compiler: `$CXX`, or the first one found.

  Raises:
    Unavailable: There is none.
  """
  named = os.environ.get("CXX")
  for name in (named,) if named else COMPILERS:
    if found := shutil.which(name):
      return found
  raise LibraryUnavailable(
    f"no C++ compiler (looked for {named or ', '.join(COMPILERS)})"
  )


def is_intact(made: pathlib.Path) -> bool:
  """Whether the file ends with its own SHA-256: a truncated one would crash.

  The dynamic loader ignores bytes after the end of the library.
  """
  if not made.is_file():
    return False
  data = made.read_bytes()
  return hashlib.sha256(data[:-32]).digest() == data[-32:]


def cache_folder() -> pathlib.Path:
  """Returns the folder of the user's compiled libraries."""
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(home) / "heptad" / "libraries"
