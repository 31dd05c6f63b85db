"""The other side of `isolation.Worker`: calls functions that may hang or die.

  python -m research.reasoning.worker MODULE MEMORY

It reads a request a line, `{"call": name, "args": [...]}`, calls the public
function of that name in MODULE, and writes a line, `{"value": ...}` or
`{"error": ...}`. What a function prints goes nowhere.
"""

import importlib
import json
import os
import resource
import sys
from typing import Any


def _limit(memory: int) -> None:
  """Limits the process' address space, so that 9^9^9 is a MemoryError."""
  _, most = resource.getrlimit(resource.RLIMIT_AS)
  if most != resource.RLIM_INFINITY:
    memory = min(memory, most)
  resource.setrlimit(resource.RLIMIT_AS, (memory, most))
  # Its operands are a model's: a large power must not print for minutes.
  sys.set_int_max_str_digits(10_000)


def _answer(module: Any, line: str) -> dict[str, Any]:
  try:
    request = json.loads(line)
    name = request["call"]
    if name.startswith("_"):
      raise ValueError(f"{name} is not public")
    value = getattr(module, name)(*request["args"])
    return {"value": json.loads(json.dumps(value, allow_nan=False))}
  except (Exception, RecursionError) as error:
    return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def main(module: str, memory: str) -> None:
  """Serves a module's functions until its input ends."""
  # The answers' pipe is kept from what functions print.
  out = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)
  try:
    _limit(int(memory))
    served, ready = importlib.import_module(module), {"value": "ready"}
  except Exception as error:
    served, ready = None, {"error": f"{type(error).__name__}: {error}"}
  print(json.dumps(ready), file=out)
  if served is None:
    return
  for line in sys.stdin:
    print(json.dumps(_answer(served, line)), file=out)


if __name__ == "__main__":
  main(*sys.argv[1:])
