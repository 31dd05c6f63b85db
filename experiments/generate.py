"""Continues a prompt, or answers it, streaming the text.

  python -m experiments.generate --model=smollm2-135m --prompt="The sea is"
  python -m experiments.generate --model=smollm2-135m --chat \\
    --prompt="What is gravity?" --temperature=0.7 --top_p=0.9 --seed=1
  python -m experiments.generate --model=smollm2-135m --adapter=a=runs/a \\
    --adapter=b=runs/b --prompt="The sea is" --prompt="def area(r):"

The text is printed as it is generated; the last line on stdout is JSON: text,
tokens, tokens_per_s, finish_reason. Several prompts form one batch; their
answers are printed at the end, and the JSON has a list of rows. With several
adapters, the first is used for the first prompt and so on; with one prompt,
each adapter answers it. To use an adapter for another prompt as well, repeat
its NAME alone; __base__ means no adapter.

--chat without a prompt is a conversation; --prompt_file=- reads from stdin:

  python -m experiments.generate --model=smollm2-135m --chat \\
    --system="Answer in one sentence."
  git diff | python -m experiments.generate --model=DIR --prompt_file=-

--image=FILE passes an image to a vision language model, before the prompt or in
place of <image> in it; the JSON has image_tokens.

  python -m experiments.generate --model=DIR --image=photo.jpg \\
    --prompt="How many red circles are there?"

--pages=16,rows=2 uses a paged KV cache with pages of 16 tokens and processes
two prompts at a time; when one ends, a waiting prompt takes its pages
(continuous batching). The JSON has the number of pages.

Masked diffusion models fill in masks, block after block; a terminal shows it:

  python -m experiments.generate --sampler=diffusion --model=DIR --chat \\
    --prompt="What is gravity?" --block=32 --policy=threshold:0.9 --cache=dual

The JSON then has calls (forward passes; two per step with --guidance), and
tokens_per_call and tokens_per_s of the tokens before the first end of text.
With --canvas=auto the model determines the length of the answer; the JSON has
it as canvas. --infill fills gaps within a text, [[N]] for N tokens; the JSON
has them as gaps:

  python -m experiments.generate --sampler=diffusion --model=DIR \\
    --infill="def area(r): [[8]] return pi * r**2"
"""

if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

from experiments.core import cli, flags_from, runtime
from experiments.core.definers import definers
from experiments.generating import packed_weights
from research.diffusion.sampling.config import SamplerConfig
from research.errors import UserError

FLAGS = cli.new_flags()
define = definers(FLAGS)

_MODEL = define.text("model", cli.MODEL)
_PROMPT = define.texts(
  "prompt", "The text to continue; may be given several times."
)
_PROMPT_FILE = define.texts(
  "prompt_file",
  "A UTF-8 file with a prompt, or - for stdin; may be given several times.",
)
_CHAT = define.switch(
  "chat",
  "Apply the model's chat template to the prompt, as a user's message; without "
  "a prompt, start a conversation in the terminal.",
)
_SYSTEM = define.text("system", "With --chat: the system message.")
_ADAPTER = define.texts(
  "adapter",
  "An adapter to apply, as NAME=DIR (PEFT's format, or a run that trained one) "
  "or NAME=FILE.gguf (llama.cpp's); may be given several times, one for each "
  "prompt.",
)
_IMAGE = define.texts(
  "image",
  "An image file on this machine, for a vision language model; may be given "
  "several times. They fill <image> in the prompt in order, or come first.",
)
_SAMPLER = define.choice(
  "sampler",
  "How to generate: token by token, or by unmasking (diffusion models).",
  default="autoregressive",
  enum_values=["autoregressive", "diffusion"],
)
_MAX_NEW_TOKENS = define.integer(
  "max_new_tokens", "Maximum number of new tokens.", default=128
)
_TEMPERATURE = define.number(
  "temperature",
  "Sampling temperature; 0 is greedy decoding. By default 0, or 1 if --top_k, "
  "--top_p or --min_p is given.",
)
_TOP_K = define.integer("top_k", "Sample from the k most likely tokens.")
_TOP_P = define.number(
  "top_p",
  "Sample from the most likely tokens that have this total probability.",
)
_MIN_P = define.number(
  "min_p", "Sample from tokens at least this likely relative to the likeliest."
)
_PENALTY = define.number(
  "repetition_penalty", "Above 1 makes tokens that have occurred less likely."
)
_SEED = define.integer("seed", "Seed of the sampling.", default=0)
_STOP = define.texts(
  "stop", "Stop before this text; may be given several times."
)
_DTYPE = packed_weights.define_dtype(FLAGS)
packed_weights.define(FLAGS)
_KV = define.text(
  "kv",
  "Quantize the KV cache, e.g. k4v4, k8v4,residual=64 or int8.",
  default="",
)
_PAGES = define.text(
  "pages",
  "Paged KV cache, with pages of this many tokens, e.g. 16, or "
  "16,count=200,rows=4,dtype=int8: 200 pages in all, 4 prompts at a time.",
  default="",
)
_INFILL = define.texts(
  "infill",
  "For diffusion: a text with gaps to fill, [[N]] for a gap of N tokens, e.g. "
  '--infill="def f(x): [[8]] return y". It follows the --prompt, if there is '
  "one (with --chat, as the beginning of the answer). Write \\[[ for literal "
  "brackets. May be given several times.",
)
_GIF = define.text("gif", "For diffusion: an animated GIF to write.")
_HTML = define.text("html", "For diffusion: an HTML page to write.")

_SHARED = ("max_new_tokens",)
_OF_DIFFUSION = (
  *("infill", "gif", "html"),
  *(x for x in flags_from.names(SamplerConfig).values() if x not in _SHARED),
)
flags_from.define(SamplerConfig, FLAGS, before="For diffusion: ")
_NOT_OF_DIFFUSION = (
  *("adapter", "image", "kv", "pages", "stop", "repetition_penalty"),
)


def _load() -> Any:
  towers = "language" if _SAMPLER.value == "diffusion" else "all"
  return packed_weights.load_with_tokenizer(
    _MODEL.value, _DTYPE.value, FLAGS["packed"].value, towers
  )


def _tokens(loaded: Any, text: str) -> list[int]:
  """Returns a prompt's ids, rendered as a conversation if asked to."""
  from experiments.generating import conversation, images, prompts

  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise UserError("--prompt: is not UTF-8; convert it first") from error
  if _CHAT.value:
    messages = prompts.messages(text, _SYSTEM.value)
    text = conversation.text_of(loaded.tokenizer, messages)
  return images.text_ids(loaded, text, rendered=_CHAT.value)


def _row(pieces: Sequence[Any], prompt: Sequence[int]) -> dict[str, Any]:
  return {
    "text": "".join(p.text for p in pieces),
    "tokens": sum(p.tokens for p in pieces),
    "finish_reason": next(p.reason for p in pieces if p.reason),
    "prompt_tokens": len(prompt),
  }


def _fill(
  prompts: list[str], rules: Any, config: SamplerConfig
) -> dict[str, Any]:
  from experiments.generating import diffusion, infilling
  from research.generation import generate

  infills = _INFILL.value
  drawn = rules.temperature is not None or config.draws_places
  if FLAGS["seed"].present and not drawn:
    raise UserError(
      "--seed: has no effect at --temperature=0, unless --select=random or"
      " --place_temperature draws positions; leave it out"
    )
  pictures = diffusion.Pictures(html=_HTML.value, gif=_GIF.value)
  diffusion.check(config, infills, len(infills or prompts), pictures)
  loaded = _load()
  spec = diffusion.spec_of(loaded, _MODEL.value)
  params = generate.prepare(loaded.params, loaded.model)
  loaded = dataclasses.replace(loaded, params=params)

  def spelled(text):
    return _tokens(loaded, text)

  if infills:
    prompts, texts = infilling.rows(
      infills, prompts, loaded.tokenizer, spelled, spec.mask_id
    )
    ids = [text.ids for text in texts]
  else:
    ids, texts = [spelled(text) for text in prompts], None
  given = ids, rules, config, _SEED.value, texts, pictures
  with flags_from.errors_name_flags(SamplerConfig):
    rows, shared = diffusion.fill(loaded, spec, *given)
  shared["model"] = _MODEL.value
  shared |= packed_weights.report(loaded.params)
  if len(rows) == 1:
    return rows[0] | shared
  rows = [
    {"prompt": prompt} | row for prompt, row in zip(prompts, rows, strict=True)
  ]
  _print_answers(rows)
  return shared | {"rows": rows}


def _print_answers(rows: Sequence[dict[str, Any]]) -> None:
  from experiments.generating import prompts

  for number, row in enumerate(rows, 1):
    cli.say(prompts.answer(number, row))


def _check_flags(prompts: Sequence[str]) -> None:
  """Raises UserError for flags that do not go together."""
  diffusion = _SAMPLER.value == "diffusion"
  for name in _NOT_OF_DIFFUSION if diffusion else _OF_DIFFUSION:
    if FLAGS[name].present:
      raise UserError(
        f"--{name}: is not for --sampler={_SAMPLER.value}; leave one of them "
        "out"
      )
  if _INFILL.value and FLAGS["max_new_tokens"].present:
    raise UserError(
      "--max_new_tokens: has no effect with --infill, whose gaps [[N]] have N "
      "tokens; leave it out"
    )
  if _SYSTEM.value is not None and not _CHAT.value:
    raise UserError("--system: is for --chat, which is missing")
  if diffusion and _CHAT.value and not prompts:
    raise UserError(
      "--chat: answers a --prompt, which is missing; conversations are for "
      "--sampler=autoregressive"
    )
  if not diffusion and _MAX_NEW_TOKENS.value < 1:
    raise UserError(
      f"--max_new_tokens: found {_MAX_NEW_TOKENS.value}, expected at least 1"
    )
  if "" in _STOP.value:
    raise UserError("--stop: found an empty string, expected some text")


def _streamed(
  loaded: Any,
  params: Any,
  prompts: Any,
  rules: Any,
  kv: Any,
  layout: Any,
  turn: int = 0,
  mask: Any = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """Returns each row's result and the totals; prints one row as it comes.

  Tokens a second are those after what comes first. Each turn of a conversation
  draws other samples.
  """
  import jax

  from experiments.generating import images
  from research import progress, weights
  from research.generation import generate_paged, paging, stream

  key = jax.random.key(_SEED.value)
  start, first, steps = time.perf_counter(), None, []
  most = _MAX_NEW_TOKENS.value
  pages = source = None
  if layout is not None:
    extra = weights.extra_ids(params)
    pages = paging.allocator(loaded.model, prompts, most, layout, extra)
    source = functools.partial(
      generate_paged.chunks, layout=layout, pages=pages
    )
  with progress.phase("reading prompts") as now:
    for pieces in stream.stream(
      loaded.model,
      params,
      loaded.tokenizer,
      prompts,
      most,
      rules,
      jax.random.fold_in(key, turn) if turn else key,
      stop=_STOP.value,
      **images.source_of(mask, kv, source),
    ):
      first = first or time.perf_counter()
      steps.append(pieces)
      if len(prompts) == 1:
        print(pieces[0].text, end="", flush=True)
        now.what = None
      else:
        now.what, now.total = "generating tokens of each row", most
        now.done += max(piece.tokens for piece in pieces)
  end = time.perf_counter()
  results = [
    _row(pieces, prompt)
    for pieces, prompt in zip(zip(*steps, strict=True), prompts, strict=True)
  ]
  # A token of each row comes first; with pages, those of its first chunk, too.
  after, more = end - first, sum(x.tokens for row in steps[1:] for x in row)
  shared = {
    "tokens": sum(row["tokens"] for row in results),
    "tokens_per_s": more / after if more and after else None,
    "seconds": end - start,
    "model": _MODEL.value,
    "kv": _KV.value or None,
    **packed_weights.report(loaded.params),
  }
  if layout is not None:
    used = prompts, most, pages, layout.dtype
    shared["pages"] = paging.memory(loaded.model, params, *used)
  return results, shared


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Generates; returns the result, which the command prints as JSON."""
  del argv
  from experiments.generating import conversation
  from experiments.generating import prompts as asked

  cli.required(model=_MODEL.value)
  texts = asked.read(_PROMPT.value, _PROMPT_FILE.value)
  talks = _CHAT.value and conversation.in_terminal()
  if not talks or texts or _INFILL.value:
    cli.required(prompt="".join([*texts, *_INFILL.value]))
  _check_flags(texts)
  cli.model(_MODEL.value)
  cli.existing("image", _IMAGE.value)
  places = (text.partition("=")[2] for text in _ADAPTER.value)
  cli.existing("adapter", filter(None, places))
  fills = _SAMPLER.value == "diffusion"
  config = flags_from.build(SamplerConfig, FLAGS) if fills else None
  runtime.setup()
  from experiments.generating import sampling_rules

  rules = sampling_rules.of_flags(
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    min_p=_MIN_P.value,
    seeded=not fills and FLAGS["seed"].present > 0,
    repetition_penalty=_PENALTY.value,
  )
  if config is not None:
    return _fill(texts, rules, config)
  return _continue(texts, rules)


def _with_images(loaded: Any, text: str) -> tuple[Any, Any, dict[str, int]]:
  """Returns the language model, the prompt, and what the JSON says of it."""
  from experiments.generating import conversation, images
  from experiments.generating import prompts as asked

  def render(text):
    said = asked.messages(text, _SYSTEM.value)
    return conversation.text_of(loaded.tokenizer, said)

  chat = render if _CHAT.value else None
  made = images.prompt_of(loaded, _IMAGE.value, text, chat)
  found = {"image_tokens": made.image_tokens}
  return images.language_of(loaded, made.params), [made.ids], found


def _continue(texts: list[str], rules: Any) -> dict[str, Any]:
  """Returns what generating token by token gives; no texts: a conversation."""
  from research import tree
  from research.generation import paging
  from research.quant.kv import kv_quantizer

  kv = kv_quantizer.parse(_KV.value)
  if _PAGES.value:
    paging.parse(_PAGES.value)
  from experiments.generating import generate_adapters, generate_pages

  names, places = generate_adapters.named(_ADAPTER.value)
  layout = generate_pages.parse_flags(_PAGES.value, _KV.value, names)
  rows = generate_adapters.rows(texts or [""], names)
  if not texts and len(rows) > 1:
    raise UserError(
      f"--adapter: found {len(rows)}, expected at most one for a conversation"
    )
  if _IMAGE.value and len(rows) > len(texts) > 0:
    raise UserError(
      f"--adapter: found {len(rows)}, expected at most one with --image"
    )
  loaded = _load()
  from experiments.generating import conversation, diffusion, images

  diffusion.check_next_token(loaded, f"--model={_MODEL.value}")
  images.check(loaded.model, _IMAGE.value, texts)
  # Without parameters: those that are used are others.
  whole = dataclasses.replace(loaded, params={})
  mask = images.mask_of(loaded.model)
  adapters = [name for _, name in rows]
  loaded = generate_adapters.on_all_rows(loaded, adapters, places)
  if _IMAGE.value:
    loaded, prompts, seen = _with_images(loaded, texts[0])
  else:
    loaded, seen = images.language_of(loaded), {}
    prompts = [_tokens(whole, text) for text, _ in rows if texts]
    for (text, _), ids in zip(rows, prompts, strict=False):
      images.check_text(whole.model, text, ids)
  params = generate_adapters.prepared(loaded, adapters, places)
  if isinstance(kv, kv_quantizer.KVByLayer):
    kv.check_depth(len(loaded.model.layer_kinds()))
  # A step would copy the pages of layers that are stacked.
  if layout is not None or isinstance(kv, kv_quantizer.KVByLayer):
    params = tree.unroll(params)
  adapter = _ADAPTER.value[0] if _ADAPTER.value else None
  call = loaded, params

  def answer(messages, turn):
    text = conversation.text_of(loaded.tokenizer, messages)
    ids = images.text_ids(whole, text, rendered=True)
    images.check_text(whole.model, messages[-1]["content"], ids)
    results, _ = _streamed(*call, [ids], rules, kv, layout, turn, mask)
    print(flush=True)
    return results[0]

  if not texts:
    result = conversation.converse(answer, _SYSTEM.value)
    return result | {"model": _MODEL.value, "adapter": adapter}
  results, shared = _streamed(*call, prompts, rules, kv, layout, mask=mask)
  if len(rows) == 1:
    print()
    return results[0] | shared | {"adapter": adapter} | seen
  answers = [
    {"prompt": prompt, "adapter": name} | row
    for (prompt, name), row in zip(rows, results, strict=True)
  ]
  _print_answers(answers)
  return shared | {"rows": answers}


if __name__ == "__main__":
  cli.run(main)
