"""How long calls take: what the benches' scripts share.

Scripts run in our Python and in torch's, so this takes the standard library
alone. A script sees it as `timing`, a module run with `-m` in `tests.bench`.
"""

import statistics
import time


def seconds(work) -> float:
  """Returns how long `work()` takes."""
  begin = time.perf_counter()
  work()
  return time.perf_counter() - begin


def median_seconds(work, runs: int) -> float:
  """Returns the median of calls' seconds; the caller has warmed up."""
  return statistics.median(seconds(work) for _ in range(runs))


def tokens_per_s(
  work, tokens: int, runs: int, repeats: int = 1, warm_up: bool = True
) -> dict:
  """Returns tokens/s of `work`: the median of the runs, and each of them.

  Args:
    work: what is called.
    tokens: of a call.
    runs: how many are measured.
    repeats: calls of a run.
    warm_up: whether a call that is not measured comes first: it touches
      memory, and fills caches of XLA's and oneDNN's own.
  """
  if warm_up:
    work()

  def run():
    for _ in range(repeats):
      work()

  rates = [tokens * repeats / seconds(run) for _ in range(runs)]
  return dict(
    tokens_per_s=round(statistics.median(rates), 2),
    runs=[round(r, 2) for r in rates],
  )
