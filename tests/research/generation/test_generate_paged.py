"""Paged generation equals unpaged generation, row by row."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree, weights
from research.generation import generate, generate_paged, paging
from research.generation import generate_paged_rows as programs
from research.generation.generated import collect
from research.generation.page_allocator import NO_PAGE, PageAllocator
from research.generation.paging import Paging
from research.generation.sampling import GREEDY, Sampling
from research.lora import adapt
from research.lora.methods.alora import ALoRA
from research.lora.methods.lora import LoRA
from research.lora.serving import pool
from research.nn import rope
from research.nn.cache import paged
from research.typing import UserError
from tests import support

NEW = 19  # a chunk and a part
START = [7, 1, 30, 2, 2, 41, 9, 5, 60]
PROMPTS = [[5, 6, 7], START, [9] * 23, [*START[:6], 3, 3], [*START, 8, 8], [4]]


@functools.cache
def case(family="gemma2"):
  model = support.model(family, tied=False)
  return model, support.params(model)


@functools.cache
def reference(rules=GREEDY, stop=(), family="gemma2"):
  return generate.generate(
    *case(family), PROMPTS, NEW, rules, jax.random.key(4), stop
  )


def complete(rules=GREEDY, stop=(), family="gemma2", **layout):
  given = *case(family), PROMPTS, NEW, rules, jax.random.key(4), stop
  return over_pages(*given, layout=Paging(**layout))


def over_pages(*given, layout=Paging()):
  source = functools.partial(generate_paged.chunks, layout=layout)
  return generate.generate(*given, source=source)


@pytest.mark.slow
@pytest.mark.parametrize(
  "rows",
  [1, 2, 6],
)
def test_tokens_are_those_of_a_batch_without_pages(rows):
  """Independent of the batch, of waiting and of reused pages."""
  assert complete(size=4, rows=rows) == reference()
  # Not a loop on one token, which much that is wrong would repeat too.
  assert min(len(set(tokens)) for tokens in reference().tokens) > 3


def test_rows_that_stop_make_room():
  """Rows end at different times; waiting prompts reuse their pages."""
  tokens = reference().tokens
  stop = tokens[0][4], tokens[2][9], tokens[4][0]
  want = reference(stop=stop)
  assert "stop" in want.reasons and len(set(map(len, want.tokens))) > 2
  assert complete(stop=stop, size=4, rows=2) == want


@pytest.mark.slow
def test_samples_are_the_same():
  """For rows that have generated different numbers of tokens."""
  rules = Sampling(temperature=1.5, top_p=0.95, repetition_penalty=1.2)
  run = functools.partial(
    generate.generate, *case(), PROMPTS, NEW, rules, jax.random.key(4)
  )
  tokens = run().tokens
  want = run(stop := (tokens[0][2], tokens[3][7]))
  assert len(set(map(len, want.tokens))) > 3
  parts = generate_paged.chunks(
    *run.args, stop, size=3, layout=Paging(size=4, rows=2)
  )
  assert collect(parts, stop) == want


@pytest.mark.slow
def test_few_pages_are_enough_and_all_come_back():
  model, params = case()
  layout = Paging(size=4, rows=3, count=14)
  pages = paging.allocator(model, PROMPTS, NEW, layout)
  parts = generate_paged.chunks(
    model, params, PROMPTS, NEW, layout=layout, pages=pages
  )
  assert collect(parts, ()) == reference()
  assert pages.most_used <= 14 and pages.used == 0
  # The longest alone takes 11; all at once would take 44.
  needs = [-(-(len(p) + NEW - 1) // 4) for p in PROMPTS]
  assert (max(needs), sum(needs)) == (11, 44)


def test_what_free_pages_hold_does_not_matter(monkeypatch):
  model, params = case()
  zeros = paged.empty_pool

  def poisoned(*arguments):
    return jax.tree.map(lambda x: x * jnp.nan, zeros(*arguments))

  monkeypatch.setattr(paged, "empty_pool", poisoned)
  assert complete(size=4, rows=2) == reference()


def _read_alone(prompt, read, pages):
  """Returns the continuation of a prompt with some tokens in pages."""
  model, params = case()
  held, table = pages
  for at in range(read, len(prompt), 64):
    piece = np.zeros((1, 64), np.int32)
    tokens = prompt[at : at + 64]
    piece[0, : len(tokens)] = tokens
    hidden, held = programs.prefill(
      model, params, held, table, np.int32([at]), piece, np.int32([len(tokens)])
    )
  return hidden, held


@pytest.mark.parametrize("alike", [8, 10])
def test_what_is_shared_is_bit_by_bit_what_would_be_read(alike):
  """Whole pages, and a page of which two tokens are copied."""
  model, params = case()
  second = [*range(20, 20 + alike), 1, 2, 3]
  first = [*second[:alike], 50, 51]
  found = []
  for share in (True, False):
    pages = PageAllocator(12, 4, 2, 4)
    held = paged.empty_pool(model, params, 12, 4)
    assert pages.admit(0, first, len(first)).read == 0
    _, held = _read_alone(first, 0, (held, pages.table[:1].copy()))
    start = pages.admit(1, second if share else [0, *second[1:]], len(second))
    assert start.read == (alike if share else 0)
    assert (start.copy is not None) == (share and alike == 10)
    if start.copy is not None:
      held = programs.copy_page(held, *map(np.int32, start.copy))
    table = pages.table[1:].copy()
    hidden, held = _read_alone(second, start.read, (held, table))
    mine = jax.tree.map(lambda x, t=table: x[:, t[0, t[0] != NO_PAGE]], held)
    found.append((hidden, jax.tree.map(_written(len(second)), mine)))
  chex.assert_trees_all_equal(*found)


def _written(n):
  """Returns a function from pages of a row to its tokens."""

  def tokens(kv):
    runs, pages, heads, size, width = kv.shape
    return kv.swapaxes(2, 3).reshape(runs, -1, heads, width)[:, :n]

  return tokens


@pytest.mark.slow
def test_shared_beginnings_are_read_once(monkeypatch):
  model, params = case()
  prompts = [[*START, i] for i in range(4)]
  want = generate.generate(model, params, prompts, NEW).tokens
  used = []
  for share in (True, False):
    pages = paging.allocator(model, prompts, NEW, Paging(size=4))
    if not share:
      monkeypatch.setattr(pages, "_known", lambda prompt: ([], None, 0))
    parts = generate_paged.chunks(
      model, params, prompts, NEW, layout=Paging(size=4), pages=pages
    )
    assert collect(parts, ()).tokens == want
    used.append(pages.most_used)
  # Each has 28 tokens in 7 pages; of 9 that are alike two pages are whole.
  assert used == [4 * 7 - 3 * 2, 4 * 7]


@pytest.mark.slow
def test_pages_in_8_bits_stay_close(monkeypatch):
  exact, made = reference().tokens, []
  zeros = paged.empty_pool

  def watched(*arguments):
    made.append(zeros(*arguments))
    return made[-1]

  monkeypatch.setattr(paged, "empty_pool", watched)
  got = complete(size=4, rows=2, dtype="int8").tokens
  (held,) = made
  assert {x.dtype.name for x in jax.tree.leaves(held)} == {"int8", "float32"}
  assert [t[0] for t in got] == [t[0] for t in exact]
  assert [len(t) for t in got] == [NEW] * len(PROMPTS)


@pytest.mark.slow
def test_five_programs_serve_all():
  # Another model value and number of pages: no other test has compiled them.
  model, params = case()
  model = model.clone(max_positions=99)
  all_ = (
    programs.prefill,
    programs.insert_row,
    programs.decode,
    programs.copy_page,
  )

  def sizes():
    return [f._cache_size() for f in all_]

  before = sizes()
  layout = Paging(4, rows=3, count=25)
  for prompts in (PROMPTS, PROMPTS[::-1]):
    pages = paging.allocator(model, PROMPTS, NEW, layout)
    for _ in generate_paged.chunks(
      model, params, prompts, NEW, layout=layout, pages=pages
    ):
      pass
  assert [b - a for a, b in zip(before, sizes(), strict=True)] == [2, 1, 1, 1]


@pytest.mark.slow
def test_layers_that_look_back_on_a_window_give_pages_back():
  model, params = case("mistral")
  assert {k.attention.window for k in model.layer_kinds()} == {6}
  pages = paging.allocator(model, PROMPTS[2:3], 40, Paging(size=4))
  used, parts = [], []
  for part in generate_paged.chunks(
    model, params, PROMPTS[2:3], 40, layout=Paging(size=4), pages=pages
  ):
    parts.append(part)
    used.append(pages.used)
  want = generate.generate(model, params, PROMPTS[2:3], 40)
  assert collect(parts, ()) == want
  # 62 tokens; before 39 and then 55 the window reaches 34 and 50.
  assert used == [16 - 34 // 4, 16 - 50 // 4, 0]


@pytest.mark.slow
def test_adapters_go_along_unless_they_ask_for_whole_rows():
  model = support.model(depth=1, tied=False)
  params = support.params(model)
  start = adapt.Adapt(method=LoRA(rank=2))(params, jax.random.key(0))
  adapted = tree.map_paths(
    lambda p, x: x + 0.1 if p.endswith("trained/b") else x, start
  )
  want = generate.generate(model, adapted, PROMPTS[:2], 5)
  layout = Paging(size=4, rows=1)
  got = over_pages(model, adapted, PROMPTS[:2], 5, layout=layout)
  assert got == want != generate.generate(model, params, PROMPTS[:2], 5)
  gated = adapt.Adapt(method=ALoRA(rank=2, invocation=(5, 6)))(
    params, jax.random.key(0)
  )
  with pytest.raises(UserError, match="certain tokens activate"):
    over_pages(model, gated, PROMPTS[:2], 5)


def test_adapters_bound_by_row_are_refused():
  """The prompt of a row changes during paged generation."""
  model = support.model(depth=1, tied=False)
  held = pool.create(support.params(model), model, slots=2, rank=2)
  for layout in (lambda params: params, tree.unroll):
    bound = weights.bind(layout(held.params), ids=jnp.array([0, 1]))
    with pytest.raises(UserError, match="one adapter for all rows"):
      over_pages(model, bound, PROMPTS[:2], 5)


def test_rotations_that_ask_for_whole_prompts_are_refused():
  """`rope.Dynamic` rotates a piece differently than the whole prompt."""
  model = support.model(depth=2, tied=False)
  plain, params = model.stack.blocks[0], support.params(model)
  turned = dataclasses.replace(
    plain.attention.rope, scaling=rope.Dynamic(factor=4.0, original=16)
  )
  block = plain.clone(attention=plain.attention.clone(rope=turned))
  for blocks in ((block,), (plain, block)):
    stack = dataclasses.replace(model.stack, blocks=blocks)
    with pytest.raises(UserError, match="pages: found .*rope.Dynamic"):
      over_pages(model.clone(stack=stack), params, PROMPTS, 5)


def test_pages_that_somebody_holds_are_refused():
  """Pages that another call has filled are not in this one's pool."""
  model, params = case()
  layout = Paging(size=4, rows=2)
  pages = paging.allocator(model, PROMPTS, NEW, layout)

  def call():
    return generate_paged.chunks(
      model, params, PROMPTS, NEW, size=2, layout=layout, pages=pages
    )

  left = call()
  next(left)
  assert pages.used
  with pytest.raises(UserError, match=f"pages: {pages.used} of .* in use"):
    next(call())


def test_pages_of_another_size_are_refused():
  model, params = case()
  pages = paging.allocator(model, PROMPTS, NEW, Paging(size=4))
  with pytest.raises(UserError, match="found pages of 4 .* layout of 8"):
    next(
      generate_paged.chunks(
        model, params, PROMPTS, NEW, layout=Paging(size=8), pages=pages
      )
    )


def test_bad_prompts_and_too_few_pages():
  with pytest.raises(UserError, match="prompt 1: found no tokens"):
    over_pages(*case(), [[]], 1)
  with pytest.raises(UserError, match="found 10 for a row of 41.*expected 11"):
    complete(size=4, count=10)
