"""Page configuration of paged generation, and its memory use."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from research import weights
from research.generation import generate
from research.generation.page_allocator import PageAllocator
from research.nn.cache import paged
from research.nn.transformer import Transformer, init_cache
from research.ranges import OneOf, PositiveInt, Ranged
from research.typing import Params, UserError


@dataclasses.dataclass(frozen=True)
class Paging(Ranged):
  """Page configuration.

  Attributes:
    size: tokens per page; TPUs require multiples of 8 in float32, 16 in
      bfloat16, 128 in 8 bits.
    count: number of pages; by default, and at most, what all rows together can
      need.
    rows: number of rows decoded at a time; by default all.
    dtype: `"int8"`, `"fp8"` or, by default, the model's.
  """

  size: PositiveInt = 16
  count: PositiveInt | None = None
  rows: PositiveInt | None = None
  dtype: OneOf(*paged.CODE_DTYPES) | None = None


def parse(text: str) -> Paging:
  """Parses a command-line value, e.g. `16,count=200,rows=4,dtype=int8`.

  Args:
    text: tokens per page, then other fields of `Paging`.

  Raises:
    UserError: `text` is malformed.
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
  extra: Sequence[int] = (),
) -> PageAllocator:
  """Creates the page allocator for a call of `generate_paged.chunks`.

  Args:
    prompts, max_new_tokens: as for `chunks`.
    extra: as for `generate.token_limits`.

  Raises:
    UserError: a prompt is invalid for this model, or needs more pages than
      there are.
  """
  tokens = extents(
    prompts, generate.token_limits(model, prompts, max_new_tokens, extra)
  )
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
  """Returns the number of tokens of each row stored in pages: all but the last.

  Args:
    prompts: token ids.
    limits: maximum number of new tokens of each prompt.
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
  """Returns the memory use of paged generation and of an unpaged cache.

  Args:
    model, params, prompts, max_new_tokens: as for `chunks`.
    pages: the allocator, after generation.

  Returns:
    Page size and counts, `pool_bytes` (all pages), `most_bytes` (peak in use),
    and `slab_bytes` (the cache of `generate` for the same prompts at once).
  """

  def nbytes(make):
    leaves = jax.tree.leaves(jax.eval_shape(make))
    return sum(x.size * x.dtype.itemsize for x in leaves)

  page = nbytes(lambda: paged.empty_pool(model, params, 1, pages.size, dtype))
  longest = max(map(len, prompts))
  extra = weights.extra_ids(params)
  steps = max(generate.token_limits(model, prompts, max_new_tokens, extra))
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
