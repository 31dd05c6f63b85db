"""Texts with gaps on the command line."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import filling_gaps
from research.diffusion import sampler
from research.diffusion.candidates import Options
from research.diffusion.denoiser import Whole
from research.interop import load
from tests.experiments import filled
from tests.experiments.filled import TINY, told


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
  ],
)
def test_markers(text, parts):
  assert filling_gaps.parsed(text) == parts


def test_where_gaps_are():
  m = 9
  assert filling_gaps.gaps([m, m, 1, m], m) == [(0, 2), (3, 4)]
  assert filling_gaps.gaps([1, 2], m) == []


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
  options = Options(
    mask_id=how.mask_id, length=size, block=block, stop=False, end=end
  )
  state = sampler.begin(rows, rows == how.mask_id, valid, jax.random.key(0))
  asked = Whole(model=loaded.model, shift=how.shift, block=how.block)
  got = sampler.sample(asked, loaded.params, state, options)
  return got.tokens[0, : len(ids)], got


@pytest.mark.parametrize("name", ["all", "four"])
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


def test_a_prompt_may_stand_before_gaps(command):
  flags = "--block=4", "--temperature=1"
  got = told(command("all", *flags, "--prompt=the cat", "--infill= sat[[3]]."))
  whole = told(command("all", *flags, "--infill=the cat sat[[3]]."))
  assert got["gaps"] == whole["gaps"]
  assert whole["text"].replace("the cat", "", 1) == got["text"]
  assert got["text"].startswith(" sat")


def test_several_texts_do_not_matter_to_each_other(command):
  texts = "the cat [[3]] on the mat [[2]].", "[[4]] dog", "a [[1]]"
  flags = "--block=4", "--temperature=1", "--cache=dual"
  rows = told(command("all", *flags, *[f"--infill={t}" for t in texts]))["rows"]
  assert [row["prompt"] for row in rows] == ["", "", ""]
  one = told(command("all", *flags, f"--infill={texts[0]}"))
  for field in ("text", "gaps", "tokens", "calls", "prompt_tokens"):
    assert one[field] == rows[0][field]
  assert [len(row["gaps"]) for row in rows] == [2, 1, 1]


@pytest.mark.parametrize(
  "flags",
  [
    ["--guidance=1"],
    ["--policy=threshold:0.2", "--cache=vicinity:4"],
    ["--cache=delayed:3"],
    ["--plan=dream", "--block=16", "--steps=2"],
    ["--ends=last", "--edit=0.5"],
  ],
  ids=" ".join,
)
def test_ways_to_fill(command, flags):
  got = told(command("all", "--infill=the cat[[3]] sat[[2]]", *flags))
  assert got["text"].startswith("the cat") and " sat" in got["text"]
  assert got["calls"] >= 1 and got["tokens"] <= 5


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
  assert status == 0 and "".join(lines[:-1]).startswith("the cat")
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
    ("all", ["--infill=[[1, 2]]"], "brackets that are text are written \\[["),
    ("all", ["--infill=a [[10000000]]"], "expected [[N]]"),
    ("all", ["--infill=a [[900000]]"], "the model's context of"),
    ("all", ["--infill="], "--prompt: is missing"),
    ("all", ["--infill=a[[1]]", "--max_new_tokens=9"], "gaps say how many"),
    ("all", ["--infill=a[[1]]", "--canvas=auto"], "leave one of them out"),
    ("all", ["--infill=a[[1]]", "--chat"], "--chat: answers a --prompt"),
    (
      "all",
      ["--infill=a[[1]]"] * 3 + ["--prompt=a", "--prompt=b"],
      "--prompt: found 2 for 3 of --infill",
    ),
    ("all", ["--infill=a[[9]]", "--block=4", "--steps=4"], "of the 3 blocks"),
    ("all", ["--infill=a[[1]]", "--infill=[[2]]", "--gif=a.gif"], "shows one"),
    ("all", ["--infill=a[[1]]", "--sampler=autoregressive"], "is not for"),
    (TINY, ["--infill=a[[1]]"], "predicts the next token and has no mask"),
  ],
)
def test_errors(command, name, arguments, words):
  status, _, errors = command(name, *arguments)
  assert status == 1 and words in errors
  assert len(errors.splitlines()) <= 3 and "Traceback" not in errors


def test_the_mask_s_own_token_in_a_text():
  class Words:
    def encode(self, text, add_special=False):
      return [9 if word == "MASK" else 1 for word in text.split()]

  with pytest.raises(ValueError, match="holds the mask's own token, id 9"):
    filling_gaps.tokens(Words(), "a MASK [[2]]", 9, None)
