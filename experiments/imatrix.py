"""Collects an importance matrix, by which GGUF encoders weight errors.

  python -m experiments.imatrix --model=smollm2-135m --to=smollm2.imatrix.gguf
  python -m experiments.convert --from=smollm2-135m --to=model.gguf \\
    --format=gguf:Q4_K_M --fallback --imatrix=smollm2.imatrix.gguf

An importance matrix has, for every matrix of the layers, the sum of squares of
each input over windows of a text. The default text is a part of the Python
language reference.
The file is in llama.cpp's format. The last line on stdout is JSON: matrices,
tokens, windows.
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

_MODEL = define.text("model", cli.MODEL)
_TO = define.text("to", "The file to write; it must not exist yet.")
_TEXT = define.text(
  "text", "A text file in UTF-8; by default topics of the Python reference."
)
_WINDOWS = define.integer(
  "windows",
  "Windows that are sampled from the text.",
  default=24,
  lower_bound=1,
)
_WINDOW = define.integer(
  "window", "Tokens of a window.", default=512, lower_bound=1
)
_BATCH = define.integer(
  "batch", "Windows computed at a time.", default=4, lower_bound=1
)
_SEED = define.integer("seed", "Seed of the sampling.", default=0)


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Collects; returns the result, which the command prints as JSON."""
  del argv
  cli.required(model=_MODEL.value, to=_TO.value)
  cli.model(_MODEL.value)
  to, start = pathlib.Path(_TO.value), time.perf_counter()
  folders.check_free(to, file=True)
  given = {}
  if _TEXT.value is not None:
    given["source"] = [cli.read_text(_TEXT.value, "text")]
  runtime.setup()
  from experiments.generating import diffusion
  from research.interop.gguf import imatrix
  from research.interop.load import load_model
  from research.quant.algorithms.calibrate import Calibration

  cli.loading(_MODEL.value)
  loaded = load_model(_MODEL.value)
  diffusion.check_next_token(loaded, f"--model={_MODEL.value}")
  text = Calibration(
    windows=_WINDOWS.value,
    length=_WINDOW.value,
    batch=_BATCH.value,
    seed=_SEED.value,
    **given,
  ).read(loaded.tokenizer)
  name = pathlib.Path(_TEXT.value).name if _TEXT.value else "pydoc topics"
  found = imatrix.collect(
    loaded.model, loaded.params, text.tokens, _BATCH.value, name
  )
  imatrix.write(to, found)
  return {
    "matrices": len(found.squares),
    "tokens": int(text.tokens.size),
    "windows": found.windows,
    "model": _MODEL.value,
    "to": _TO.value,
    "seconds": time.perf_counter() - start,
  }


if __name__ == "__main__":
  cli.run(main)
