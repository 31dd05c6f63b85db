"""Texts with gaps, which `generate --infill` takes: `def f(x): [[8]] return y`.

`[[N]]` is a gap of N tokens. Whatever else begins with two brackets has a
backslash before them: `\\[[1, 2]]`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from research.typing import UserError

_MARK = re.compile(r"\\\[\[|\[\[(.*?)(\]\]|$)", re.DOTALL)


def parsed(text: str) -> list[str | int]:
  """Returns a text's parts: what is given, and gaps' numbers of tokens.

  Raises:
    UserError: a marker is not one, or there is none.
  """
  parts: list[str | int] = [""]
  at = 0
  for found in _MARK.finditer(text):
    parts[-1] += text[at : found.start()]
    at = found.end()
    if found[0].startswith("\\"):
      parts[-1] += "[["
      continue
    parts += [_size(*found.groups()), ""]
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
) -> tuple[list[str], list[list[int]], list[int]]:
  """Returns each row's prompt, its ids, and how many of them are the prompt.

  Args:
    infills: texts with gaps.
    prompts: what they follow: one for each, one for all, or none.
    tokenizer: the model's.
    spelled: what gives a prompt's ids.
    mask_id: of the mask.

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
  ids = [
    tokens(tokenizer, text, mask_id, prompt)
    for text, prompt in zip(infills, before, strict=True)
  ]
  names = list(prompts) or [""]
  names = names if len(names) == many else names * many
  return names, ids, [len(prompt or ()) for prompt in before]


def tokens(
  tokenizer: Any, text: str, mask_id: int, prompt: Sequence[int] | None
) -> list[int]:
  """Returns ids, masks in the gaps; each part is split into tokens by itself.

  Args:
    tokenizer: the model's.
    text: as of `parsed`.
    mask_id: of the mask; the tokenizer need not know it.
    prompt: what the text follows; None where it is a document.

  Raises:
    UserError: as of `parsed`, or the text holds the mask's own token.
  """
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise UserError("--infill: is no UTF-8; convert it first") from error
  parts = parsed(text)
  ids = list(prompt or ())
  for i, part in enumerate(parts):
    if isinstance(part, int):
      ids += [mask_id] * part
      continue
    first = i == 0 and prompt is None
    found = tokenizer.encode(part, add_special=first) if part or first else []
    if mask_id in found:
      raise UserError(
        f"--infill={_short(text)}: holds the mask's own token, id {mask_id}; "
        "write [[N]] in place of N of them"
      )
    ids += found
  return ids


def gaps(ids: Sequence[int], mask_id: int) -> list[tuple[int, int]]:
  """Returns where each run of masks begins and ends."""
  out: list[tuple[int, int]] = []
  for i, token in enumerate(ids):
    if token != mask_id:
      continue
    if out and out[-1][1] == i:
      out[-1] = out[-1][0], i + 1
    else:
      out.append((i, i + 1))
  return out
