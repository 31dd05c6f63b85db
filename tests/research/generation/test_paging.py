"""Page configuration and memory use."""

import re

import jax
import numpy as np
import pytest

from research.generation import generate_paged, paging
from research.generation.page_allocator import PageAllocator
from research.generation.paging import Paging, parse
from research.nn.cache import paged
from research.nn.transformer import init_cache
from research.typing import UserError
from tests import support


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("16", Paging()),
    ("8,rows=4", Paging(8, rows=4)),
    ("128,dtype=int8,count=200", Paging(128, 200, None, "int8")),
  ],
)
def test_what_a_command_line_says(text, expected):
  assert parse(text) == expected


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("", "found '' as size, expected a number"),
    ("x", "found 'x' as size"),
    ("0", "Paging.size: found 0"),
    ("4,count=-1", "found '-1' as count"),
    ("4,size=4", "found 'size=4', expected count=, rows= or dtype="),
    ("4,rows=1,rows=2", "found 'rows=2'"),
    ("4,rows", "found 'rows'"),
    ("4,dtype=int4", "Paging.dtype: found 'int4', expected int8 or fp8"),
  ],
)
def test_mistakes(text, words):
  with pytest.raises(UserError, match=re.escape(words)):
    parse(text)


@pytest.mark.slow
def test_memory_is_that_of_the_arrays():
  """Prompts of 150, 20, 9, 3 tokens: exactly the pages that they need."""
  model = support.model("llama")
  params = support.params(model)
  prompts, new = [[1] * 150, [2] * 20, [3] * 9, [4] * 3], 10
  layout = Paging(size=8)
  pages = paging.allocator(model, prompts, new, layout)
  for _ in generate_paged.chunks(
    model, params, prompts, new, layout=layout, pages=pages
  ):
    pass
  found = paging.memory(model, params, prompts, new, pages)
  assert pages.most_used == 29
  # 3 layers, 2 heads, keys and values of 8 numbers of 4 bytes.
  token = 3 * 2 * 2 * 8 * 4
  needs = [159, 29, 18, 12]
  assert found["most_pages"] == sum(-(-n // 8) for n in needs) == 29
  assert found["most_bytes"] == 29 * 8 * token
  slab = init_cache(model, params, 4, 160).layers
  assert found["slab_bytes"] == sum(x.nbytes for x in jax.tree.leaves(slab))
  assert found["slab_bytes"] == 4 * 160 * token
  assert found["pages"] == 29
  assert np.isclose(found["most_bytes"] / found["slab_bytes"], 0.3625)
  # What there is counts, held or not.
  more = PageAllocator(40, 8, 4, 20)
  more.admit(0, prompts[1], 29)
  found = paging.memory(model, params, prompts, new, more)
  assert found["most_bytes"] == 4 * 8 * token
  assert found["pool_bytes"] == 40 * 8 * token


@pytest.mark.parametrize("dtype", paged.CODE_DTYPES)
def test_memory_in_8_bits_is_that_of_codes_and_scales(dtype):
  model = support.model("llama")
  params = support.params(model)
  pages = PageAllocator(7, 8, 2, 7)
  found = paging.memory(model, params, [[1] * 9], 4, pages, dtype)
  # 3 layers, 2 heads, keys and values of 8 codes and a scale each.
  assert found["pool_bytes"] == 7 * 8 * 3 * 2 * 2 * (8 + 4)
  held = paged.empty_pool(model, params, 7, 8, dtype)
  assert found["pool_bytes"] == sum(x.nbytes for x in jax.tree.leaves(held))


def test_no_page_is_made_that_no_row_can_have():
  """Two of three rows at a time: at most the two that need most."""
  model = support.model("llama")
  prompts = [[1] * 20, [2] * 9, [3] * 30]

  def count(**layout):
    made = paging.allocator(model, prompts, 5, Paging(size=8, **layout))
    return made.count

  assert count(rows=2) == count(rows=2, count=10**9) == 3 + 5
  assert count(count=10**9) == 3 + 2 + 5
  assert count(rows=2, count=6) == 6
