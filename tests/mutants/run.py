"""Plants defects, one at a time, and says which of them the suite finds.

  python -m tests.mutants.run [--only=REGEX] [--slow] [--named] [--list]
    [--report=FILE]

The checkout is never edited: its files are copied into a temporary folder. The
tests that a defect names run first, up to the first that fails; if none does,
all test files that reach the changed file. With --slow, what the default suite
misses is looked for with `--slow` as well. FILE gets a JSON line for each
defect; the same command goes on where it stopped. At the end, the tests that
failed run once more without any defect: what fails then, too, finds nothing.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence

from tests.mutants import defects
from tests.mutants.defects import ROOT, Defect
from tests.mutants.reach import Reach

REPORT = ROOT / "runs" / "mutants.jsonl"
SUITES = {"default": (), "slow": ("--slow",)}
NAMED_SECONDS = 900
REACH_SECONDS = 5400
# A parameter in brackets may have " - " in it, and what follows more brackets.
_FAILED = re.compile(
  r"^(?:FAILED|ERROR) ([^\[\n]+?(?:\[.*?\])?)(?: - .*)?$", re.MULTILINE
)


def failed_tests(report: str) -> list[str]:
  """Returns the tests that failed, by pytest's short summary."""
  return _FAILED.findall(report)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """How a suite took a defect; a line of the report.

  Attributes:
    defect: its name.
    suite: a key of `SUITES`.
    outcome: "found", "missed", or "timeout": not known.
    test: the test that found it, or None.
    all_tests: whether all tests that reach the file ran, not only named ones.
    seconds: of all tests that ran.
    digest: of the defect.
  """

  defect: str
  suite: str
  outcome: str
  test: str | None
  all_tests: bool
  seconds: float
  digest: str

  @property
  def final(self) -> bool:
    """Whether more tests could not change it."""
    return self.outcome == "found" or self.all_tests

  @property
  def id(self) -> str | None:
    """The id of the test that failed; None if none did, or a process died."""
    return self.test if self.test and " (" not in self.test else None


class Copy:
  """A copy of the checkout, with one defect at a time."""

  def __init__(
    self,
    folder: pathlib.Path,
    names: Iterable[str],
    source: pathlib.Path = ROOT,
  ):
    """Copies files.

    Args:
      folder: where the copy lies, and what is made of it.
      names: of the files, as paths from `source`.
      source: the checkout.
    """
    self.root = folder / "tree"
    self._folder, self._source, self._planted = folder, source, 0
    for name in names:
      target = self.root / name
      target.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(source / name, target)

  @contextlib.contextmanager
  def planted(self, defect: Defect) -> Iterator[None]:
    """Context in which the copy has a defect."""
    path, original = self.root / defect.file, self._source / defect.file
    path.write_text(defect.plant(self._source), "utf-8")
    # Python knows compiled files by whole seconds and size.
    self._planted += 1
    stamp = original.stat().st_mtime + self._planted
    os.utime(path, (stamp, stamp))
    try:
      yield
    finally:
      shutil.copy2(original, path)

  def pytest(
    self, tests: Sequence[str], *options: str, seconds: float, cpp: bool = False
  ) -> tuple[list[str], bool]:
    """Returns the tests that fail, and whether there was time for all.

    Args:
      tests: files, or ids.
      *options: of pytest.
      seconds: after which it is stopped.
      cpp: whether to compile libraries anew, outside of the user's cache.

    Raises:
      RuntimeError: pytest itself fails.
    """
    env = os.environ | {"PYTHONPATH": str(self.root), "COLUMNS": "999"}
    env.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla"))
    if cpp:
      env["XDG_CACHE_HOME"] = tempfile.mkdtemp(dir=self._folder)
    quiet = ("-q", "-rfE", "--no-header", "-p", "no:cacheprovider")
    with subprocess.Popen(
      [sys.executable, "-m", "pytest", *quiet, *options, *tests],
      cwd=self.root,
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
    ) as process:
      try:
        out, _ = process.communicate(timeout=seconds)
      except subprocess.TimeoutExpired:
        return [], False
      finally:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(process.pid, signal.SIGKILL)
    failed = failed_tests(out)
    # 5: nothing was collected, as where all cases are slow.
    if process.returncode not in (0, 5) and not failed:
      # A defect may end the process; that is noticed, by no single test.
      if process.returncode < 0:
        return [f"{tests[0]} (the process died)"], True
      raise RuntimeError(f"pytest ended with {process.returncode}:\n{out}")
    return failed, True

  def collected(self, files: Iterable[str], suite: str) -> set[str]:
    """Returns the ids of all tests that a suite runs, of files that exist."""
    there = sorted({x for x in files if (self.root / x).is_file()})
    if not there:
      return set()
    quick = ("-m", "not slow") if suite == "default" else ()
    done = subprocess.run(
      [sys.executable, "-m", "pytest", "--collect-only", "-q", *quick, *there],
      cwd=self.root,
      env=os.environ | {"PYTHONPATH": str(self.root), "COLUMNS": "999"},
      capture_output=True,
      text=True,
    )
    if done.returncode not in (0, 5):
      raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}")
    return {line for line in done.stdout.splitlines() if "::" in line}


def tracked(root: pathlib.Path) -> list[str]:
  """Returns all files that git does not ignore."""
  command = ("git", "ls-files", "-z", "-co", "--exclude-standard")
  done = subprocess.run(command, cwd=root, capture_output=True, check=True)
  names = filter(None, done.stdout.decode().split("\0"))
  return [name for name in names if (root / name).is_file()]


def run(copy: Copy, defect: Defect, suite: str, reach: Reach | None) -> Result:
  """Returns how a suite takes a defect.

  Args:
    copy: of the checkout.
    defect: to plant.
    suite: a key of `SUITES`.
    reach: finds more tests than the named ones; None for those alone.
  """
  start, stages = time.monotonic(), [(defect.tests, NAMED_SECONDS)]
  if reach is not None:
    rest = [x for x in reach.tests_of(defect.file) if x not in defect.tests]
    stages += [(rest, REACH_SECONDS)] if rest else []
  test, outcome = None, "missed"
  cpp = not defect.file.endswith(".py")
  with copy.planted(defect):
    for tests, seconds in stages:
      options = ("-x", *SUITES[suite])
      failed, whole = copy.pytest(tests, *options, seconds=seconds, cpp=cpp)
      if failed:
        test, outcome = failed[0], "found"
        break
      outcome = outcome if whole else "timeout"
  return Result(
    defect=defect.name,
    suite=suite,
    outcome=outcome,
    test=test,
    all_tests=reach is not None,
    seconds=round(time.monotonic() - start, 1),
    digest=defect.digest,
  )


def read(report: pathlib.Path, known: Iterable[Defect]) -> dict:
  """Returns (defect, suite) -> the last result, of defects as they are now."""
  digests = {d.name: d.digest for d in known}
  found = {}
  lines = report.read_text("utf-8").splitlines() if report.exists() else []
  for line in lines:
    with contextlib.suppress(ValueError, TypeError):  # cut off by a crash
      result = Result(**json.loads(line))
      if digests.get(result.defect) == result.digest:
        found[result.defect, result.suite] = result
  return found


def current(copy: Copy, results: dict) -> dict:
  """Returns the results but those of tests that a suite has no longer.

  They have another name or other cases by now, or are slow.
  """

  def files(suite: str) -> set[str]:
    some = [r for r in results.values() if r.suite == suite and r.id]
    return {r.id.partition("::")[0] for r in some}

  ids = {suite: copy.collected(files(suite), suite) for suite in SUITES}
  return {
    key: r for key, r in results.items() if not r.id or r.id in ids[r.suite]
  }


def in_turn(found: Sequence[Defect]) -> list[Defect]:
  """Orders defects so that the first ones are of all rooms."""
  place: collections.Counter[str] = collections.Counter()
  keys = {}
  for defect in found:
    keys[defect.name] = place[defect.room], defect.room
    place[defect.room] += 1
  return sorted(found, key=lambda d: keys[d.name])


def unsound(copy: Copy, results: Iterable[Result]) -> set[str]:
  """Returns those tests that fail without a defect, too."""
  ids = sorted({r.id for r in results if r.id})
  if not ids:
    return set()
  failed, whole = copy.pytest(ids, "--slow", seconds=REACH_SECONDS)
  if not whole:
    raise RuntimeError("the tests that failed take too long without a defect")
  return set(failed)


def table(
  planted: Sequence[Defect], results: dict, bad: set[str], slow: bool
) -> str:
  """Returns, by room, how many defects were found, and the missed ones.

  Args:
    planted: defects.
    results: from `read`.
    bad: tests that fail anyway.
    slow: whether the slow suite ran.
  """

  def outcome(defect, suite):
    result = results.get((defect.name, suite))
    if result is None:
      return "unknown"
    return "unsound" if result.test in bad else result.outcome

  def count(some, *suites):
    return sum(any(outcome(d, s) == "found" for s in suites) for d in some)

  suites = [("default",), ("default", "slow")][: 1 + slow]
  lines = [f"{'room':20} planted  found{'  with --slow' if slow else ''}"]
  rooms = dict.fromkeys(d.room for d in planted)
  for room in [*rooms, "all"]:
    some = [d for d in planted if room in (d.room, "all")]
    counts = "".join(f"{count(some, *s):7}" for s in suites)
    lines.append(f"{room:20} {len(some):7}{counts}")
  for defect in planted:
    if not count([defect], "default"):
      states = [f"{s[-1]}: {outcome(defect, s[-1])}" for s in suites]
      lines.append(f"{', '.join(states)}  {defect}")
  return "\n".join(lines)


def main() -> int:
  """Runs the command; returns its exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--only", default="", help="regular expression of room/name/kind/file"
  )
  parser.add_argument("--slow", action="store_true")
  parser.add_argument(
    "--named", action="store_true", help="only the tests that defects name"
  )
  parser.add_argument("--list", action="store_true", help="run nothing")
  parser.add_argument("--report", type=pathlib.Path, default=REPORT)
  given = parser.parse_args()
  chosen = [
    d
    for d in defects.load()
    if re.search(given.only, f"{d.room}/{d.name}/{d.kind}/{d.file}")
  ]
  if not chosen:
    parser.error(f"no defect matches {given.only!r}")
  for defect in chosen:
    defect.plant(ROOT)  # raises before anything runs
    if given.list:
      print(f"{defect.room:20} {defect.kind:24} {defect.name}")
  if given.list:
    return 0
  given.report.parent.mkdir(parents=True, exist_ok=True)
  results = read(given.report, chosen)
  reach = None if given.named else Reach()
  with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
    copy = Copy(pathlib.Path(folder), tracked(ROOT))
    results = current(copy, results)
    for suite in [*SUITES][: 1 + given.slow]:
      for defect in in_turn(chosen):
        first = results.get((defect.name, "default"))
        if suite == "slow" and first and first.outcome == "found":
          continue
        old = results.get((defect.name, suite))
        if old and (old.final or given.named):
          continue
        result = run(copy, defect, suite, reach)
        results[defect.name, suite] = result
        with given.report.open("a", encoding="utf-8") as file:
          file.write(json.dumps(dataclasses.asdict(result)) + "\n")
        print(
          f"{result.outcome:8}{result.seconds:6.0f} s  {defect}", flush=True
        )
    bad = unsound(copy, results.values())
  for test in sorted(bad):
    print(f"fails without a defect, too: {test}")
  print(table(chosen, results, bad, given.slow))
  return 1 if bad else 0


if __name__ == "__main__":
  sys.exit(main())
