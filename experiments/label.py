"""Labels the steps of a policy's solutions: data of process reward models.

  python -m experiments.label --config=runs/prm/countdown_labels.gin --to=FILE

Samples solutions of a task's problems from a trained policy, or reads the pool
of a search (LabelRun.pool), and writes FILE as JSON Lines in our native layout
(research/prm/formats/native.py): steps, labels of the task's exact oracle up to
the first error, and how many rollouts from the end of each step succeed. The
last line on stdout is JSON: solutions, steps, labelled, correct, base_rate,
first_errors, cut, seconds, to.
"""

if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

import collections
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from experiments.core import cli, runtime
from experiments.core.definers import definers
from research.io import folders

FLAGS = cli.new_flags()
define = definers(FLAGS)

_CONFIG = cli.define_config(FLAGS, "runs/prm/countdown_labels.gin")
_TO = define.text("to", "The file to write; it must not exist yet.")
_SET = cli.define_set(FLAGS, "ROLLOUTS=16")


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Labels; returns the result, which the command prints as JSON."""
  del argv
  cli.required(config=_CONFIG.value, to=_TO.value)
  cli.local(to=_TO.value)
  to, start = pathlib.Path(_TO.value), time.perf_counter()
  folders.check_free(to, file=True)
  cli.run_file(_CONFIG.value, _SET.value, root="label_run.LabelRun")
  runtime.setup()
  from experiments.core import config
  from experiments.labelling.label_run import LabelRun
  from research.prm import formats

  # Now, since labelling may take hours.
  to.parent.mkdir(parents=True, exist_ok=True)
  run, _ = config.read(_CONFIG.value, _SET.value, root=LabelRun)
  solutions, cut = run.run(cli.say)
  formats.write(str(to), solutions, formats.FORMATS["native"])
  labels = [x for one in solutions for x in one.labels if x is not None]
  first = collections.Counter(one.first_error for one in solutions)
  known = sorted(i for i in first if i is not None)
  return {
    "solutions": len(solutions),
    "steps": sum(len(one.steps) for one in solutions),
    "labelled": len(labels),
    "correct": _mean([bool(one.final_correct) for one in solutions]),
    "base_rate": _mean(labels),
    "first_errors": {str(i): first[i] for i in known},
    "cut": cut,
    "seconds": time.perf_counter() - start,
    "to": str(to),
  }


def _mean(values: Sequence[float | int]) -> float | None:
  return sum(values) / len(values) if values else None


if __name__ == "__main__":
  cli.run(main)
