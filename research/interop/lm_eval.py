"""What lm-evaluation-harness asks of a model, as functions of ours.

`loglikelihood`, `rolling` and `generate_until` need nothing but this library.
`adapter` puts them behind the harness's own interface, and is the only place
that imports it (extra `evaluation`; no torch is needed):

  lm_eval.simple_evaluate(model=adapter(load_model(NAME)), tasks=[...])

Tokenisation follows the harness: context and continuation are tokenised as
one text and parted where the context alone ends; spaces at the end of a
context belong to the continuation.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kernels_pallas.masks import Mask
from research import weights
from research.interop.load import Loaded
from research.nn import generate
from research.nn.sampling import GREEDY, Sampling
from research.nn.transformer import Transformer
from research.training import losses, positions
from research.typing import Array, Bool, Float, Int, Params, UserError

CONTEXT = 2048
"""Tokens that a model without a limit of its own reads."""

NEW_TOKENS = 256

Ids = Sequence[int]


def loglikelihood(
  loaded: Loaded, pairs: Sequence[tuple[str, str]], batch: int = 8
) -> list[tuple[float, bool]]:
  """Returns (log p(continuation | context), is it the greedy one?) of each."""
  return score(
    loaded.model,
    loaded.params,
    [_encoded(loaded.tokenizer, *pair) for pair in pairs],
    batch,
  )


def rolling(
  loaded: Loaded, texts: Sequence[str], batch: int = 8
) -> list[float]:
  """Returns log p(text) of whole texts, each token predicted once.

  Texts longer than the context are cut into windows; a window's first token
  follows the last one of the window before, the text's first one follows the
  tokenizer's first (or last) token.
  """
  size = _context(loaded.model)
  requests, owners = [], []
  for i, text in enumerate(texts):
    ids = loaded.tokenizer.encode(text)
    before = [_prefix(loaded.tokenizer)]
    for start in range(0, len(ids), size):
      part = ids[start : start + size]
      # The last window is filled up with context, as the harness does.
      spare = size - len(part) if start else 0
      requests.append(((before + ids[:start])[-1 - spare :], part))
      owners.append(i)
  found = score(loaded.model, loaded.params, requests, batch)
  out = [0.0] * len(texts)
  for owner, (value, _) in zip(owners, found, strict=True):
    out[owner] += value
  return out


def generate_until(
  loaded: Loaded,
  requests: Sequence[tuple[str, Mapping[str, Any]]],
  batch: int = 8,
  seed: int = 0,
) -> list[str]:
  """Returns continuations, cut before the first of some strings.

  Args:
    loaded: the model.
    requests: (context, options): `until` (strings), `max_gen_toks`,
      `do_sample`, `temperature`, `top_p`, `top_k`; other options are errors.
    batch: contexts continued at a time.
    seed: of the sampling; a sample depends on it and on the request's place.
  """
  wanted = [_options(options) for _, options in requests]
  groups: dict[Any, list[int]] = {}
  for i, options in enumerate(wanted):
    groups.setdefault(options, []).append(i)
  out = [""] * len(requests)
  params = generate.prepare(loaded.params, loaded.model)
  for options, members in groups.items():
    members = sorted(members, key=lambda i: len(requests[i][0]))
    for start in range(0, len(members), batch):
      part = members[start : start + batch]
      contexts = [requests[i][0] for i in part]
      texts = _continued(loaded, params, contexts, options, part, seed)
      for i, text in zip(part, texts, strict=True):
        out[i] = text
  return out


def score(
  model: Transformer,
  params: Params,
  requests: Sequence[tuple[Ids, Ids]],
  batch: int = 8,
) -> list[tuple[float, bool]]:
  """Returns (log-likelihood, greedy?) of token continuations.

  Args:
    model: the Transformer.
    params: its parameters.
    requests: (context, continuation), both not empty; where they are longer
      than the model's context, their beginning is left out.
    batch: requests scored at a time.
  """
  size = _context(model)
  rows = [([*a, *b][-size - 1 :], len(b)) for a, b in requests]
  order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
  out: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
  for start in range(0, len(order), batch):
    part = order[start : start + batch]
    length = generate.bucket(len(rows[part[0]][0]) - 1)
    tokens, targets = np.zeros((2, batch, length), np.int32)
    segments = np.full((batch, length), -1, np.int32)
    asked = np.zeros((batch, length), bool)
    for row, i in enumerate(part):
      ids, count = rows[i]
      n = len(ids) - 1
      tokens[row, :n], targets[row, :n], segments[row, :n] = (
        ids[:-1],
        ids[1:],
        0,
      )
      asked[row, max(n - count, 0) : n] = True
    sums, greedy = _scored(
      model, params, *map(jax.numpy.asarray, (tokens, targets, segments, asked))
    )
    for row, i in enumerate(part):
      out[i] = float(sums[row]), bool(greedy[row])
  return out


@functools.partial(jax.jit, static_argnames="model")
def _scored(
  model: Transformer,
  params: Params,
  tokens: Int[Array, "B T"],
  targets: Int[Array, "B T"],
  segments: Int[Array, "B T"],
  asked: Bool[Array, "B T"],
) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
  params = weights.with_tokens(params, tokens, segments)
  hidden, _ = model.apply(
    {"params": params}, tokens, None, Mask.causal(segments=segments)
  )

  def one(head, hidden, targets):
    logits = positions.logits_of(model, head, hidden)
    return losses.token_losses(logits, targets)

  loss, best = positions.map_positions(
    one, positions.head_of(params), hidden, targets
  )
  sums = jax.numpy.where(asked, -loss, 0).sum(-1)
  return sums, ((best > 0) | ~asked).all(-1)


def _encoded(tokenizer: Any, context: str, continuation: str):
  if not context:
    ids = tokenizer.encode(continuation)
    prefix = _prefix(tokenizer)
    if ids[:1] == [prefix]:
      return ids[:1], ids[1:]
    return [prefix], ids
  bare = context.rstrip()
  whole = tokenizer.encode(context + continuation, add_special=True)
  before = tokenizer.encode(bare, add_special=True)
  if not before:
    before, whole = [_prefix(tokenizer)], [_prefix(tokenizer), *whole]
  return before, whole[len(before) :]


def _prefix(tokenizer: Any) -> int:
  for token in (tokenizer.bos, tokenizer.eos):
    if token is not None:
      return token
  raise UserError(
    "this tokenizer has neither a first nor a last token, which a text without"
    " a context would follow."
  )


def _context(model: Transformer) -> int:
  return model.max_positions or CONTEXT


@dataclasses.dataclass(frozen=True)
class _Options:
  until: tuple[str, ...]
  count: int
  sampling: tuple[tuple[str, Any], ...]


def _options(options: Mapping[str, Any]) -> _Options:
  known = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
  unknown = sorted(set(options) - known - {"top_k"})
  if unknown:
    raise UserError(
      f"generation: found the option {unknown[0]!r}, expected"
      f" {', '.join(sorted(known))} or top_k."
    )
  until = options.get("until") or ()
  until = (until,) if isinstance(until, str) else tuple(until)
  temperature = options.get("temperature")
  drawn = options.get("do_sample", bool(temperature)) and temperature != 0
  sampling = {}
  if drawn:
    sampling = {"temperature": 1.0 if temperature is None else temperature}
    sampling |= {k: options[k] for k in ("top_p", "top_k") if options.get(k)}
  return _Options(
    tuple(s for s in until if s),
    int(options.get("max_gen_toks", NEW_TOKENS)),
    tuple(sorted(sampling.items())),
  )


def _continued(loaded, params, contexts, options, numbers, seed) -> list[str]:
  tokenizer = loaded.tokenizer
  room = max(1, _context(loaded.model) - options.count)
  prompts = [
    tokenizer.encode(text, add_special=True)[-room:] or [_prefix(tokenizer)]
    for text in contexts
  ]
  made: list[list[int]] = [[] for _ in prompts]
  texts = [""] * len(prompts)
  for part in generate.chunks(
    loaded.model,
    params,
    prompts,
    options.count,
    Sampling(**dict(options.sampling)) if options.sampling else GREEDY,
    jax.random.key(seed),
    tokenizer.stop,
    numbers,
  ):
    for row, new in enumerate(part.tolist()):
      made[row] += [i for i in new if i != generate.NONE]
    texts = [tokenizer.decode(row) for row in made]
    if options.until and all(
      any(s in text for s in options.until) for text in texts
    ):
      break
  return [_before(text, options.until) for text in texts]


def _before(text: str, stops: Sequence[str]) -> str:
  found = [i for s in stops if (i := text.find(s)) >= 0]
  return text[: min(found)] if found else text


def adapter(loaded: Loaded, batch: int = 8) -> Any:
  """Returns the model as an `lm_eval.api.model.LM`.

  Raises:
    UserError: the harness is not installed, or there is no tokenizer.
  """
  if loaded.tokenizer is None:
    raise UserError(f"{loaded.source}: has no tokenizer, and tasks are text.")
  try:
    from lm_eval.api.model import LM
  except ImportError as error:
    raise UserError(
      f"lm-evaluation-harness is not installed ({error}).\n"
      "Install the extra: pip install 'heptad[evaluation]'."
    ) from error

  class Heptad(LM):
    """The harness's interface; each method is one of the functions above."""

    tokenizer_name = "heptad"

    def loglikelihood(self, requests, disable_tqdm=False):
      return loglikelihood(loaded, [r.args for r in requests], batch)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
      return rolling(loaded, [r.args[0] for r in requests], batch)

    def generate_until(self, requests, disable_tqdm=False):
      return generate_until(loaded, [r.args for r in requests], batch)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
      return loaded.tokenizer.chat(chat_history, add_generation_prompt)

  return Heptad()
