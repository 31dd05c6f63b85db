"""Prompts of many lengths by few programs, as if each had one of its own."""

import jax
import numpy as np
import pytest

from experiments.generating import diffusion
from experiments.generating.infilling import Text
from experiments.generating.prepared_rows import batches, prepare
from research.diffusion.sampling import layout, sampler, variable_length
from research.diffusion.sampling.config import (
  Dual,
  Growth,
  Prefix,
  SamplerConfig,
)
from research.generation.sampling import GREEDY
from research.interop import load
from research.interop.diffusion.spec import Spec
from research.typing import UserError
from tests.experiments import filled
from tests.experiments.generated import told

PROGRAMS = (
  sampler.fill_block,
  sampler.cache_finished,
  variable_length._measured,
  variable_length.grow_block,
)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
  root = tmp_path_factory.mktemp("models")
  return filled.converted(root)


@pytest.fixture
def command(capsys, places):
  return filled.command(capsys, places)


# How rows begin --------------------------------------------------------------


def test_which_prompts_are_filled_together():
  """All, unless blocks start with the row and steps are split among them."""
  prompts = [[1] * n for n in (3, 9, 4, 7, 8)]
  blocks = Spec(mask_id=9, block=4)
  for how in (Spec(mask_id=9), blocks):
    for more in ({}, dict(guidance=1.0)):
      config = SamplerConfig(length=4, **more)
      assert batches(prompts, how, config, False) == [[0, 1, 2, 3, 4]]
  config = SamplerConfig(length=4, steps=4)
  assert batches(prompts, blocks, config, False) == [[0, 1, 3], [2, 4]]


def test_blocks_begin_with_the_row():
  """A prompt of 4 needs a block, one of 7 two, with 3 of its tokens in one."""
  config = SamplerConfig(length=4)
  prompts = [[1] * 4, [2] * 7]
  it = prepare(prompts, [2, 3], Spec(mask_id=9, block=4), config)
  assert it.state.tokens.shape == (2, 64) and it.config.length == 8
  assert it.heads == [56, 59] and it.starts == [52, 52]
  assert it.stops == [60, 64]
  np.testing.assert_array_equal(it.state.masked.sum(-1), [4, 5])
  np.testing.assert_array_equal(it.state.valid.sum(-1), [8, 12])
  np.testing.assert_array_equal(it.prompt.sum(-1), [4, 7])


def test_randomness_is_of_the_seed_and_of_each_prompts_number():
  config, spec = SamplerConfig(length=4), Spec(mask_id=9)

  def keys(seed, *numbers):
    prompts = [[1] * 4 for _ in numbers]
    it = prepare(prompts, list(numbers), spec, config, seed)
    return jax.random.key_data(it.state.keys).tolist()

  assert keys(0, 2, 3) == keys(0, 2) + keys(0, 3)
  found = keys(0, 2, 3) + keys(1, 2, 3)
  assert len({tuple(key) for key in found}) == 4


def test_steps_are_those_of_the_blocks_that_a_row_has():
  spec, config = Spec(mask_id=9, block=4), SamplerConfig(length=8, steps=6)
  it = prepare([[1] * 4], [0], spec, config)
  assert it.config.length == 8 and it.config.block_steps == 3
  it = prepare([[1] * 5], [0], spec, config)
  assert it.config.block_steps == 2
  wrong = SamplerConfig(length=8, steps=4)
  with pytest.raises(UserError, match="steps=4: expected a multiple of the 3"):
    prepare([[1] * 5], [0], spec, wrong)


def test_guidance_is_by_something():
  config = SamplerConfig(guidance=1.0)
  with pytest.raises(UserError, match="begins with its first gap"):
    prepare([[9, 1], [1, 9]], [0, 1], Spec(mask_id=9), config, gaps=True)


def places_of(ids, spec, gaps=False, **settings):
  """Returns how many places a row takes."""
  it = prepare([ids], [0], spec, SamplerConfig(**settings), gaps=gaps)
  return it.state.tokens.shape[1]


@pytest.mark.parametrize("block", [8, 32])
def test_rows_have_no_more_places_than_their_bucket(block):
  """The next for a text, and what its last block has behind it."""
  m = 9
  for n in (1, 33, 64, 65, 67, 100, 128, 129, 200):
    for gap in {0, n // 2, n - 1}:
      ids = [1] * gap + [m] + [1] * (n - gap - 1)
      got = places_of(ids, Spec(mask_id=m), block=block, gaps=True)
      assert n <= got <= layout.bucket(n + block - 1)
      # Of a model's own blocks the first begins where the row does.
      own = Spec(mask_id=m, block=block)
      assert places_of(ids, own, gaps=True) <= layout.bucket(n + block - 1)
    assert places_of([1] * n, Spec(mask_id=m), length=block) == layout.bucket(
      n + block
    )
    got = places_of([1] * n, Spec(mask_id=m, block=block), length=block)
    assert got <= layout.bucket(layout.round_up(n + block, block))


# What padding does not change ------------------------------------------------

PROMPTS = "the cat sat on the mat", "the dog", "a"
HOT = "--temperature=1"
DREAM = "--plan=dream", "--place_temperature=0.5", "--steps=4"
NEVER = "--ends=never", "--tempered"
FULL = [
  ("all", ["--block=4", "--policy=threshold:0.2", HOT]),
  ("all", ["--block=2", "--cache=prefix", "--policy=factor:2"]),
  ("all", ["--block=2", "--cache=vicinity:3", HOT]),
  ("all", ["--block=4", "--cache=delayed:2", "--steps=4"]),
  ("all", ["--canvas=auto:4", "--policy=threshold:0.3", HOT]),
  ("all", ["--canvas=auto:4", "--guidance=1", "--cache=prefix"]),
  ("all", ["--policy=hierarchy:0.3,low=0.1", "--ends=last", HOT]),
  ("all", ["--policy=quota+threshold:0.2", "--tempered", "--ends=never", HOT]),
  ("all", ["--place_temperature=0.5", "--plan=dream", "--steps=4", HOT]),
  ("all", ["--block=2", "--cache=prefix", "--policy=factor:2", *NEVER, HOT]),
  ("all", ["--policy=credit:0.3", "--guidance=1", "--edit=0.3"]),
  ("all", ["--plan=chance", "--select=random", "--remask=cap:0.2", HOT]),
  ("four", ["--guidance=1", "--cache=prefix", "--edit=0.3"]),
  ("four", [HOT]),
  ("one", ["--cache=prefix"]),
  ("one", ["--cache=prefix", "--policy=quota+threshold:0.2"]),
]
# Each kind of cache, canvas and end, in few commands.
WAYS = [
  ("all", ["--block=4", "--cache=vicinity:3", "--policy=threshold:0.2", HOT]),
  (
    "all",
    ["--canvas=auto:4", "--guidance=1", "--cache=prefix"]
    + ["--policy=threshold:0.3", HOT],
  ),
  ("four", ["--policy=hierarchy:0.3,low=0.1", "--ends=last", HOT]),
  *[pytest.param(*way, marks=pytest.mark.slow) for way in FULL],
  pytest.param(
    "all",
    ["--block=4", "--cache=delayed:2", *DREAM, HOT],
    marks=pytest.mark.slow,
  ),
]


def unpadded(monkeypatch):
  monkeypatch.setattr(layout, "bucket", lambda n, least=1: n)


def kept(result):
  """Returns what does not tell the time."""
  times = "tokens_per_s", "seconds"
  return {k: v for k, v in result.items() if k not in times}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flags"), WAYS)
@pytest.mark.sample(21)
def test_what_is_written_is_what_each_prompt_gives_without_padding(
  command, monkeypatch, name, flags
):
  given = [f"--prompt={text}" for text in PROMPTS]
  rows = kept(told(command(name, *flags, *given)))["rows"]
  unpadded(monkeypatch)
  # As long as the longest of them, the first, which has no padding then,
  assert kept(told(command(name, *flags, *given)))["rows"] == rows
  # and what it gives beside itself alone is by the same program.
  alone = kept(told(command(name, *flags, *given[:1] * len(given))))["rows"]
  assert alone[0] == rows[0]


# Programs --------------------------------------------------------------------


def programs():
  return [program._cache_size() for program in PROGRAMS]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "more"),
  [
    ("all", dict(block=4, cache=Dual(), guidance=1.0)),
    ("all", dict(canvas=Growth(start=4))),
    ("four", dict(cache=Prefix(), guidance=1.0)),
    pytest.param("all", dict(block=4), marks=pytest.mark.slow),
    pytest.param("four", dict(cache=Prefix()), marks=pytest.mark.slow),
    pytest.param("four", dict(guidance=1.0), marks=pytest.mark.slow),
  ],
)
@pytest.mark.sample(3, 1)
def test_a_bucket_has_one_program(places, capsys, name, more):
  """Prompts of 1 to 70 tokens, of two buckets."""
  loaded = load.load_model(places[name])
  spec, config = loaded.diffusion, SamplerConfig(length=20, **more)
  for program in PROGRAMS:  # other tests may have some of the first bucket
    program.clear_cache()
  start, made = programs(), []
  for lengths in ((1, 7, 40), (70, 50)):
    for n in lengths:
      prompt = np.random.default_rng(n).integers(5, 30, n).tolist()
      diffusion.fill(loaded, spec, [prompt], GREEDY, config)
      if n == lengths[0]:
        now = programs()
        made.append([b - a for a, b in zip(start, now, strict=True)])
    assert programs() == now
    start = now
  # As many for each bucket; a row's start may be a program of its own.
  assert made[0] == made[1] and max(made[0]) in (1, 2)


def test_gaps_of_many_sizes_have_one_program(places):
  loaded = load.load_model(places["all"])
  how = loaded.diffusion
  config = SamplerConfig(block=4)
  for program in PROGRAMS:
    program.clear_cache()
  for given, gap, behind in ((2, 3, 1), (9, 1, 14), (1, 20, 0)):
    text = [5] * given + [how.mask_id] * gap + [6] * behind
    gaps = [Text(text, 0, [(given, given + gap)])]
    rows, _ = diffusion.fill(loaded, how, [text], GREEDY, config, texts=gaps)
    [row] = rows
    assert row["tokens"] <= gap and row["prompt_tokens"] == given + behind
  assert programs()[0] == 1
