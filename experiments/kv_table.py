"""Measures keys and values in few bits, in many ways, beside each other.

  python -m experiments.kv_table --config=runs/quant/claims_kv_smollm2.gin \
      --workdir=DIR

A configuration is a `kv_study.Table`. Ends with a table of perplexities, read
through the cache, one of attention's errors with all tokens packed, and what
they say of known claims; result.json in DIR has all of it, and is the last line
on stdout.
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments import runtime

  runtime.prepare()

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import cli

FLAGS = cli.new_flags()

_CONFIG = flags.DEFINE_string(
  "config",
  None,
  "Gin file, here or under configs/, e.g. runs/quant/claims_kv_smollm2.gin.",
  flag_values=FLAGS,
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Where everything goes; made if missing.",
  flag_values=FLAGS,
)
_SET = flags.DEFINE_multi_string(
  "set",
  [],
  "Gin binding, e.g. --set=kv_study.Table.chunk=1 for decoding's own steps.",
  flag_values=FLAGS,
)


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Measures; returns the result."""
  del argv
  cli.required(config=_CONFIG.value, workdir=_WORKDIR.value)
  cli.local(workdir=_WORKDIR.value)
  from experiments import config, kv_study, runtime, tables

  runtime.setup()
  read = config.read(_CONFIG.value, _SET.value, root=kv_study.Table)
  folder = pathlib.Path(_WORKDIR.value)
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
  for claim, found, holds in verdicts:
    cli.say(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}\n  {found}")
  result = {
    "caches": caches,
    "attention": attention,
    "claims": [v._asdict() for v in verdicts],
  }
  text = json.dumps(cli.plain(result), indent=2)
  (folder / "result.json").write_text(text + "\n")
  return result


if __name__ == "__main__":
  cli.run(main)
