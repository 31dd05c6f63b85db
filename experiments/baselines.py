"""Measures what compressors and n-grams make of an experiment's held-out text.

  python -m experiments.baselines --config=runs/pretrain_tiny.gin

They read what the model of that experiment reads: n-grams are counted on its
training text, and xz_after_training is what the held-out text adds to the
compressed training text. The last line on stdout is JSON, in bits per byte: to
be compared with bits_per_byte in the result of the run.
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments import runtime

  runtime.prepare()

from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import cli

FLAGS = cli.new_flags()

_CONFIG = flags.DEFINE_string(
  "config",
  None,
  "Gin file, here or under configs/, e.g. runs/pretrain_tiny.gin.",
  flag_values=FLAGS,
)
_SET = flags.DEFINE_multi_string(
  "set", [], "Gin binding that wins over the file's.", flag_values=FLAGS
)
_ORDER = flags.DEFINE_integer(
  "order", 6, "Bytes of the longest n-gram, at most 8.", flag_values=FLAGS
)


def _text(data: Any, part: str) -> bytes:
  """Returns all documents of one part of an experiment."""
  from research.data.sources import Documents
  from research.typing import UserError

  source = getattr(data, "source", None)
  if not isinstance(source, Documents):
    raise UserError(
      f"--config={_CONFIG.value}: its {part} data are {str(source)[:80]},"
      " expected documents of text"
    )
  return "".join(source[i] for i in range(len(source))).encode("utf-8")


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Measures; returns the result, which the command prints as JSON."""
  del argv
  cli.required(config=_CONFIG.value)
  from experiments import config
  from research.data import baselines
  from research.typing import UserError

  if not 1 <= _ORDER.value <= 8:
    raise UserError(f"--order={_ORDER.value}: expected 1 to 8")
  experiment, _ = config.read(_CONFIG.value, _SET.value)
  known = _text(experiment.data, "training")
  text = _text(experiment.heldout, "heldout")
  found = baselines.compressed(text, known)
  found["ngram"] = baselines.ngram(text, known, _ORDER.value)
  for name, bits in found.items():
    cli.say(f"{name:18} {bits:.3f} bits per byte")
  return {
    **found,
    "order": _ORDER.value,
    "bytes": len(text),
    "training_bytes": len(known),
  }


if __name__ == "__main__":
  cli.run(main)
