"""Continues a prompt, or answers it, streaming the text.

  python -m experiments.generate --model=smollm2-135m --prompt="The sea is"
  python -m experiments.generate --model=smollm2-135m --chat \\
    --prompt="What is gravity?" --temperature=0.7 --top_p=0.9 --seed=1

The text is printed as it comes; the last line on stdout is JSON that repeats
it: text, tokens, tokens_per_s, finish_reason.
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments import runtime

  runtime.prepare()

import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import cli, runtime

FLAGS = cli.new_flags()

_MODEL = flags.DEFINE_string(
  "model",
  None,
  cli.MODEL,
  flag_values=FLAGS,
)
_PROMPT = flags.DEFINE_string(
  "prompt", None, "The text to continue.", flag_values=FLAGS
)
_CHAT = flags.DEFINE_bool(
  "chat",
  False,
  "Take the prompt as a user's message to be answered.",
  flag_values=FLAGS,
)
_ADAPTER = flags.DEFINE_string(
  "adapter",
  None,
  "NAME=DIR of an adapter in PEFT's format, to be applied.",
  flag_values=FLAGS,
)
_SAMPLER = flags.DEFINE_enum(
  "sampler",
  "autoregressive",
  ["autoregressive", "diffusion"],
  "How text is generated: token by token, or (diffusion models) unmasked.",
  flag_values=FLAGS,
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 128, "How many tokens at most.", flag_values=FLAGS
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature",
  None,
  "Divides the logits; 0 takes the likeliest token. By default 0, or 1 where "
  "--top_k, --top_p or --min_p is given.",
  flag_values=FLAGS,
)
_TOP_K = flags.DEFINE_integer(
  "top_k", None, "Keep the k likeliest tokens.", flag_values=FLAGS
)
_TOP_P = flags.DEFINE_float(
  "top_p",
  None,
  "Keep the likeliest tokens with this much mass together.",
  flag_values=FLAGS,
)
_MIN_P = flags.DEFINE_float(
  "min_p",
  None,
  "Keep tokens at least this likely relative to the likeliest.",
  flag_values=FLAGS,
)
_PENALTY = flags.DEFINE_float(
  "repetition_penalty",
  None,
  "Above 1 makes tokens already there less likely.",
  flag_values=FLAGS,
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.", flag_values=FLAGS)
_STOP = flags.DEFINE_multi_string(
  "stop",
  [],
  "End before this text; may be given several times.",
  flag_values=FLAGS,
)
_DTYPE = flags.DEFINE_string(
  "dtype",
  "float32",
  "float32 or bfloat16, of weights and computation.",
  flag_values=FLAGS,
)
_PACKED = flags.DEFINE_bool(
  "packed",
  False,
  "Keep a .gguf file's quantized weights as they are.",
  flag_values=FLAGS,
)


def _sampling() -> Any:
  """Returns what the flags say about choosing tokens."""
  from research.nn.sampling import Sampling
  from research.typing import UserError

  rules = dict(top_k=_TOP_K.value, top_p=_TOP_P.value, min_p=_MIN_P.value)
  given = [name for name, value in rules.items() if value is not None]
  temperature = _TEMPERATURE.value
  if temperature is None:
    temperature = 1.0 if given else 0.0
  if temperature == 0 and given:
    raise UserError(
      f"--{given[0]}: has no effect at --temperature=0, which takes the "
      "likeliest token; give a temperature above 0"
    )
  return Sampling(
    temperature=temperature or None,
    repetition_penalty=_PENALTY.value,
    **rules,
  )


def _load() -> Any:
  """Returns the model, with its adapter if one is named."""
  import dataclasses

  from research.interop.load import load_model
  from research.typing import UserError

  loaded = load_model(_MODEL.value, _DTYPE.value, _PACKED.value)
  if loaded.tokenizer is None:
    raise UserError(f"--model={_MODEL.value}: found no tokenizer in it")
  if _ADAPTER.value is None:
    return loaded
  name, equals, folder = _ADAPTER.value.partition("=")
  if not (name and equals and folder):
    raise UserError(
      f"--adapter={_ADAPTER.value}: expected NAME=DIR, e.g. mine=runs/a/adapter"
    )
  from research.lora.peft import load_adapter

  params = load_adapter(folder, loaded.params, loaded.model)
  return dataclasses.replace(loaded, params=params)


def _tokens(tokenizer: Any) -> list[int]:
  """Returns the prompt's ids, rendered as a conversation if asked to."""
  from research.typing import UserError

  text = _PROMPT.value
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise UserError("--prompt: is no UTF-8; convert it first") from error
  if not _CHAT.value:
    return tokenizer.encode(text, add_special=True)
  return tokenizer.encode(tokenizer.chat([{"role": "user", "content": text}]))


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Generates; returns the result, which the command prints as JSON."""
  del argv
  cli.required(model=_MODEL.value, prompt=_PROMPT.value)
  runtime.setup()
  import jax

  from research.nn import generate, sampling, stream
  from research.quant import panels
  from research.typing import UserError

  if _SAMPLER.value == "diffusion":
    raise UserError(
      "--sampler=diffusion: needs a masked diffusion model, of which none can "
      "be loaded yet; leave the flag out"
    )
  rules = _sampling()
  sampling.check(rules)
  loaded = _load()
  prompt = _tokens(loaded.tokenizer)
  params = generate.prepare(panels.decoding(loaded.params), loaded.model)
  start, first, pieces = time.perf_counter(), None, []
  for (piece,) in stream.stream(
    loaded.model,
    params,
    loaded.tokenizer,
    [prompt],
    _MAX_NEW_TOKENS.value,
    rules,
    jax.random.key(_SEED.value),
    stop=_STOP.value,
  ):
    first = first or time.perf_counter()
    pieces.append(piece)
    print(piece.text, end="", flush=True)
  end, tokens = time.perf_counter(), sum(p.tokens for p in pieces)
  print()
  after = end - first
  return {
    "text": "".join(p.text for p in pieces),
    "tokens": tokens,
    "tokens_per_s": (tokens - 1) / after if tokens > 1 and after else None,
    "finish_reason": next(p.reason for p in pieces if p.reason),
    "prompt_tokens": len(prompt),
    "seconds": end - start,
    "model": _MODEL.value,
    "adapter": _ADAPTER.value,
  }


if __name__ == "__main__":
  cli.run(main)
