"""Measures how well a model predicts a text.

  python -m experiments.perplexity --model=smollm2-135m --text=README.md

The text is tokenised once, without special tokens, and cut into windows of
--window tokens that do not overlap. Each is read alone; all its tokens but the
first are predicted, and a last partial window counts from two tokens on. The
last line on stdout is JSON: perplexity, tokens (predicted), tokens_per_s.

Models that always saw a first token (Gemma's <bos>) predict badly without it:
--bos=auto puts it before each window where the tokenizer says so, and predicts
the same tokens.

  python -m experiments.perplexity --model=smollm2-135m --text=README.md \\
    --kv=k4v4 --chunk=1 --batch=4

reads through a cache of keys and values in few bits, --chunk tokens at a time,
and measures the model without it as well.
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.core import cli, packed_weights, runtime

FLAGS = cli.new_flags()

BOS = ("never", "auto", "always")

_MODEL = flags.DEFINE_string(
  "model",
  None,
  cli.MODEL,
  flag_values=FLAGS,
)
_TEXT = flags.DEFINE_string(
  "text", None, "A text file in UTF-8.", flag_values=FLAGS
)
_WINDOW = flags.DEFINE_integer(
  "window", 1024, "Tokens read together.", flag_values=FLAGS
)
_BOS = flags.DEFINE_enum(
  "bos",
  "never",
  BOS,
  "Whether the model's first token stands before each window: auto where its "
  "tokenizer, or the run that trained it, says so.",
  flag_values=FLAGS,
)
_MAX_WINDOWS = flags.DEFINE_integer(
  "max_windows",
  8,
  "How many windows at most, from the start; 0 for all.",
  flag_values=FLAGS,
)
_BATCH = flags.DEFINE_integer(
  "batch", 1, "Windows computed at a time.", flag_values=FLAGS
)
_DTYPE = flags.DEFINE_string(
  "dtype",
  "float32",
  "float32 or bfloat16, of weights and computation.",
  flag_values=FLAGS,
)
packed_weights.define(FLAGS)
_KV = flags.DEFINE_string(
  "kv",
  "",
  "Keys and values in so many bits, e.g. k4v4, k8v4,residual=64 or int8.",
  flag_values=FLAGS,
)
_CHUNK = flags.DEFINE_integer(
  "chunk",
  None,
  "Tokens read at a time, through a cache; 1 with --kv, else the whole window.",
  flag_values=FLAGS,
)


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Measures; returns the result, which the command prints as JSON."""
  del argv
  cli.required(model=_MODEL.value, text=_TEXT.value)
  text = cli.read_text(_TEXT.value, "text")
  runtime.setup()
  from research.quant.kv import kv_quantizer
  from research.typing import UserError

  kv = kv_quantizer.parse(_KV.value)
  chunk = _CHUNK.value
  if kv is not None and chunk is None:
    chunk = 1
  packed = FLAGS["packed"].value
  loaded = packed_weights.load(_MODEL.value, _DTYPE.value, packed)
  if loaded.tokenizer is None:
    raise UserError(f"--model={_MODEL.value}: found no tokenizer in it")
  ids = loaded.tokenizer.encode(text)
  begin = _begin(loaded.tokenizer)
  found, more = _measured(loaded, ids, begin, chunk, kv), {}
  if kv is not None:
    without = _measured(loaded, ids, begin).perplexity
    more = {"kv": _KV.value, "chunk": chunk, "perplexity_without": without}
    more |= _cache_bytes(loaded, kv)
  return {
    "perplexity": found.perplexity,
    "tokens": found.tokens,
    "tokens_per_s": found.tokens / found.seconds,
    **{
      k: v
      for k, v in dataclasses.asdict(found).items()
      if k in ("nll", "windows", "seconds")
    },
    "window": _WINDOW.value,
    "bos": _BOS.value,
    "dtype": _DTYPE.value,
    "model": _MODEL.value,
    **packed_weights.report(loaded.params),
    **more,
  }


def _begin(tokenizer: Any) -> tuple[int, ...]:
  """Returns the special tokens before each window."""
  from research.typing import UserError

  said = tokenizer.special.row_begin
  if _BOS.value == "auto":
    return said
  if _BOS.value == "always":
    if not said and tokenizer.bos is None:
      raise UserError(
        f"--bos=always: the tokenizer of {_MODEL.value} names no bos; expected "
        "--bos=auto or never"
      )
    return said or (tokenizer.bos,)
  if said and not FLAGS["bos"].present:
    names = "".join(map(tokenizer.backend.id_to_token, said))
    cli.warn(
      f"this model expects {names} first and reads without it here; --bos=auto "
      "puts it before each window, --bos=never says that none is meant"
    )
  return ()


def _measured(
  loaded: Any,
  ids: Sequence[int],
  begin: Sequence[int],
  chunk: int | None = None,
  kv: Any = None,
) -> Any:
  """Returns the perplexity, by weights laid out for so many rows at a time."""
  from research import tree
  from research.generation.perplexity import perplexity
  from research.quant.kv import kv_quantizer
  from research.quant.layouts import cpu_layout

  rows = (chunk or _WINDOW.value) * _BATCH.value
  params = cpu_layout.reading(loaded.params, loaded.model, rows)
  if params is loaded.params and isinstance(kv, kv_quantizer.KVByLayer):
    params = tree.unroll(params)
  return perplexity(
    loaded.model,
    params,
    ids,
    window=_WINDOW.value,
    max_windows=_MAX_WINDOWS.value or None,
    batch=_BATCH.value,
    chunk=chunk,
    kv=kv,
    begin=begin,
  )


def _cache_bytes(loaded: Any, kv: Any) -> dict[str, Any]:
  """Returns what a window's keys and values take in the cache."""
  import jax

  from research import tree
  from research.quant.kv import kv_memory

  shapes = jax.eval_shape(tree.unroll, loaded.params)
  took = kv_memory.memory(loaded.model, shapes, 1, _WINDOW.value, kv=kv)
  return {
    "kv_bytes_per_token": took.bytes_per_token,
    "kv_bits_per_number": took.bits_per_number,
    "kv_cache_bytes": took.cache_bytes,
  }


if __name__ == "__main__":
  cli.run(main)
