"""Sets up a process before it computes: allocator, type checks, caches.

Every command begins with `prepare()`, before jax or the library is imported,
and calls `setup()` once its flags are parsed. Commands that may be one process
of several do their work inside `cluster(...)`.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import os
import pathlib
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

START = time.time()
"""When this process began, to within the interpreter's own start."""

PATIENCE = 10.0
"""Seconds that a process which failed waits for its threads and the others."""

WRITING = 3600
"""Seconds that all others wait for the first one, which writes."""

_MEETINGS = itertools.count()
"""Numbers of calls of `_from_first`, the same in all processes."""

_DONE, _FAILED, _STOPPED = range(3)
"""How the first process has ended what the others wait for."""

PREEMPTED = 42
"""`preemption.Preempted.exit_status`, which is known before JAX is imported."""

CONNECTING = threading.Event()
"""Is set while this process waits for the others of its run. JAX has a client
then, but who asks for its index would start a backend that fails."""

PACKAGES = ("research", "kernels_pallas", "experiments")

_HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _is_off(flag: str, argv: list[str]) -> bool:
  """Whether the command line turns a flag off, in one of absl's spellings."""
  off = rf"--?(no{flag}|{flag}=(?i:false|f|0))"
  return any(re.fullmatch(off, word) for word in argv)


def _wants_huge_pages(argv: list[str], environ: dict[str, str]) -> bool:
  """Whether this process must restart for glibc to request huge pages."""
  if _is_off("huge_pages", argv):
    return False
  if not sys.platform.startswith("linux") or "GLIBC_TUNABLES" in environ:
    return False
  try:
    return "[madvise]" in _HUGE_PAGES.read_text()
  except OSError:
    return False


def check_packages() -> None:
  """Ends the process if a folder of the user's own hides a package of ours.

  `python -m` looks for packages in the working directory first, and `research`
  is what many folders there are called.
  """
  home = pathlib.Path(__file__).resolve().parents[2]
  for name in PACKAGES:
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or []) if spec else []
    if home / name not in [pathlib.Path(place).resolve() for place in places]:
      found = places[0] if places else getattr(spec, "origin", None)
      raise SystemExit(
        f"error: {name}: found {found}, which hides Heptad's package in {home}"
        f"\nRun the script `heptad` instead of `python -m experiments`: it does"
        " not import from the working directory first. Or change the directory."
      )


def prepare(argv: list[str] | None = None, resumes: bool = False) -> None:
  """Sets what only the start of a process can set.

  * Packages: see `check_packages`.
  * Huge pages: XLA's CPU client takes its temporaries anew on each call, and
    page faults cost 6 to 14% of a training step. glibc reads the setting at
    process start only, so the process replaces itself, once.
    `--nohuge_pages` turns it off.
  * SIGTERM: while a command that resumes imports, it ends as one that was
    preempted and had nothing to save.
  * Type checks: every annotated function of the library, gin's values
    included, is checked at run time. `--notypecheck` turns it off.

  Args:
    argv: the command line; by default this process's.
    resumes: whether the same command goes on where it was stopped.
  """
  argv = sys.argv if argv is None else argv
  if resumes:
    signal.signal(signal.SIGTERM, _leave)
  check_packages()
  if _wants_huge_pages(argv, dict(os.environ)):
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, sys.orig_argv)
  if not _is_off("typecheck", argv):
    from research import typechecks

    typechecks.install(PACKAGES)


def _leave(*_: Any) -> NoReturn:
  """Ends a process that has nothing to save; also as a handler of signals."""
  text = b"preempted: asked to stop; nothing had to be saved.\n"
  os.write(sys.stderr.fileno(), text)
  os._exit(PREEMPTED)


def cache_directory() -> str:
  """Returns where compiled programs are kept between runs."""
  home = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
  default = os.path.join(home, "heptad", "xla")
  return os.environ.get("JAX_COMPILATION_CACHE_DIR", default)


def setup() -> None:
  """Turns on the compilation cache, as the environment says where it does.

  Where the environment sets one of these options, it stays: the test suite
  caches every program, and its workers call commands.
  """
  import jax

  jax.config.update("jax_compilation_cache_dir", cache_directory())
  defaults = {"min_compile_time_secs": 0.3, "min_entry_size_bytes": -1}
  for name, default in defaults.items():
    option = f"jax_persistent_cache_{name}"
    if option.upper() not in os.environ:
      jax.config.update(option, default)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
  """Which process this is, of which run.

  Attributes:
    coordinator: host:port where process 0 listens. With `processes` and
      `process`, or none of the three: then the environment says it, as SLURM,
      Open MPI, GKE and TPU pods do, or there is but one process.
    processes: how many.
    process: which one, from 0.
    devices: virtual CPU devices of this process, to try a mesh out; None for
      the devices that there are.
  """

  coordinator: str | None = None
  processes: int | None = None
  process: int | None = None
  devices: int | None = None

  def __post_init__(self):
    from research.errors import UserError

    given = (self.coordinator, self.processes, self.process)
    if any(x is not None for x in given) and None in given:
      raise UserError(
        f"found --coordinator={given[0]} --processes={given[1]}"
        f" --process={given[2]}, expected all three or none."
      )
    if not re.fullmatch(r".+:\d+", self.coordinator or "any:0"):
      raise UserError(
        f"--coordinator={self.coordinator}: expected host:port, where process 0"
        " listens, e.g. 10.0.0.1:8476."
      )
    if self.processes is not None and self.processes < 1:
      raise UserError(f"--processes={self.processes}: expected at least 1.")
    if None not in given and not 0 <= given[2] < given[1]:
      raise UserError(
        f"--process={given[2]}: expected a number from 0 to {given[1] - 1}."
      )
    if self.devices is not None and self.devices < 1:
      raise UserError(f"--devices={self.devices}: expected at least 1.")


@contextlib.contextmanager
def cluster(where: Cluster, preemptible: bool = True) -> Iterator[None]:
  """Connects the run's processes; they exit together.

  Args:
    where: the index of this process, and how to find the others.
    preemptible: whether SIGTERM and Ctrl-C make the loop save
      (`training.preemption`) rather than end the process.
  """
  import jax

  from research.training import preemption

  if where.devices is not None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", where.devices)
  jax.config.update("jax_enable_preemption_service", preemptible)
  mine = False
  handling = contextlib.nullcontext()
  if preemptible:
    handling = preemption.handling_signals()
  try:
    with handling as request:
      try:
        mine = _connect(where)
      except preemption.Interrupted:
        _leave()  # JAX is half connected, and would wait for the others
      if request is not None:
        request.connected()
      yield
  except preemption.Preempted:
    if mine:
      jax.distributed.shutdown()
    raise
  # After another error, see `exit_soon`.
  if mine:
    jax.distributed.shutdown()


def exit_soon(status: int) -> None:
  """Ends this process after an error, within `PATIENCE` seconds.

  Python would wait at exit for all threads, such as those of a checkpoint that
  could not be written. Of several processes, JAX would wait at exit for the
  others, and they for this one's part of the computation. If they do not exit
  soon, this process exits without them, which they notice.
  """
  forced = threading.Timer(PATIENCE, os._exit, [status])
  forced.daemon = True
  forced.start()
  if "jax" not in sys.modules:
    return
  import jax

  if not jax.distributed.is_initialized() or jax.process_count() == 1:
    return

  def part():
    with contextlib.suppress(Exception):
      jax.distributed.shutdown()

  together = threading.Thread(target=part, daemon=True)
  together.start()
  together.join(PATIENCE)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def _connect(where: Cluster) -> bool:
  """Connects the processes; returns whether this call did it."""
  import jax

  if jax.distributed.is_initialized():
    return False
  environ = os.environ.get
  coordinator = where.coordinator or environ("JAX_COORDINATOR_ADDRESS")
  processes = where.processes or _number("JAX_NUM_PROCESSES")
  process = where.process
  process = _number("JAX_PROCESS_ID") if process is None else process
  CONNECTING.set()
  try:
    if None not in (coordinator, processes, process):
      jax.distributed.initialize(
        coordinator,
        processes,
        process,
        cluster_detection_method="deactivate",
        shutdown_timeout_seconds=WRITING,
      )
      return True
    with contextlib.suppress(ValueError):  # no cluster that JAX knows
      jax.distributed.initialize(shutdown_timeout_seconds=WRITING)
      return True
    if (coordinator, processes, process) != (None, None, None):
      from research.errors import UserError

      raise UserError(
        f"found JAX_COORDINATOR_ADDRESS={coordinator}"
        f" JAX_NUM_PROCESSES={processes} JAX_PROCESS_ID={process}, expected all"
        " three or none."
      )
    return False
  except (RuntimeError, OSError) as error:
    from research.errors import UserError

    why = (str(error).strip().splitlines() or [repr(error)])[0]
    if "before any JAX" in why:  # a notebook: computing already, alone
      return False
    if coordinator is None:
      raise UserError(
        f"the cluster that JAX finds here cannot be joined: {why}\n"
        "Expected its first process to listen; --coordinator=127.0.0.1:8476"
        " --processes=1\n--process=0 goes without."
      ) from error
    raise UserError(
      f"{coordinator}: process {process} of {processes} could not connect:"
      f" {why}\nExpected process 0 to listen there."
    ) from error
  finally:
    CONNECTING.clear()


def _number(name: str) -> int | None:
  """Returns an environment variable's number; None where it is not set."""
  text = os.environ.get(name)
  if text is not None and not text.isdigit():
    from research.errors import UserError

    raise UserError(f"{name}={text}: expected a number")
  return None if text is None else int(text)


def is_first_process() -> bool:
  """Whether this is the process that writes and prints."""
  import jax

  return jax.process_index() == 0


def first_process_first(act: Callable[[], Any]) -> Any:
  """Returns `act()`, called in the first process, then in all others.

  So they find a file that the first one writes. It may take long, to read all
  data or to wait for a lock (`run_lock`), and the others wait for it.

  Raises:
    UserError: the first process failed, and has said why.
    Preempted: the run was asked to stop while the first process waited.
  """
  from research.errors import UserError
  from research.training import preemption

  last = preemption.last_stop_point
  if not is_first_process():
    end, number = _from_first(_DONE, 0)
    preemption.skip_to_stop_point(number)
    if end == _STOPPED:
      raise preemption.Preempted(preemption.NOTHING_SAVED)
    if end == _FAILED:
      raise UserError("stopped: the first process failed; see its error")
    return act()
  try:
    with preemption.others_waiting():
      result = act()
  except Exception as error:
    stopped = isinstance(error, preemption.Preempted)
    _from_first(_STOPPED if stopped else _FAILED, last())
    raise
  _from_first(_DONE, last())
  return result


def from_first_process(value: bool) -> bool:
  """Returns the first process's value, in all of them; each has to call it."""
  return bool(_from_first(int(value))[0])


def _from_first(*values: int) -> tuple[int, ...]:
  """Returns the first process's values, in all of them."""
  import jax

  if jax.process_count() == 1:
    return values
  import numpy as np
  from jax.experimental import multihost_utils

  from research.training.checkpoints import checkpoint

  # The first one may write, or wait, for longer than a collective does.
  checkpoint.wait_for_all(f"the first says {next(_MEETINGS)}", WRITING)
  found = multihost_utils.broadcast_one_to_all(np.array(values, np.int32))
  return tuple(int(x) for x in found)
