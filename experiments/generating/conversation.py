"""A conversation in the terminal: `experiments.generate --chat`, no prompt."""

import sys
from collections.abc import Callable
from typing import Any

from experiments.core import cli
from experiments.generating import prompts
from research import progress
from research.errors import UserError

Messages = list[dict[str, str]]

_NEW = "/new"


def in_terminal() -> bool:
  """Whether somebody can type."""
  return sys.stdin is not None and sys.stdin.isatty()


def text_of(tokenizer: Any, messages: Messages) -> str:
  """Returns a conversation as the model's chat template renders it.

  Args:
    messages: of texts, one at least; each `MARK` is an image.
  """
  from research.vlm.images.prompts import MARK

  return tokenizer.chat(messages, image=MARK)


def converse(
  answer: Callable[[Messages, int], dict[str, Any]], system: str | None = None
) -> dict[str, Any]:
  """Reads messages from the terminal and answers each, until Ctrl-D.

  Args:
    answer: prints and returns the row of an answer to a conversation; its
      second argument is the number of answers before.
    system: the message that every conversation begins with, or None.

  Returns:
    The result: messages of the last conversation, tokens and turns of all.
  """
  print(
    f"Ctrl-D ends the conversation, {_NEW} starts another one.",
    file=sys.stderr,
  )
  found: Messages = []
  rows: list[dict[str, Any]] = []
  while True:
    try:
      with progress.phase(None):  # nobody works
        text = input("> ").strip()
    except EOFError:
      print(flush=True)  # behind the prompt; the result has its own line
      break
    if text == _NEW:
      found = []
    if text in ("", _NEW):
      continue
    asked = prompts.messages(text, None if found else system)
    try:
      row = answer([*found, *asked], len(rows))
    except UserError as error:  # the context is full, say
      cli.warn(f"{error}\n{_NEW} starts another conversation")
      continue
    rows.append(row)
    found = [*found, *asked, {"role": "assistant", "content": row["text"]}]
  tokens = sum(row["tokens"] for row in rows)
  return {"messages": found, "turns": len(rows), "tokens": tokens}
