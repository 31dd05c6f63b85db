"""What every test shares: typed calls, eight CPU devices, a compile cache.

All of it has to happen before JAX starts a backend and before our packages
are imported, which is why it stands at module level here and nowhere else.
"""

import collections
import gc
import importlib.util
import itertools
import os
import pathlib
import re
import sys

_ROOT = pathlib.Path(__file__).resolve().parents[1]
# Defaults, which what the command's environment says goes before.
_CHOSEN = {name: name in os.environ for name in ("JAX_PLATFORMS", "XLA_FLAGS")}
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compilation is most of the suite's time: keep every program on disk.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".cache" / "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("MPLBACKEND", "Agg")
# A process that a test starts would else compile our 300 modules again, four
# seconds each time. They go where `.gitignore` says.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Most programs run once: LLVM's passes would take twice what they save. What
# XLA itself optimizes is as everywhere. With an XLA_FLAGS of one's own, all is,
# as test_default_flags.py sets it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from research import typechecks  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)

_TYPED = importlib.util.find_spec("beartype") is not None
if _TYPED:
  # Every annotated function and dataclass of ours checks shapes and types.
  typechecks.install(["research", "kernels_pallas", "experiments"])
# Examples depend on the test alone, and a first call may compile for seconds.
hypothesis.settings.register_profile(
  "heptad", derandomize=True, deadline=None, database=None
)
hypothesis.settings.load_profile("heptad")


def pytest_addoption(parser: pytest.Parser) -> None:
  parser.addoption(
    "--slow", action="store_true", help="run tests marked slow as well"
  )


def pytest_report_header() -> str | None:
  return None if _TYPED else "no beartype: calls are not checked for types"


def pytest_configure(config: pytest.Config) -> None:
  """`-m gpu` and `-m tpu` run on the chip, unless JAX_PLATFORMS says where."""
  asked = re.sub(r"\bnot \w+", "", config.option.markexpr).split()
  for platform, name in (("gpu", "cuda"), ("tpu", "tpu")):
    if platform not in asked:
      continue
    if not _CHOSEN["JAX_PLATFORMS"] and _is_here(name):
      jax.config.update("jax_platforms", f"{name},cpu")
    if not _CHOSEN["XLA_FLAGS"]:
      # What is quick to compile for a CPU is slow, if anything, on a chip.
      os.environ.pop("XLA_FLAGS", None)


def _is_here(platform: str) -> bool:
  """Whether there is such a chip; asking libtpu without one takes minutes."""
  files = {"cuda": ("nvidia[0-9]*",), "tpu": ("accel*", "vfio/[0-9]*")}
  return any(any(pathlib.Path("/dev").glob(x)) for x in files[platform])


def _has(package: str) -> bool:
  return importlib.util.find_spec(package) is not None


def _reason_to_skip(item: pytest.Item) -> str | None:
  """Returns why this machine or command cannot run `item`, if it cannot."""
  for marker in ("tpu", "gpu"):
    if item.get_closest_marker(marker) and jax.default_backend() != marker:
      return f"needs a {marker.upper()}; JAX runs on {jax.default_backend()}"
  if item.get_closest_marker("chips") and not _has("libtpu"):
    return "needs libtpu: run `make test-chips`"
  if item.get_closest_marker("slurm") and "HEPTAD_SLURM" not in os.environ:
    return "needs Slurm: run `make test-slurm`"
  if item.get_closest_marker("peers"):
    return "needs .venv-peers: run `make test-peers`"
  if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
    return "takes minutes: run with --slow"
  return None


def _covering(items: list[pytest.Item], strength: int) -> set[pytest.Item]:
  """Returns few cases in which any `strength` arguments have all their values.

  Args:
    items: all cases of one test.
    strength: 1 for each value once at least, 2 for each pair of values.
  """

  def covered(item: pytest.Item) -> set[tuple]:
    values = []
    for marker in item.iter_markers("parametrize"):
      names = marker.args[0]
      names = names.split(",") if isinstance(names, str) else names
      values.append(tuple(id(item.callspec.params[n.strip()]) for n in names))
    axes = list(enumerate(values))
    return set(itertools.combinations(axes, min(strength, len(axes))))

  left = set().union(*map(covered, items))
  kept = set()
  while left:
    best = max(items, key=lambda item: len(covered(item) & left))
    left -= covered(best)
    kept.add(best)
  return kept


def _leave_out_cases(items: list[pytest.Item]) -> None:
  """Marks as slow what a test's `cover` or `sample` can do without."""
  tests = collections.defaultdict(list)
  for item in items:
    if not item.get_closest_marker("slow"):
      tests[item.nodeid.partition("[")[0]].append(item)
  for cases in tests.values():
    kept = set(cases)
    if cover := cases[0].get_closest_marker("cover"):
      kept = _covering(cases, *cover.args)
    if sample := cases[0].get_closest_marker("sample"):
      n, first, most = (*sample.args, *(0, None)[len(sample.args) - 1 :])
      kept &= set(cases[first::n][:most])
    for case in set(cases) - kept:
      case.add_marker(pytest.mark.slow)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  _leave_out_cases(items)
  for item in items:
    if reason := _reason_to_skip(item):
      item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session):
  """Counts the programs that importing the tests compiles."""
  compiled = []

  def note(event: str, seconds: float, **attributes: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    return (yield)
  finally:
    jax.monitoring.unregister_event_duration_listener(note)
    session.config.programs_compiled = len(compiled)


def pytest_collection_finish() -> None:
  """Leaves what is imported and collected out of each search for garbage.

  It stays until the end, and is most of what there is to search.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000, *gc.get_threshold()[1:])


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
  """Drops compiled programs before the kernel has no map left for another.

  A program takes several; Linux gives a process 65,530, after which XLA fails
  to materialize symbols. What is dropped comes back from the disk's cache.
  """
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
    jax.clear_caches()
