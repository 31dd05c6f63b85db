"""Texts with gaps, which `generate --infill` takes: `def f(x): [[8]] return y`.

`[[N]]` is a gap of N tokens; of more brackets in a row the last two are meant,
`x = [[[8]]]`. A backslash before them says that they are all text:
`\\[[1, 2]]`. Two backslashes there are one, and so on.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from research.diffusion.sampling import layout
from research.text import special_tokens
from research.text.special_tokens import NO_SPECIAL_TOKENS
from research.typing import Bool, Int, UserError

_BRACKETS = re.compile(r"(\\*)(\[*)\[\[")
_REST = re.compile(r"(.*?)(\]\]|$)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Text:
  """A text with gaps, as tokens.

  Attributes:
    ids: a prompt's, then the text's, masks in its gaps.
    prompt: how many are the prompt's.
    gaps: where each begins and ends; two may meet.
  """

  ids: list[int]
  prompt: int
  gaps: list[tuple[int, int]]

  def kept(
    self, tokens: Int[np.ndarray, "T"], end: Sequence[int]
  ) -> Bool[np.ndarray, "T"]:
    """Returns which filled tokens are text: in a gap, those before an end."""
    out = np.ones(len(self.ids), bool)
    for start, stop in self.gaps:
      ended = np.isin(tokens[start:stop], end)
      out[start:stop] = ~np.logical_or.accumulate(ended)
    return out


def parsed(text: str) -> list[str | int]:
  """Returns a text's parts: what is given, and gaps' numbers of tokens.

  Raises:
    UserError: a marker is not one, or there is none.
  """
  parts: list[str | int] = [""]
  at = 0
  while found := _BRACKETS.search(text, at):
    slashes, more = found.groups()
    parts[-1] += text[at : found.start()] + "\\" * (len(slashes) // 2) + more
    at = found.end()
    if len(slashes) % 2:
      parts[-1] += "[["
      continue
    rest = _REST.match(text, at)
    at = rest.end()
    parts += [_size(*rest.groups()), ""]
  parts[-1] += text[at:]
  if len(parts) == 1:
    raise UserError(
      f"--infill={_short(text)}: found no gap, expected [[N]] in place of N "
      'tokens, e.g. --infill="def f(x): [[8]] return y"'
    )
  return parts


def _size(inside: str, closed: str) -> int:
  inside = inside.strip()
  fits = inside.isdecimal() and inside.isascii() and len(inside) < 7
  if closed and fits and int(inside) > 0:
    return int(inside)
  raise UserError(
    f"--infill: found [[{_short(inside + closed)}, expected [[N]] with N, the "
    "gap's tokens, from 1 on; brackets that are text are written \\[["
  )


def _short(text: str) -> str:
  return text if len(text) <= 40 else text[:37] + "..."


def rows(
  infills: Sequence[str],
  prompts: Sequence[str],
  tokenizer: Any,
  spelled: Callable[[str], list[int]],
  mask_id: int,
) -> tuple[list[str], list[Text]]:
  """Returns each row's prompt, and its text behind it.

  Args:
    prompts: what they follow: one for each, one for all, or none.

  Raises:
    UserError: there are other numbers of prompts, or as of `tokens`.
  """
  many = len(infills)
  if len(prompts) not in (0, 1, many):
    raise UserError(
      f"--prompt: found {len(prompts)} for {many} of --infill, expected one "
      "for each, one for all, or none"
    )
  before = [spelled(prompt) for prompt in prompts] or [None]
  before = before if len(before) == many else before * many
  texts = [
    tokens(tokenizer, text, mask_id, prompt)
    for text, prompt in zip(infills, before, strict=True)
  ]
  names = list(prompts) or [""]
  return names if len(names) == many else names * many, texts


def tokens(
  tokenizer: Any, text: str, mask_id: int, prompt: Sequence[int] | None
) -> Text:
  """Returns a text; each of its parts is split into tokens by itself.

  Args:
    mask_id: of the mask; the tokenizer need not know it.
    prompt: what the text follows; None where it is a document.

  Raises:
    UserError: as of `parsed`, or text or prompt hold the mask's own token.
  """
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise UserError("--infill: is not UTF-8; convert it first") from error
  if prompt is not None:
    layout.check_prompts([list(prompt)], mask_id)
  around = NO_SPECIAL_TOKENS
  if prompt is None:
    around = special_tokens.from_tokenizer(tokenizer)
  opening, closing = list(around.begin), list(around.end)
  ids, gaps = [*(prompt or ()), *opening], []
  for i, part in enumerate(parsed(text)):
    if isinstance(part, int):
      gaps.append((len(ids), len(ids) + part))
      ids += [mask_id] * part
      continue
    found = _part(tokenizer, part, i == 0 and prompt is None)
    if mask_id in found:
      raise UserError(
        f"--infill={_short(text)}: holds the mask's own token, id {mask_id}; "
        "write [[N]] in place of N of them"
      )
    if i == 0 and opening and found[: len(opening)] == opening:
      found = found[len(opening) :]  # written out in the text itself
    ids += found
  return Text([*ids, *closing], len(prompt or ()), gaps)


def _part(tokenizer: Any, text: str, first: bool) -> list[int]:
  """Returns a text's ids; only a document's first begin as one.

  Some tokenizers put a space before whatever they are given.
  """
  alone = tokenizer.encode(text) if text else []
  if first or not text:
    return alone
  line = tokenizer.encode("\n")
  behind = tokenizer.encode("\n" + text)
  cut = len(line)
  return behind[cut:] if behind[:cut] == line else alone
