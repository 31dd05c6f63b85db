"""Prompts of `experiments.generate`, and how answers to several are shown."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.core import cli
from research.errors import UserError

_SHOWN = 60
"""Characters of a prompt above its answer."""


def read(texts: Sequence[str], files: Sequence[str]) -> list[str]:
  """Returns the prompts, those of files last.

  Args:
    texts: of --prompt.
    files: of --prompt_file, a prompt each; - is standard input. The line break
      that ends a file is no part of its prompt.

  Raises:
    UserError: a file cannot be read, or standard input is named twice.
  """
  if list(files).count("-") > 1:
    raise UserError(
      "--prompt_file=-: found twice, standard input is one prompt"
    )
  read = [cli.read_text(file, "prompt_file") for file in files]
  return [*texts, *(text.removesuffix("\n") for text in read)]


def messages(text: str, system: str | None) -> list[dict[str, str]]:
  """Returns a conversation that begins with a user's message."""
  first = [] if system is None else [{"role": "system", "content": system}]
  return [*first, {"role": "user", "content": text}]


def answer(number: int, row: Mapping[str, Any]) -> str:
  """Returns an answer under a line that says to which prompt.

  Args:
    row: its prompt ("" for a text without one), its text and, where there is
      one, its adapter.
  """
  begin = textwrap.shorten(row["prompt"], _SHOWN, placeholder=" ...")
  adapter = "" if row.get("adapter") is None else f" [{row['adapter']}]"
  head = f"prompt {number}{adapter}: {begin}" if begin else f"text {number}"
  return f"--- {head}\n{row['text']}\n"
