"""Measures keys and values in few bits, in many ways, beside each other.

  python -m experiments.studies.quant.kv_table \
      --config=runs/quant/claims_kv_smollm2.gin --workdir=DIR

A configuration is a `kv_study.Table`. Ends with a table of perplexities, read
through the cache, one of attention's errors with all tokens packed, and what
they say of known claims; result.json in DIR has all of it, and is the last line
on stdout.
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

from collections.abc import Sequence
from typing import Any

from experiments.core import cli
from experiments.studies import claims

FLAGS = cli.new_flags()

_GIVEN = claims.define(
  FLAGS,
  "runs/quant/claims_kv_smollm2.gin",
  "kv_study.Table.chunk=1 for decoding's own steps",
)


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Measures; returns the result."""
  del argv
  from experiments.core import tables
  from experiments.studies.quant import kv_study

  read = _GIVEN.read(kv_study.Table)
  folder = _GIVEN.folder
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.gin").write_text(read.text)
  table = read.experiment
  loaded = table.model.load()
  ids = kv_study.read(table, loaded.tokenizer)
  attention = kv_study.errors(table, loaded, ids)
  if attention:
    cli.say(f"\n{tables.text(attention)}\n")
  caches = kv_study.perplexities(table, loaded, ids)
  cli.say(f"\n{tables.text(caches)}\n")
  verdicts = kv_study.verdicts(caches, attention)
  result = {
    "caches": caches,
    "attention": attention,
    "claims": claims.tell(verdicts),
  }
  return claims.finish(folder, result)


if __name__ == "__main__":
  cli.run(main)
