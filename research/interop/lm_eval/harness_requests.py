"""What the harness's requests say, in tokens: shared by both kinds of models.

Tokenisation follows the harness: context and continuation are tokenised as
one text and parted where the context alone ends; spaces at the end of a
context belong to the continuation.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from research.generation.sampling import GREEDY, Sampling
from research.nn.transformer import Transformer
from research.text import special_tokens
from research.typing import UserError

CONTEXT = 2048
"""Tokens that a model without a limit of its own reads."""

NEW_TOKENS = 256

_END = "END_OF_THE_LAST_MESSAGE "
"""Marks where a message ends in a rendered conversation; with a blank."""

Ids = Sequence[int]
Request = tuple[Ids, Ids]
"""A context and its continuation, neither empty."""


def encoded(tokenizer: Any, context: str, continuation: str) -> Request:
  """Returns the tokens of a context and of its continuation."""
  if not context:
    ids = tokenizer.encode(continuation)
    first = prefix(tokenizer)
    if ids[:1] == [first]:
      return ids[:1], ids[1:]
    return [first], ids
  bare = context.rstrip()
  whole = tokenizer.prompt(context + continuation)
  before = tokenizer.prompt(bare)
  if not before:
    before, whole = [prefix(tokenizer)], [prefix(tokenizer), *whole]
  return before, whole[len(before) :]


def unfinished(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
  """Renders a conversation whose last message is to be continued.

  The harness asks for it where a task begins the answer (`gen_prefix`), and has
  the text of transformers' `continue_final_message`.

  Raises:
    UserError: the template fails, or leaves out the end of the last message.
  """
  *before, last = messages
  marked = {**last, "content": last["content"] + _END}
  text = tokenizer.chat([*before, marked], add_generation_prompt=False)
  cut = text.rfind(_END.strip())
  if cut < 0:
    raise UserError(
      "chat template: leaves out the end of the last message, expected all of"
      " it, as the task's answer begins with it"
    )
  # What trims the mark's blank would have trimmed the message's.
  kept = text.startswith(_END, cut)
  return text[:cut] if kept else text[:cut].rstrip()


def prefix(tokenizer: Any) -> int:
  """Returns what a text without a context follows.

  Raises:
    UserError: the tokenizer has nothing like it.
  """
  for token in (tokenizer.bos, tokenizer.eos):
    if token is not None:
      return token
  raise UserError(
    "this tokenizer has neither a first nor a last token, which a text without"
    " a context would follow."
  )


def context_of(model: Transformer) -> int:
  """Returns how many tokens a model reads."""
  return model.max_positions or CONTEXT


@dataclasses.dataclass(frozen=True)
class Options:
  """What a request of text asks for.

  Attributes:
    until: strings that end it.
    count: tokens at most.
    sampling: of `Sampling`, sorted; empty for greedy.
  """

  until: tuple[str, ...]
  count: int
  sampling: tuple[tuple[str, Any], ...]

  @property
  def rule(self) -> Sampling:
    return Sampling(**dict(self.sampling)) if self.sampling else GREEDY


def options_of(options: Mapping[str, Any]) -> Options:
  """Returns what the harness's own names stand for.

  Args:
    options: `until` (strings), `max_gen_toks`, `do_sample`, `temperature`,
      `top_p`, `top_k`.

  Raises:
    UserError: there are others.
  """
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
  return Options(
    tuple(s for s in until if s),
    int(options.get("max_gen_toks", NEW_TOKENS)),
    tuple(sorted(sampling.items())),
  )


def windows(tokenizer: Any, size: int, text: str) -> list[Request]:
  """Returns a text in parts of `size` tokens, each with what is before.

  A window's first token follows the last one of the window before, the text's
  first one the tokenizer's first (or last) token. The last window is filled up
  with context, as the harness does. Unlike there, every window of a model whose
  rows begin with special tokens begins with them.
  """
  ids, special = (
    tokenizer.encode(text),
    special_tokens.from_tokenizer(tokenizer),
  )
  before = list(special.begin) or [prefix(tokenizer)]
  room, out, start = size + 1 - len(before), [], 0
  while start < len(ids):
    part = ids[start : start + room]
    seen = [*before, *ids[:start]]
    if start:
      seen = special.truncate(seen, size + 1 - len(part))
    out.append((seen, part))
    start, room = start + room, size - len(special.row_begin)
  return out


def grouped(
  requests: Sequence[tuple[str, Mapping[str, Any]]],
) -> dict[Options, list[int]]:
  """Returns which requests ask for the same, the shortest first."""
  groups: dict[Options, list[int]] = {}
  for i, (_, options) in enumerate(requests):
    groups.setdefault(options_of(options), []).append(i)
  for members in groups.values():
    members.sort(key=lambda i: len(requests[i][0]))
  return groups


def stop_tokens(tokenizer: Any, until: Sequence[str]) -> tuple[int, ...]:
  """Returns the ids that end a text: the tokenizer's, and those in `until`.

  A special token's string is never found in a text, which goes without them.
  """
  added = tokenizer.backend.get_added_tokens_decoder()
  spelled = [i for i, x in added.items() if x.special and x.content in until]
  return tuple(dict.fromkeys((*tokenizer.stop, *spelled)))


def before(text: str, stops: Sequence[str]) -> str:
  """Returns a text up to the first of some strings."""
  found = [i for s in stops if (i := text.find(s)) >= 0]
  return text[: min(found)] if found else text
