"""What `experiments.generate --pages=` asks for."""

from collections.abc import Sequence

from research.generation import paging
from research.generation.paging import Paging
from research.typing import UserError


def parse_flags(text: str, kv: str, adapters: Sequence[str]) -> Paging | None:
  """Returns how pages are laid out, or None without any.

  Raises:
    UserError: it is nothing that pages can be, or beside it stands what pages
      do not go with.
  """
  if not text:
    return None
  if kv:
    raise UserError(
      f"--kv={kv}: is not for --pages, whose dtype is the model's, or int8 or "
      "fp8 with a scale per token: --pages=16,dtype=int8"
    )
  if len(set(adapters)) > 1:
    raise UserError(
      f"--pages={text}: found {len(set(adapters))} adapters, expected one for "
      "all prompts: rows are reused by other prompts as texts end"
    )
  return paging.parse(text)
