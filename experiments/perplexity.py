"""Measures how well a model predicts a text.

  python -m experiments.perplexity --model=smollm2-135m --text=README.md

The text is tokenized once, without special tokens, and split into windows of
--window tokens that do not overlap. Each window is scored independently, except
for its first token; a last partial window counts if it has two tokens or more.
The last line on stdout is JSON: perplexity, tokens (scored), tokens_per_s.

Models that were always trained with a first token (Gemma's <bos>) predict badly
without it: --bos=auto puts it before each window if the tokenizer does, and
scores the same tokens.

  python -m experiments.perplexity --model=smollm2-135m --text=README.md \\
    --kv=k4v4 --chunk=1 --batch=4

reads through a quantized KV cache, --chunk tokens at a time, and also measures
the model without it.
"""

if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

from collections.abc import Sequence
from typing import Any

from experiments.core import cli, flags_from, runtime
from experiments.core.definers import definers
from experiments.generating import packed_weights
from experiments.generating.text_perplexity import TextPerplexity

FLAGS = cli.new_flags()
define = definers(FLAGS)

_MODEL = define.text("model", cli.MODEL)
_TEXT = define.text("text", "A text file in UTF-8.")
_DTYPE = packed_weights.define_dtype(FLAGS)
packed_weights.define(FLAGS)
flags_from.define(TextPerplexity, FLAGS)


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Measures; returns the result, which the command prints as JSON."""
  del argv
  cli.required(model=_MODEL.value, text=_TEXT.value)
  cli.model(_MODEL.value)
  text = cli.read_text(_TEXT.value, "text")
  settings = flags_from.build(
    TextPerplexity, FLAGS, hint_at_bos=not FLAGS["bos"].present
  )
  runtime.setup()
  packed = FLAGS["packed"].value
  loaded = packed_weights.load_with_tokenizer(
    _MODEL.value, _DTYPE.value, packed
  )
  return settings.measure(loaded, text, _MODEL.value) | {
    "dtype": _DTYPE.value,
    "model": _MODEL.value,
    **packed_weights.report(loaded.params),
  }


if __name__ == "__main__":
  cli.run(main)
