"""What `experiments.generate --pages=` asks for, and what it took."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from research.generation import generate_paged, paging
from research.generation.generate import TokenSource
from research.generation.page_allocator import PageAllocator
from research.generation.paging import Paging
from research.typing import Params, UserError


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


@dataclasses.dataclass(frozen=True)
class Paged:
  """A call of generation, over pages or not.

  Attributes:
    layout: how pages are laid out, or None.
    pages: who gives them out, or None.
  """

  model: Any
  prompts: Sequence[Sequence[int]]
  max_new_tokens: int
  layout: Paging | None
  pages: PageAllocator | None = None

  @property
  def source(self) -> TokenSource | None:
    """Where tokens come from, as for `stream.stream`."""
    if self.layout is None:
      return None
    return functools.partial(
      generate_paged.chunks, layout=self.layout, pages=self.pages
    )

  def report(self, params: Params) -> dict[str, Any]:
    if self.layout is None:
      return {}
    call = self.prompts, self.max_new_tokens, self.pages, self.layout.dtype
    return {"pages": paging.memory(self.model, params, *call)}


def open_call(
  layout: Paging | None,
  model: Any,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  extra: Sequence[int] = (),
) -> Paged:
  """Returns a call with its pages, all of them free.

  Raises:
    UserError: there are too few pages for a prompt.
  """
  call = model, prompts, max_new_tokens
  if layout is None:
    return Paged(*call, None)
  return Paged(*call, layout, paging.allocator(*call, layout, extra))
