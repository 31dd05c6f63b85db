"""How many pages a call of generation has, and what they take in memory."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from research.generation import generate
from research.generation.page_allocator import PageAllocator
from research.nn.cache import paged
from research.nn.transformer import Transformer, init_cache
from research.typing import Params, UserError


@dataclasses.dataclass(frozen=True)
class Paging:
  """How pages are laid out.

  Attributes:
    size: tokens a page; TPUs take multiples of 8 in float32, 16 in bfloat16,
      128 in 8 bits.
    count: pages; by default, and at most, as many as all rows can come to
      need.
    rows: how many are decoded at a time; by default all.
    dtype: `"int8"`, `"fp8"` or, by default, the model's.
  """

  size: int = 16
  count: int | None = None
  rows: int | None = None
  dtype: str | None = None

  def __post_init__(self):
    for name in ("size", "count", "rows"):
      found = getattr(self, name)
      if found is not None and found < 1:
        raise UserError(f"pages {name}: found {found}, expected at least 1")
    known = (None, *paged.CODES)
    if self.dtype not in known:
      raise UserError(
        f"pages dtype: found {self.dtype!r}, expected one of "
        f"{', '.join(known[1:])}, or none for the model's"
      )


def parse(text: str) -> Paging:
  """Returns what a command line says, e.g. `16,count=200,rows=4,dtype=int8`.

  Args:
    text: tokens a page, then other fields of `Paging`.

  Raises:
    UserError: it is not of that form.
  """
  size, *rest = text.split(",")
  fields: dict[str, Any] = {"size": size}
  for word in rest:
    name, _, value = word.partition("=")
    if name not in ("count", "rows", "dtype") or name in fields or not value:
      raise UserError(
        f"pages={text}: found {word!r}, expected count=, rows= or dtype=, each "
        "once"
      )
    fields[name] = value
  for name in fields.keys() - {"dtype"}:
    if not fields[name].isdecimal():
      raise UserError(
        f"pages={text}: found {fields[name]!r} as {name}, expected a number, "
        "e.g. 16,count=200"
      )
    fields[name] = int(fields[name])
  return Paging(**fields)


def allocator(
  model: Transformer,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  paging: Paging,
) -> PageAllocator:
  """Returns who gives out the pages of a call of `chunks`.

  Args:
    model: the Transformer.
    prompts, max_new_tokens: as for `chunks`.
    paging: how pages are laid out.

  Raises:
    UserError: a prompt is none for this model, or takes more pages than there
      are.
  """
  tokens = extents(prompts, generate.limits(model, prompts, max_new_tokens))
  rows = min(paging.rows or len(prompts), len(prompts))
  needs = sorted(-(-n // paging.size) for n in tokens)
  total = sum(needs[-rows:])
  count = min(paging.count or total, total)
  made = PageAllocator(count, paging.size, rows, needs[-1])
  for n in tokens:
    made.check(n)
  return made


def extents(
  prompts: Sequence[Sequence[int]], limits: Sequence[int]
) -> list[int]:
  """Returns how many tokens of each row come into pages: all but the last.

  Args:
    prompts: token ids.
    limits: how many tokens each may be continued by.
  """
  return [len(p) + n - 1 for p, n in zip(prompts, limits, strict=True)]


def memory(
  model: Transformer,
  params: Params,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  pages: PageAllocator,
  dtype: str | None = None,
) -> dict[str, int]:
  """Returns bytes of the pages, and of what they spare.

  They are `pool_bytes`, of which at most `most_bytes` were held at a time. What
  they spare is `slab_bytes`, the cache of `generate` for the same prompts at
  once.

  Args:
    model, params, prompts, max_new_tokens: as for `chunks`.
    pages: after it.
    dtype: of the pages.
  """

  def nbytes(make):
    leaves = jax.tree.leaves(jax.eval_shape(make))
    return sum(x.size * x.dtype.itemsize for x in leaves)

  page = nbytes(lambda: paged.empty_pool(model, params, 1, pages.size, dtype))
  longest = max(map(len, prompts))
  steps = max(generate.limits(model, prompts, max_new_tokens))
  capacity = generate.bucket(longest + steps)
  slab = nbytes(
    lambda: init_cache(model, params, len(prompts), capacity).layers
  )
  return {
    "page_tokens": pages.size,
    "pages": pages.count,
    "most_pages": pages.most_used,
    "most_bytes": pages.most_used * page,
    "pool_bytes": pages.count * page,
    "slab_bytes": slab,
  }
