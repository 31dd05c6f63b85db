"""Runs many cases and counts how they ended.

  python -m tests.fuzz.soak --cases=10000 [--workers=2] [--shrink]

The last line on stdout is JSON. With --shrink, what failed is made as small
as it still fails, and left in tests/fuzz/kept for the tests to repeat.
"""

import argparse
import collections
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

from tests.fuzz import worker

ROOT = pathlib.Path(__file__).resolve().parents[2]
KEPT = pathlib.Path(__file__).parent / "kept"
_CHUNK = 500


def _process(numbers: Sequence[int], folder: str) -> list[dict]:
  """Returns the results of one process, which may not have come to the end."""
  env = os.environ | dict(JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
  with subprocess.Popen(
    [sys.executable, "-m", "tests.fuzz.worker", folder],
    cwd=ROOT,
    env=env,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    out, errors = process.communicate("\n".join(map(str, numbers)))
  found = [json.loads(x) for x in out.splitlines() if x.startswith("{")]
  results = [x for x in found if "case" in x]
  if process.returncode:
    if not found or "begin" not in found[-1]:
      raise RuntimeError(f"a worker failed by itself:\n{errors[-3000:]}")
    last = found[-1]
    results.append(
      dict(
        case=last["begin"],
        target=last["target"],
        outcome="FAILED",
        error=f"the process died ({process.returncode}): {errors[-400:]}",
        seconds=0.0,
      )
    )
  return results


def run(numbers: Sequence[int], workers: int = 1) -> list[dict]:
  """Returns each case's result: target, outcome, error, seconds.

  Args:
    numbers: of the cases.
    workers: processes at a time; one that dies is replaced.
  """
  waiting = collections.deque(
    numbers[i : i + _CHUNK] for i in range(0, len(numbers), _CHUNK)
  )
  results: list[dict] = []
  broken: list[Exception] = []

  def work():
    while waiting and not broken:
      try:
        chunk = list(waiting.popleft())
      except IndexError:
        return
      while chunk:
        with tempfile.TemporaryDirectory() as folder:
          try:
            done = _process(chunk, folder)
          except Exception as e:
            broken.append(e)
            return
        results.extend(done)
        seen = {r["case"] for r in done}
        chunk = [n for n in chunk if n not in seen]

  threads = [threading.Thread(target=work) for _ in range(workers)]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  if broken:
    raise broken[0]
  return sorted(results, key=lambda r: r["case"])


def shrink(number: int) -> tuple[str, bytes, str]:
  """Returns a failing case's target, smallest file found, and error."""
  name, data = worker.damaged(number)
  with tempfile.TemporaryDirectory() as folder:
    place = pathlib.Path(folder)

    def failure(data):
      found = worker.attempt(name, data, place)
      kind = found["error"].split(":")[0]
      return kind if found["outcome"] == "FAILED" else None

    kind, size = failure(data), len(data) // 2
    while kind and size:
      i = 0
      while i < len(data):
        less = data[:i] + data[i + size :]
        if failure(less) == kind:
          data = less
        else:
          i += size
      size //= 2
  return name, data, kind or ""


def summary(results: Sequence[dict], seconds: float) -> dict:
  """Returns the counts, and what failed."""
  counts: dict[str, collections.Counter] = {}
  for r in results:
    counts.setdefault(r["target"], collections.Counter())[r["outcome"]] += 1
  failed = [r for r in results if r["outcome"] == "FAILED"]
  return dict(
    cases=len(results),
    failed=len(failed),
    slowest=[
      [r["target"], r["case"], round(r["seconds"], 2)]
      for r in sorted(results, key=lambda r: -r["seconds"])[:3]
    ],
    seconds=seconds,
    targets={k: dict(v) for k, v in sorted(counts.items())},
    failures=failed[:20],
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--cases", type=int, default=10_000)
  parser.add_argument("--first", type=int, default=0)
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument("--shrink", action="store_true")
  args = parser.parse_args()
  start = time.monotonic()
  numbers = range(args.first, args.first + args.cases)
  results = run(list(numbers), args.workers)
  found = summary(results, time.monotonic() - start)
  for r in results:
    if r["outcome"] == "FAILED":
      print(f"case {r['case']} ({r['target']}): {r['error']}", flush=True)
      if args.shrink:
        name, data, kind = shrink(r["case"])
        KEPT.mkdir(exist_ok=True)
        (KEPT / f"{name}-{r['case']}.bin").write_bytes(data)
        print(f"  kept {len(data)} bytes: {kind}", flush=True)
  print(json.dumps(found))
  sys.exit(bool(found["failed"]))


if __name__ == "__main__":
  main()
