"""Processes of the benches whose scripts run in our Python and in torch's."""

import json
import os
import subprocess
import sys

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
