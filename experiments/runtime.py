"""What a process needs before it computes: allocator, type checks, caches.

Every command begins with `prepare()`, before jax or the library is imported,
and calls `setup()` once its flags are parsed.
"""

import os
import pathlib
import sys
import time

START = time.time()
"""When this process began, to within the interpreter's own start."""

PACKAGES = ("research", "kernels_pallas", "experiments")
_HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _wants_huge_pages(argv: list[str], environ: dict[str, str]) -> bool:
  """Whether glibc must still be told to ask the kernel for huge pages."""
  if "--nohuge_pages" in argv or "--huge_pages=false" in argv:
    return False
  if not sys.platform.startswith("linux") or "GLIBC_TUNABLES" in environ:
    return False
  try:
    return "[madvise]" in _HUGE_PAGES.read_text()
  except OSError:
    return False


def prepare(argv: list[str] | None = None) -> None:
  """Sets what only the start of a process can set.

  * Huge pages: XLA's CPU client takes its temporaries anew on each call, and
    page faults cost 6 to 14% of a training step. glibc reads the setting at
    process start only, so the process replaces itself, once.
    `--nohuge_pages` turns it off.
  * Type checks: every annotated function of the library, gin's values
    included, is checked at run time. `--notypecheck` turns it off.

  Args:
    argv: the command line; by default this process's.
  """
  argv = sys.argv if argv is None else argv
  if _wants_huge_pages(argv, dict(os.environ)):
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, sys.orig_argv)
  if "--notypecheck" not in argv and "--typecheck=false" not in argv:
    from jaxtyping import install_import_hook

    install_import_hook(list(PACKAGES), "beartype.beartype")


def cache_directory() -> str:
  """Returns where compiled programs are kept between runs."""
  home = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
  default = os.path.join(home, "heptad", "xla")
  return os.environ.get("JAX_COMPILATION_CACHE_DIR", default)


def setup() -> None:
  """Turns on the compilation cache."""
  import jax

  jax.config.update("jax_compilation_cache_dir", cache_directory())
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
