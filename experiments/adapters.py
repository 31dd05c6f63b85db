"""Combines, converts and examines adapters.

  python -m experiments.adapters --op=svd --from=A --from=B --weight=0.7 \\
    --weight=0.3 --rank=8 --to=DIR
  python -m experiments.adapters --op=lora --from=A --energy=0.99 --to=DIR
  python -m experiments.adapters --op=diagnose --from=A --picture=a.png
  python -m experiments.adapters --op=fidelity --from=A --dtype=bfloat16 \\
    --text=README.md

--from takes PEFT's directories, runs' working directories, and llama.cpp's
.gguf adapters together with --base. Sums, lora and intruders write an adapter
in PEFT's format to --to; other operations write nothing but --picture,
--report, and for merge --to. The last line on stdout is JSON.
"""

if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

import pathlib
from collections.abc import Sequence
from typing import Any

from experiments.adapting.combine import SUMS, ToLora
from experiments.adapting.diagnose import Diagnose, WeakenIntruders
from experiments.adapting.fidelity import Fidelity
from experiments.adapting.merge import Merge
from experiments.adapting.validate import Validate
from experiments.core import cli, runtime
from experiments.core.choices import Choice, Choices
from research.io import folders

OPERATIONS = Choices(
  "op",
  "What to do.",
  {
    **SUMS,
    "lora": Choice(ToLora),
    "intruders": Choice(WeakenIntruders),
    "diagnose": Choice(Diagnose),
    "fidelity": Choice(Fidelity),
    "validate": Choice(Validate),
    "merge": Choice(Merge),
  },
)

FLAGS = cli.new_flags()
OPERATIONS.define(FLAGS)


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Does it; returns the result, which the command prints as JSON."""
  del argv
  operation = OPERATIONS.chosen(FLAGS)
  cli.existing("from", operation.from_)
  for name in ("base", "original"):
    if FLAGS[name].value is not None:
      cli.model(FLAGS[name].value)
  cli.existing("text", filter(None, [FLAGS["text"].value]))
  if FLAGS["to"].value is not None:
    folders.check_free(pathlib.Path(FLAGS["to"].value))
  runtime.setup()
  cli.loading(*operation.from_)
  common = {"op": FLAGS["op"].value, "from": FLAGS["from"].value}
  return common | operation.run()


if __name__ == "__main__":
  cli.run(main)
