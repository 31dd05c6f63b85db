"""Processes of the benches whose scripts run in our Python and in torch's."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence

HUGE_PAGES = {"none": (), "ours": ("ours",), "both": ("ours", "torch")}
"""Whose processes ask for huge pages, by what `--huge_pages` says."""


def environment(side: str, huge_pages: str = "none") -> dict[str, str]:
  """Returns the environment of a side's processes.

  Args:
    side: "torch", or anything else for ours.
    huge_pages: of `HUGE_PAGES`. Our commands ask for huge pages by themselves
      (`experiments.core.runtime`); scripts of the benches do not.
  """
  out = dict(os.environ)
  if ("torch" if side == "torch" else "ours") in HUGE_PAGES[huge_pages]:
    out["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
  return out


def once(
  script: str, side: str, row: str, peers: str, huge_pages: str = "none"
) -> dict:
  """Returns what one process of that side measured.

  Args:
    script: the bench's file, run as `script SIDE ROW`; its last line on stdout
      is JSON.
    side: "torch", or anything else for ours.
    row: what to measure.
    peers: torch's Python.
    huge_pages: see `environment`.
  """
  python = [peers, "-W", "ignore"] if side == "torch" else [sys.executable]
  done = subprocess.run(
    [*python, script, side, row],
    env=environment(side, huge_pages),
    stdout=subprocess.PIPE,
    text=True,
  )
  if done.returncode:
    raise SystemExit(f"{side} {row}: exit {done.returncode}")
  return json.loads(done.stdout.strip().splitlines()[-1])


def compare(
  script: str,
  row: str,
  peers: str,
  repeats: int,
  keys: Sequence[str],
  huge_pages: str = "none",
) -> tuple[dict, list[tuple[dict, dict]]]:
  """Returns a row's line, and what (ours, torch) measured in each round.

  The line has the median of the rounds' ratios of tokens/s, ours over torch's,
  each ratio, and `ours_KEY` and `torch_KEY`, the rounds' medians.

  Args:
    script, row, peers, huge_pages: see `once`.
    repeats: rounds; sides alternate, so that a machine which changes speed
      changes it for both.
    keys: numbers that both sides measure.
  """
  pairs = []
  for _ in range(repeats):
    ours = once(script, "ours", row, peers, huge_pages)
    pairs.append((ours, once(script, "torch", row, peers, huge_pages)))
  ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs]
  line = dict(row=row, ratio=statistics.median(ratios), ratios=ratios)
  for i, side in enumerate(("ours", "torch")):
    for key in keys:
      line[f"{side}_{key}"] = statistics.median(pair[i][key] for pair in pairs)
  return line, pairs
