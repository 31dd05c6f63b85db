"""A peer that is not installed fails what compares with it.

A comparison that is silently skipped is none. `ALLOW_MISSING=1` skips it, where
a peer cannot be had.
"""

import os

import pytest


def missing(peer: str, target: str) -> None:
  """Fails, or skips, the module that is being collected.

  Args:
    peer: what is not installed.
    target: of make, which installs it.
  """
  text = f"{peer} is not installed: run `make {target}`"
  if os.environ.get("ALLOW_MISSING") == "1":
    pytest.skip(text, allow_module_level=True)
  pytest.fail(
    f"{text}, or set ALLOW_MISSING=1 to skip its comparisons", pytrace=False
  )
