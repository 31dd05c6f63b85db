"""Quantizes a model by rules, with calibration where a rule needs it.

  python -m experiments.quantize --config=runs/quant/gptq_smollm2.gin --to=DIR
  python -m experiments.perplexity --model=DIR --text=README.md

DIR is then a checkpoint in our format, which --model= of other commands
accepts. It also has quantize.gin, the configuration, and quantize.json: the
format, bits, errors and damping of each matrix, and which windows of text
calibrated it. The last line on stdout is JSON: matrices, bits_per_weight,
output_error, nearest_error, failed, seconds, bytes.
"""

if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

import pathlib
import time
from collections.abc import Sequence
from typing import Any

from experiments.core import cli, runtime
from experiments.core.definers import definers
from research.io import folders

FLAGS = cli.new_flags()
define = definers(FLAGS)

_CONFIG = define.text(
  "config",
  "Gin file: a path, or one under configs/, e.g. runs/quant/gptq_smollm2.gin.",
)
_TO = define.text("to", "The directory to write; it must not exist yet.")
_SET = cli.define_set(FLAGS, "BITS=3")
_TABLE = define.switch("table", "Print a line for each matrix.")


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Quantizes; returns the result, which the command prints as JSON."""
  del argv
  cli.required(config=_CONFIG.value, to=_TO.value)
  cli.local(to=_TO.value)
  to, start = pathlib.Path(_TO.value), time.perf_counter()
  folders.check_free(to)
  cli.run_file(_CONFIG.value, _SET.value, root="quantizing.Job")
  runtime.setup()
  from experiments.converting.conversion import bytes_on_disk
  from experiments.core import config
  from experiments.quantizing import quantizing
  from research.interop import convert, sources
  from research.training import memory

  job, text = config.read(_CONFIG.value, _SET.value, root=quantizing.Job)
  loaded, params, reports = job.run(cli.say)
  seconds = time.perf_counter() - start
  for report in reports:
    if _TABLE.value:
      cli.say(report.table())
    for warning in report.warnings():
      cli.say(f"warning: {warning}")
  name = str(getattr(job.model, "name", "")) or None
  origin = dict(format="quantized", config=_CONFIG.value, of=name or "")
  convert.to_orbax(sources.from_training(loaded, params, origin, name), to)
  (to / "quantize.gin").write_text(text, encoding="utf-8")
  cli.write_json(to / "quantize.json", [report.as_dict() for report in reports])
  summary = reports[-1].summary() if reports else {}
  return {
    **summary,
    "seconds": seconds,
    "seconds_in_all": time.perf_counter() - start,
    "bytes": bytes_on_disk(to),
    "peak_memory_bytes": memory.peak_memory_bytes(),
    "to": _TO.value,
  }


if __name__ == "__main__":
  cli.run(main)
