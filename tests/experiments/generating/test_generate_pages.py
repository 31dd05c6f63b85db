"""Several prompts over one pool of pages, from the command line."""

import jax
import numpy as np
import pytest

from experiments import generate
from research import tree
from research.generation import generate_paged
from research.nn.cache import paged
from research.quant.layouts import cpu_layout
from tests.experiments import generated
from tests.experiments.generated import told

PROMPTS = [f"--prompt={x}" for x in ("the cat", "a", "the cat ran", "def f")]
RULES = "--temperature=1.2", "--seed=3"


@pytest.fixture
def command(capsys):
  return generated.of_tiny(capsys)


@pytest.mark.slow
@pytest.mark.parametrize("pages", ["4", "4,rows=2", "16,rows=1"])
@pytest.mark.sample(3, 1)
def test_the_text_is_that_without_pages(command, pages):
  want = told(command(*PROMPTS, *RULES))
  got = told(command(*PROMPTS, *RULES, f"--pages={pages}"))
  for a, b in zip(got["rows"], want["rows"], strict=True):
    assert a == b
  assert "pages" not in want
  assert 0 < got["pages"]["most_pages"] <= got["pages"]["pages"]
  assert 0 < got["pages"]["most_bytes"] <= got["pages"]["pool_bytes"]
  assert got["pages"]["pool_bytes"] < got["pages"]["slab_bytes"]


@pytest.mark.slow
def test_pages_in_8_bits_are_smaller(command, monkeypatch):
  """By what the scales leave of it: 4 bytes beside a head's 8 numbers."""
  made, zeros = [], paged.empty_pool

  def watched(*arguments):
    made.append(zeros(*arguments))
    return made[-1]

  exact = told(command(*PROMPTS, *RULES, "--pages=4,rows=2"))["pages"]
  monkeypatch.setattr(paged, "empty_pool", watched)
  eight = "--pages=4,rows=2,dtype=int8"
  got = told(command(*PROMPTS, *RULES, eight))["pages"]
  assert got["most_pages"] == exact["most_pages"]
  assert got["most_bytes"] < 0.7 * exact["most_bytes"]
  sizes = [x.nbytes for x in jax.tree.leaves(made[0])]
  assert got["pool_bytes"] == sum(sizes)


def test_layers_are_apart_in_every_type(command, monkeypatch):
  """A stacked run's pages would be copied in each step."""
  found = []

  def watched(model, params, *arguments, **options):
    del model, arguments, options
    runs = [run for name, run in params.items() if name.startswith("run")]
    found.append([tree.run_length(run) for run in runs])
    yield np.array([[5]])

  monkeypatch.setattr(generate_paged, "chunks", watched)
  # As on an accelerator, or without a compiler: panels are apart anyway.
  monkeypatch.setattr(cpu_layout, "for_decoding", lambda params, dtype: params)
  told(command(PROMPTS[0], "--pages=8", "--dtype=bfloat16"))
  assert len(found[0]) > 1 and set(found[0]) == {1}


@pytest.mark.parametrize(
  "counts, rate",
  [((1, 4, 4), 2.0), ((5, 4, 4), 2.0), ((5, 2), 1.0), ((9,), None)],
)
def test_speed_is_that_after_the_first_chunk(
  command, monkeypatch, counts, rate
):
  """Tokens of a chunk for two seconds; the first one is the prompt's, too."""
  clock = [0.0]

  def chunked(*arguments, **options):
    del arguments, options
    clock[0] += 100.0
    for i, count in enumerate(counts):
      clock[0] += 2.0 * (i > 0)
      yield np.full((1, count), 5)

  monkeypatch.setattr(generate_paged, "chunks", chunked)
  monkeypatch.setattr(generate.time, "perf_counter", lambda: clock[0])
  got = told(command(PROMPTS[0], "--pages=8"))
  assert got["tokens"] == sum(counts)
  assert got["tokens_per_s"] == rate


@pytest.mark.slow
def test_one_prompt_streams(command):
  want = told(command(PROMPTS[0]))
  got = told(command(PROMPTS[0], "--pages=8"))
  assert got["text"] == want["text"]


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--pages=4", "--kv=int8"], "--kv=int8: is not for --pages"),
    (["--pages=x"], "pages=x: found 'x' as size"),
    (["--pages=4,count=2"], "pages: found 2 for a row"),
    (["--pages=4", "--adapter=a=.", "--adapter=b=."], "found 2 adapters"),
    (["--pages=4", "--sampler=diffusion"], "--pages: is not for"),
  ],
  ids=str,
)
def test_errors(command, flags, words):
  status, lines, errors = command(*PROMPTS[:2], *flags)
  assert (status, lines) == (1, [])
  assert errors.startswith("error: ") and words in errors
  assert len(errors.splitlines()) <= 3
