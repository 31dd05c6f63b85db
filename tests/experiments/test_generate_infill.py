"""Texts with gaps on the command line."""

import dataclasses
import itertools
import types

import jax
import numpy as np
import pytest

from experiments.generating import diffusion, infilling, unmask_display
from research.diffusion.sampling import sampler
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.denoiser import NoCache
from research.generation.sampling import GREEDY
from research.interop import load
from research.text.special_tokens import SpecialTokens
from research.typing import UserError
from tests.experiments import filled
from tests.experiments.generated import TINY, told


@pytest.fixture(scope="module")
def places(tmp_path_factory):
  return filled.converted(tmp_path_factory.mktemp("models"))


@pytest.fixture
def command(capsys, places):
  return filled.command(capsys, places)


# Markers ---------------------------------------------------------------------


@pytest.mark.parametrize(
  ("text", "parts"),
  [
    ("a [[8]] b", ["a ", 8, " b"]),
    ("[[1]]", ["", 1, ""]),
    ("[[1]][[ 20 ]]\n[[3]]x", ["", 1, "", 20, "\n", 3, "x"]),
    (r"m = \[[1, 2]]; m[[2]]", ["m = [[1, 2]]; m", 2, ""]),
    ("x[y[0]] [[2]]]", ["x[y[0]] ", 2, "]"]),
    (r"a\b [[2]]", ["a\\b ", 2, ""]),
    # Of more brackets the innermost are the marker.
    ("x = [[[8]]]", ["x = [", 8, "]"]),
    ("[[[[8]]]]", ["[[", 8, "]]"]),
    (r"\[[[1, 2]]] [[3]]", ["[[[1, 2]]] ", 3, ""]),
    # Backslashes before brackets are pairs, and perhaps the one that escapes.
    (r"c:\\[[8]]", ["c:\\", 8, ""]),
    (r"c:\\\[[8]] [[1]]", ["c:\\[[8]] ", 1, ""]),
    (r"\\\\[[[2]]]", [r"\\[", 2, "]"]),
  ],
)
def test_markers(text, parts):
  assert infilling.parsed(text) == parts


class Words:
  """A tokenizer as SentencePiece's: a space goes before all that it is given.

  Characters are their own ids, and a document has 1 before it and 2 behind.
  """

  special = SpecialTokens(begin=(1,), end=(2,))

  def encode(self, text):
    return [9 if c == "#" else ord(c) for c in f" {text}"] if text else []


def test_where_gaps_are():
  """Two that meet are two, and what is around a document is at its ends."""
  given = infilling.tokens(Words(), "a[[3]][[4]]b[[1]]", 9, None)
  a, b = ord("a"), ord("b")
  assert given.ids == [1, ord(" "), a, *[9] * 7, b, 9, 2]
  assert given.gaps == [(3, 6), (6, 10), (11, 12)] and given.prompt == 0
  # An end ends its own gap alone.
  tokens = np.array([1, 32, a, 5, 7, 5, 7, 5, 5, 5, b, 5, 2])
  want = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1]
  np.testing.assert_array_equal(given.kept(tokens, (7,)), want)


def test_parts_do_not_begin_as_documents_do():
  given = infilling.tokens(Words(), "b[[2]] c", 9, [1, ord("a")])
  assert given.ids == [1, *map(ord, "ab"), 9, 9, *map(ord, " c")]
  assert given.gaps == [(3, 5)] and given.prompt == 2
  assert infilling.tokens(Words(), "[[1]]", 9, None).ids == [1, 9, 2]


def test_texts_of_the_tiny_model_are_what_they_are_without_gaps(places):
  encode = load.load_model(places["all"]).tokenizer.encode
  for first, more in (("the cat", " sat\n on"), ("", "the"), ("a", "\n\nb")):
    given = infilling.tokens(
      load.load_model(places["all"]).tokenizer, f"{first}[[1]]{more}", 999, None
    )
    want = [*encode(first, add_special=True), 999, *encode(more)]
    assert given.ids == want


WAYS = [
  ["--cache=dual", "--guidance=1", "--edit=0.3"],
  ["--cache=vicinity:4", "--policy=threshold:0.2"],
  pytest.param(["--cache=prefix"], marks=pytest.mark.slow),
  pytest.param(["--cache=delayed:3", "--ends=last"], marks=pytest.mark.slow),
  pytest.param(["--cache=dual"], marks=pytest.mark.slow),
  pytest.param(["--guidance=1", "--edit=0.3"], marks=pytest.mark.slow),
]

# What is filled --------------------------------------------------------------


def by_hand(place, ids, block):
  """Returns a row's tokens, filled with no padding and no command."""
  loaded = load.load_model(place)
  how = loaded.diffusion
  known = ids.index(how.mask_id)
  known -= known % (how.block or 1)  # where a block starts
  size = -(-(len(ids) - known) // block) * block
  rows = np.array([[*ids, *[0] * (known + size - len(ids))]])
  valid = np.arange(rows.shape[1])[None] < len(ids)
  end = tuple(how.end)
  options = SamplerConfig(
    mask_id=how.mask_id, length=size, block=block, stop_early=False, end=end
  )
  state = sampler.begin(rows, rows == how.mask_id, valid, jax.random.key(0))
  asked = NoCache(model=loaded.model, shift=how.shift, block=how.block)
  got = sampler.sample(asked, loaded.params, state, options)
  return got.tokens[0, : len(ids)], got


@pytest.mark.parametrize("name", ["all", "four"])
@pytest.mark.sample(2)
def test_gaps_are_filled_and_the_rest_is_kept(command, places, name):
  loaded = load.load_model(places[name])
  encode, mask = loaded.tokenizer.encode, loaded.diffusion.mask_id
  ids = encode("the cat", add_special=True) + [mask] * 3 + encode(" sat on")
  ids += [mask] * 2 + encode(" mat")
  block = 4
  tokens, want = by_hand(places[name], ids, block)
  flags = f"--block={block}", "--infill=the cat[[3]] sat on[[2]] mat"
  got = told(command(name, *flags))
  assert got["calls"] == want.counts[0]
  assert got["text"] == loaded.tokenizer.decode(tokens.tolist())
  assert got["text"].startswith("the cat") and got["text"].endswith(" mat")
  assert " sat on" in got["text"]
  assert got["prompt_tokens"] == len(ids) - 5 and got["tokens"] == 5
  start = len(encode("the cat", add_special=True))
  first = loaded.tokenizer.decode(tokens[start : start + 3].tolist())
  assert got["gaps"][0] == first and got["finish_reason"] == "filled"


def test_the_mask_need_not_be_the_tokenizer_s(places):
  """A converted model's mask is one beyond what its tokenizer knows."""
  loaded = load.load_model(places["all"])
  mask = loaded.diffusion.mask_id
  assert loaded.tokenizer.backend.id_to_token(mask) is None


@pytest.mark.slow
def test_a_prompt_may_stand_before_gaps(command):
  flags = "--block=4", "--temperature=1"
  got = told(command("all", *flags, "--prompt=the cat", "--infill= sat[[3]]."))
  whole = told(command("all", *flags, "--infill=the cat sat[[3]]."))
  assert got["gaps"] == whole["gaps"]
  assert whole["text"].replace("the cat", "", 1) == got["text"]
  assert got["text"].startswith(" sat")


@pytest.mark.slow
@pytest.mark.parametrize("more", WAYS, ids=" ".join)
@pytest.mark.sample(2, 1)
def test_several_texts_do_not_matter_to_each_other(command, more):
  """Though one of them makes the row as long again."""
  long = "[[4]] dog" + " the" * 80
  texts = "the cat [[3]] on the mat [[2]].", "a " + long, "a [[1]]"
  flags = "--block=4", "--temperature=1", *more
  rows = told(command("all", *flags, *[f"--infill={t}" for t in texts]))["rows"]
  assert [row["prompt"] for row in rows] == ["", "", ""]
  one = told(command("all", *flags, f"--infill={texts[0]}"))
  for field in ("text", "gaps", "tokens", "calls", "prompt_tokens"):
    assert one[field] == rows[0][field]
  assert [len(row["gaps"]) for row in rows] == [2, 1, 1]


@pytest.mark.slow
def test_steps_are_split_among_blocks(command):
  flags = "--plan=dream", "--block=16", "--steps=2"
  got = told(command("all", "--infill=the cat[[3]] sat[[2]]", *flags))
  assert got["text"].startswith("the cat") and " sat" in got["text"]
  assert got["calls"] == 2


def test_nothing_is_filled_before_all_is_right(command, monkeypatch):
  """The first has one block, which the steps suit, the second three."""
  monkeypatch.setattr(sampler, "sample", None)
  flags = "--block=4", "--steps=4", "--infill=a[[2]]", "--infill=a[[9]]"
  status, _, errors = command("all", *flags)
  assert status == 1 and "--steps=4: expected a multiple of the 3" in errors


def test_tokens_a_second_are_those_that_are_told(places, monkeypatch):
  """Not what is behind an end of a gap, nor what the first block filled."""
  loaded = load.load_model(places["all"])
  how = loaded.diffusion
  m, end, times = how.mask_id, how.end[0], itertools.count()
  clock = types.SimpleNamespace(perf_counter=lambda: next(times))
  monkeypatch.setattr(unmask_display, "time", clock)

  def changed(*given, sample=sampler.sample):
    got = sample(*given)
    tokens = got.tokens.copy()
    places = np.flatnonzero(got.filled[0] >= 0)
    tokens[0, places] = [5, end, 5, 5, 5, 5, end, 5]
    return dataclasses.replace(got, tokens=tokens)

  monkeypatch.setattr(sampler, "sample", changed)
  text = infilling.Text([5, *[m] * 4, 6, 6, *[m] * 4], 0, [(1, 5), (7, 11)])
  config = SamplerConfig(block=4)
  given = [text.ids], GREEDY, config
  [row], shared = diffusion.fill(loaded, how, *given, texts=[text])
  # One of the first gap, which the first block fills, and two of the second,
  # in the two seconds that two more blocks take.
  assert row["tokens"] == 3 and shared["tokens_per_s"] == 2 / 2


def test_what_is_streamed_of_a_gap_ends_where_it_does(places, capsys):
  loaded = load.load_model(places["all"])
  m, end = loaded.diffusion.mask_id, loaded.diffusion.end[0]
  text = infilling.Text([5, 6, *[m] * 4, 8, 9], 0, [(2, 6)])
  given = np.array([text.ids])
  state = sampler.begin(
    given, given == m, np.ones_like(given, bool), jax.random.key(0)
  )
  tokens = np.array([[5, 6, end, 10, 11, 12, 8, 9]])
  state = dataclasses.replace(
    state, tokens=tokens, masked=tokens < 0, filled=tokens * 0
  )
  for kept, want in (
    (lambda row: text.kept(row, (end,)), [5, 6, 8, 9]),
    (None, tokens[0].tolist()),
  ):
    unmask_display.UnmaskDisplay(loaded.tokenizer, [0], m, kept)(state)
    assert capsys.readouterr().out == loaded.tokenizer.decode(want)


@pytest.mark.slow
def test_an_end_within_a_gap_shortens_it(command, monkeypatch):
  """And what is behind it in the gap is no text."""
  kept = []

  def changed(*given, sample=sampler.sample):
    got = sample(*given)
    how = given[3]
    tokens = got.tokens.copy()
    kept.append(np.flatnonzero(got.filled[0] >= 0))
    tokens[0, kept[-1][1]] = how.end[0]
    return dataclasses.replace(got, tokens=tokens)

  full = told(command("all", "--infill=the cat[[4]] sat"))
  monkeypatch.setattr(sampler, "sample", changed)
  got = told(command("all", "--infill=the cat[[4]] sat"))
  assert got["tokens"] == 1 and full["tokens"] == 4
  assert got["text"] == "the cat" + got["gaps"][0] + " sat"


def test_what_is_drawn_and_shown(command, tmp_path):
  page = tmp_path / "a.html"
  status, lines, _ = command(
    "all", "--infill=the cat[[3]] sat", f"--html={page}"
  )
  streamed = "\n".join(lines[:-1])
  assert status == 0 and streamed == told((0, lines, ""))["text"]
  numbers = page.read_text("utf-8").split("filled = [")[1].split("]")[0]
  numbers = [int(n) for n in numbers.split(",")]
  assert sum(n >= 0 for n in numbers) == 3
  assert len(numbers) == told((0, lines, ""))["prompt_tokens"] + 3


# Mistakes --------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "arguments", "words"),
  [
    (
      "all",
      ["--infill=no gap"],
      "--infill=no gap: found no gap, expected [[N]",
    ),
    ("all", [r"--infill=\[[8]]"], "found no gap"),
    ("all", ["--infill=a [[0]]"], "found [[0]], expected [[N]] with N"),
    ("all", ["--infill=a [[x]] b"], "found [[x]], expected [[N]]"),
    ("all", ["--infill=a [[]] b"], "found [[]], expected [[N]]"),
    ("all", ["--infill=a [[8] b"], "found [[8] b, expected [[N]]"),
    ("all", ["--infill=a [[-3]] b"], "found [[-3]], expected [[N]]"),
    ("all", ["--infill=a[[1]]", "--nostop_early"], "--nostop_early: has no"),
    ("all", ["--infill=[[1]]", "--guidance=nan"], "--guidance=nan: expected"),
    ("all", ["--infill=[[1]]", "--guidance=inf"], "--guidance=inf: expected"),
    ("all", ["--infill=[[1]]", "--edit=nan"], "--edit=nan: expected a number"),
    ("all", ["--infill=[[1, 2]]"], "brackets that are text are written \\[["),
    ("all", ["--infill=a [[10000000]]"], "expected [[N]]"),
    ("all", ["--infill=a [[900000]]"], "the model's context of"),
    ("all", ["--infill="], "--prompt: is missing"),
    ("all", ["--infill=a[[1]]", "--max_new_tokens=9"], "whose gaps [[N]]"),
    ("all", ["--infill=a[[1]]", "--canvas=auto"], "lets the model"),
    ("all", ["--infill=a[[1]]", "--chat"], "--chat: answers a --prompt"),
    (
      "all",
      ["--infill=a[[1]]"] * 3 + ["--prompt=a", "--prompt=b"],
      "--prompt: found 2 for 3 of --infill",
    ),
    ("all", ["--infill=a[[9]]", "--block=4", "--steps=4"], "of the 3 blocks"),
    (
      "all",
      ["--infill=a[[1]]", "--infill=[[2]]", "--gif=a.gif"],
      "expected one",
    ),
    ("all", ["--infill=a[[1]]", "--sampler=autoregressive"], "is not for"),
    (TINY, ["--infill=a[[1]]"], "predicts the next token and has no mask"),
  ],
)
def test_errors(command, name, arguments, words):
  status, _, errors = command(name, *arguments)
  assert status == 1 and words in errors
  assert len(errors.splitlines()) <= 3 and "Traceback" not in errors


def test_the_mask_s_own_token_in_a_text():
  with pytest.raises(UserError, match="holds the mask's own token, id 9"):
    infilling.tokens(Words(), "a # [[2]]", 9, None)
  with pytest.raises(UserError, match="prompt 1 holds the mask, id 9"):
    infilling.tokens(Words(), "a [[2]]", 9, [1, 9])
