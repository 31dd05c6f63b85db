"""What lm-evaluation-harness asks of a model that predicts the next token."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kernels_pallas.masks import Mask
from research import weights
from research.generation import generate
from research.interop.lm_eval import harness_requests
from research.interop.lm_eval.harness_requests import Ids, context_of
from research.interop.loaded import Loaded
from research.nn.transformer import Transformer
from research.text import special_tokens
from research.text.special_tokens import (
  NO_SPECIAL_TOKENS,
  SpecialTokens,
  begins_with,
)
from research.training import positions
from research.training.objectives import losses
from research.typing import Array, Bool, Float, Int, Params, UserError


def loglikelihood(
  loaded: Loaded, pairs: Sequence[tuple[str, str]], batch: int = 8
) -> list[tuple[float, bool]]:
  """Returns (log p(continuation | context), is it the greedy one?) of each.

  Raises:
    UserError: the model fills in masks.
  """
  _check(loaded)
  return score(
    loaded.model,
    loaded.params,
    [harness_requests.encoded(loaded.tokenizer, *pair) for pair in pairs],
    batch,
    special_tokens.from_tokenizer(loaded.tokenizer),
  )


def rolling(
  loaded: Loaded, texts: Sequence[str], batch: int = 8
) -> list[float]:
  """Returns log p(text) of whole texts, each token predicted once.

  Texts longer than the context are cut into windows; a window's first token
  follows the last one of the window before, the text's first one follows the
  tokenizer's first (or last) token.
  """
  _check(loaded)
  requests, owners = [], []
  for i, text in enumerate(texts):
    parts = harness_requests.windows(
      loaded.tokenizer, context_of(loaded.model), text
    )
    requests += parts
    owners += [i] * len(parts)
  special = special_tokens.from_tokenizer(loaded.tokenizer)
  found = score(loaded.model, loaded.params, requests, batch, special)
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
    requests: (context, options): `until` (strings), `max_gen_toks`,
      `do_sample`, `temperature`, `top_p`, `top_k`; other options are errors.
    seed: of the sampling; a sample depends on it and on the request's place.
  """
  _check(loaded)
  out = [""] * len(requests)
  params = generate.prepare(loaded.params, loaded.model)
  for options, members in harness_requests.grouped(requests).items():
    for start in range(0, len(members), batch):
      part = members[start : start + batch]
      contexts = [requests[i][0] for i in part]
      texts = _continued(loaded, params, contexts, options, part, seed)
      for i, text in zip(part, texts, strict=True):
        out[i] = text
  return out


def _check(loaded: Loaded) -> None:
  if loaded.diffusion is not None:
    raise UserError(
      f"{loaded.source.get('path', 'the model')}: a masked diffusion model; "
      "expected one that predicts the next token.\n"
      "Use research.interop.lm_eval.lm_eval_diffusion, or `adapter`, which "
      "takes either kind."
    )


def score(
  model: Transformer,
  params: Params,
  requests: Sequence[tuple[Ids, Ids]],
  batch: int = 8,
  special: SpecialTokens = NO_SPECIAL_TOKENS,
) -> list[tuple[float, bool]]:
  """Returns (log-likelihood, greedy?) of token continuations.

  Args:
    requests: (context, continuation), both not empty; where they are longer
      than the model's context, their beginning is left out.
    special: with what every row of the model begins; it is not left out.
  """
  size, head = context_of(model), special.row_begin
  rows = [(special.truncate([*a, *b], size + 1), len(b)) for a, b in requests]
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
      given = len(head) if begins_with(ids, head) else 0
      asked[row, max(n - count, given - 1, 0) : n] = True
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
  # Padding is no part of a text, by whose length `rope.Dynamic` rotates it.
  hidden, _ = model.apply(
    {"params": params},
    tokens,
    None,
    Mask.causal(segments=segments),
    lengths=(segments >= 0).sum(-1),
  )

  def one(head, hidden, targets):
    logits = positions.fp32_logits(model, head, hidden)
    return losses.token_losses(logits, targets)

  loss, best = positions.map_positions(
    one, positions.head_of(params), hidden, targets
  )
  sums = jax.numpy.where(asked, -loss, 0).sum(-1)
  return sums, ((best > 0) | ~asked).all(-1)


def _continued(loaded, params, contexts, options, numbers, seed) -> list[str]:
  tokenizer = loaded.tokenizer
  room = max(1, context_of(loaded.model) - options.count)
  prompts = [
    tokenizer.special.truncate(tokenizer.prompt(text), room)
    or [harness_requests.prefix(tokenizer)]
    for text in contexts
  ]
  made: list[list[int]] = [[] for _ in prompts]
  texts = [""] * len(prompts)
  for part in generate.chunks(
    loaded.model,
    params,
    prompts,
    options.count,
    options.rule,
    jax.random.key(seed),
    harness_requests.stop_tokens(tokenizer, options.until),
    numbers,
  ):
    for row, new in enumerate(part.tolist()):
      made[row] += [i for i in new if i != generate.NO_TOKEN]
    texts = [tokenizer.decode(row) for row in made]
    if options.until and all(
      any(s in text for s in options.until) for text in texts
    ):
      break
  return [harness_requests.before(text, options.until) for text in texts]
