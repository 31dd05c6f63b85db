"""How pages are laid out, and what they take."""

import re

import jax
import numpy as np
import pytest

from research.nn import generate_paged, paging
from research.nn.paging import Paging, parse
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
    ("0", "pages size: found 0"),
    ("4,rows=0", "pages rows: found 0"),
    ("4,count=-1", "found '-1' as count"),
    ("4,size=4", "found 'size=4', expected count=, rows= or dtype="),
    ("4,rows=1,rows=2", "found 'rows=2'"),
    ("4,rows", "found 'rows'"),
    ("4,dtype=int4", "pages dtype: found 'int4', expected one of int8, fp8"),
  ],
)
def test_mistakes(text, words):
  with pytest.raises(UserError, match=re.escape(words)):
    parse(text)


def test_memory_is_that_of_the_arrays():
  """Prompts of 150, 20, 9, 3 tokens: what each comes to need, no more."""
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
