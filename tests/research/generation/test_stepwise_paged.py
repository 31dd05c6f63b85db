"""Branches over pages: the tokens of rows with caches of their own."""

import functools

import numpy as np
import pytest

from research.generation import boundary
from research.generation.page_allocator import PageAllocator
from research.generation.paging import Paging
from research.generation.sampling import Sampling
from research.generation.stepwise import Stepwise
from research.generation.stepwise_paged import PagedStepwise
from research.quant.kv.kv_quantizer import KVQuantizer
from research.typing import UserError
from tests import support

PROMPTS = [[5, 6, 7, 2, 9], [5, 6, 7, 1]]


@functools.cache
def case():
  model = support.model("llama", tied=False)
  return model, support.params(model)


def engine(kind, **fields):
  model, params = case()
  none = np.zeros((1, model.vocab_size), bool)
  steps = boundary.Boundary(np.zeros_like(none, np.int32), none, np.int32(4))
  return kind(
    model=model,
    params=params,
    sampling=Sampling(temperature=1.2, repetition_penalty=1.1),
    boundary=steps,
    log_probs=True,
    **fields,
  )


def search(engine):
  """Returns the tokens of a search that branches twice and drops rows."""
  state, drawn = engine.start(PROMPTS, 13, copies=2)
  found = [drawn]
  for rows, branch in (([3, 3, 0, 1], [0, 1, 0, 0]), ([1, 1, 1], [2, 0, 1])):
    state = engine.select(state, rows, branch)
    state, drawn = engine.advance(state)
    found.append(drawn)
  while not drawn.done.all():
    state, drawn = engine.advance(state)
    found.append(drawn)
  return state, found


@pytest.mark.slow
def test_a_search_over_pages_is_that_over_rows():
  layout = Paging(size=4)
  state, found = search(engine(PagedStepwise, layout=layout, max_rows=4))
  _, expected = search(engine(Stepwise))
  for got, want in zip(found, expected, strict=True):
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.log_probs, want.log_probs, atol=1e-4)
  assert len({tuple(x) for x in found[-1].tokens.tolist()}) == 3
  for row in range(3):
    state.pages.release(row)
  assert not state.pages.used


def test_a_branch_costs_its_own_pages_alone():
  pages = PageAllocator(count=9, size=4, rows=4, width=5)
  pages.admit(0, list(range(10)), 17)
  prefix = pages.hold(0, 14)
  used = pages.used
  # Three full pages are shared; the fourth is copied, and one more is its own.
  source, target = pages.attach(1, prefix, 17)
  assert pages.used == used + 2 and source == pages.table[0, 3]
  assert target == pages.table[1, 3] != source
  np.testing.assert_array_equal(pages.table[0, :3], pages.table[1, :3])
  pages.release(0)
  # What only the row had is free; the prefix is not.
  assert pages.used == used - 1 + 2
  pages.drop(prefix)
  assert pages.used == 5
  pages.release(1)
  assert pages.used == 0


def test_what_was_released_cannot_be_held():
  pages = PageAllocator(count=4, size=4, rows=2, width=2)
  pages.admit(0, [1, 2, 3], 6)
  with pytest.raises(UserError, match="row 0 has none for 9 tokens"):
    pages.hold(0, 9)
  pages.release(0)
  with pytest.raises(UserError, match="row 0 has none for 3 tokens"):
    pages.hold(0, 3)


@pytest.mark.parametrize(
  ("use", "message"),
  [
    (lambda: engine(PagedStepwise, kv=KVQuantizer()), r"PagedStepwise\.kv"),
    (
      lambda: engine(PagedStepwise).start(PROMPTS, 4, copies=0),
      "copies: found 0",
    ),
  ],
)
def test_what_pages_cannot_do_is_refused(use, message):
  with pytest.raises(UserError, match=message):
    use()
