"""Processes of the benches whose scripts run in our Python and in torch's."""

import json
import subprocess
import sys


def once(script: str, side: str, row: str, peers: str) -> dict:
  """Returns what one process of that side measured.

  Args:
    script: the bench's file, run as `script SIDE ROW`; its last line on stdout
      is JSON.
    side: "torch", or anything else for ours.
    row: what to measure.
    peers: torch's Python.
  """
  python = [peers, "-W", "ignore"] if side == "torch" else [sys.executable]
  done = subprocess.run(
    [*python, script, side, row], stdout=subprocess.PIPE, text=True
  )
  if done.returncode:
    raise SystemExit(f"{side} {row}: exit {done.returncode}")
  return json.loads(done.stdout.strip().splitlines()[-1])
