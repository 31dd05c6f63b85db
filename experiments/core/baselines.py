"""Measures compressors and n-grams on an experiment's held-out text.

  python -m experiments.core.baselines --config=runs/pretrain_tiny.gin

They read the texts of that experiment: n-grams are counted on its training
text, and xz_after_training is the size that the held-out text adds to the
compressed training text. The last line on stdout is JSON, in bits per byte: to
be compared with bits_per_byte in the result of the run. It also has how many
held-out documents are in the training text (exact), or share at least half of
their 13-grams of words with it (known), and the share of the held-out text that
is in the latter (known_share), which tests memory alone.
"""

if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

from collections.abc import Sequence
from typing import Any

from experiments.core import cli
from experiments.core.definers import definers

FLAGS = cli.new_flags()
define = definers(FLAGS)

_CONFIG = cli.define_config(FLAGS, "runs/pretrain_tiny.gin")
_SET = cli.define_set(FLAGS)
_ORDER = define.integer(
  "order", "Bytes of the longest n-gram, at most 8.", default=6
)


KNOWN = 0.5
"""Share of a document's n-grams of words from which on it counts as known."""


def _documents(data: Any, part: str) -> Any:
  """Returns the documents of one part of an experiment."""
  from research.data.sources import Documents
  from research.typing import UserError

  source = getattr(data, "source", None)
  if not isinstance(source, Documents):
    raise UserError(
      f"--config={_CONFIG.value}: its {part} data are {str(source)[:80]},"
      " expected documents of text"
    )
  return source


def _joined(texts: Sequence[str]) -> bytes:
  return "".join(texts).encode("utf-8")


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Measures; returns the result, which the command prints as JSON."""
  del argv
  cli.required(config=_CONFIG.value)
  from experiments.core import config
  from experiments.stages import staged
  from research.data import baselines, duplicates
  from research.typing import UserError

  if not 1 <= _ORDER.value <= 8:
    raise UserError(f"--order={_ORDER.value}: expected 1 to 8")
  experiment = staged.final(config.read(_CONFIG.value, _SET.value).experiment)
  training, heldout = (
    duplicates.source_texts(_documents(data, part))
    for data, part in (
      (experiment.data, "training"),
      (experiment.heldout, "heldout"),
    )
  )
  known, text = _joined(training), _joined(heldout)
  found = baselines.compressed(text, known)
  found["ngram"] = baselines.ngram(text, known, _ORDER.value)
  for name, bits in found.items():
    cli.say(f"{name:18} {bits:.3f} bits per byte")
  shared = duplicates.compare(training, heldout)
  cli.say(shared.table())
  known_texts = [heldout[m.evaluation] for m in shared.above(KNOWN)]
  return {
    **found,
    "order": _ORDER.value,
    "bytes": len(text),
    "training_bytes": len(known),
    "documents": shared.documents,
    "exact": sum(m.exact for m in shared.matches),
    "known": len(known_texts),
    "known_share": len(_joined(known_texts)) / len(text),
  }


if __name__ == "__main__":
  cli.run(main)
