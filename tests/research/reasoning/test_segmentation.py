"""Steps are lossless, stable and never blank, in every convention."""

import hypothesis
import pytest
from hypothesis import strategies as st

from research.errors import UserError
from research.reasoning import SEGMENTERS, steps_of
from research.reasoning.segmentation import FENCES, Separator

PIECES = (
  *("\n", "\n\n", " ", "a", "b c", "ки", "ки\n", "<extra_0>", " \n\n\n\n\n"),
  *(" [PRM]", "Step 1:", "\nStep 2:", "\n## Step 3: x", ";", "; ", "1 = 2"),
  *("```", "$$", r"\[", r"\]", "[", "]", "\t", "é", "\u2028"),
)
TEXTS = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@hypothesis.settings(max_examples=100)
@hypothesis.given(text=TEXTS | st.text(max_size=30))
def test_steps_are_lossless_stable_and_never_blank(text):
  for name, segmenter in SEGMENTERS.items():
    steps = steps_of(segmenter, text)
    if not text.strip():
      assert steps == [], name
      continue
    assert "".join(steps) == text, name
    assert all(x.strip() for x in steps), name
    for step in steps:
      assert segmenter.split(step) == [(0, len(step))], (name, step)


SHEPHERD = "Step 1: 2 + 2 = 4 ки\nStep 2: 4 + 1 = 5 ки"
LLAMA = "## Step 1: Add\n2 + 2 = 4\n\nSo 4.\n\n## Step 2: End\n\\boxed{4}"


@pytest.mark.parametrize(
  ("name", "text", "expected"),
  [
    ("blank_line", "a\n\nb\nc\n\n", ["a\n\n", "b\nc\n\n"]),
    ("blank_line", "a\n\n\nb", ["a\n\n\n", "b"]),
    ("newline", "x = 1\ny = 2", ["x = 1\n", "y = 2"]),
    ("tag", SHEPHERD, [SHEPHERD[:21], SHEPHERD[21:]]),
    ("step_header", "Step 1: a\nb\nStep 2: c", ["Step 1: a\nb\n", "Step 2: c"]),
    ("step_header", "Hm.\nStep 1: a\nStep 2: c", None),
    ("llama_header", LLAMA, [LLAMA[: LLAMA.index("## Step 2")], None]),
    ("extra_0", "a<extra_0>b<extra_0>", ["a<extra_0>", "b<extra_0>"]),
    ("openr", "a \n\n\n\n\nb", ["a \n\n\n\n\n", "b"]),
    ("prm_tag", "a [PRM]\nb [PRM]", ["a [PRM]\n", "b [PRM]"]),
    ("tag", "a ки ки\nb ки\nки\n", ["a ки ки\n", "b ки\nки\n"]),
    ("extra_0", "a<extra_0><extra_0>b", ["a<extra_0><extra_0>", "b"]),
    ("openr", "a \n\n\n\n\n \n\n\n\n\nb", ["a" + " \n\n\n\n\n" * 2, "b"]),
    ("prm_tag", "a [PRM] [PRM]\nb [PRM]", ["a [PRM] [PRM]\n", "b [PRM]"]),
    ("semicolon", "3 + 4 = 7 ; 7 - 1 = 6 ;", ["3 + 4 = 7 ; ", "7 - 1 = 6 ;"]),
    ("whole", "a\n\nb", ["a\n\nb"]),
  ],
)
def test_conventions(name, text, expected):
  found = steps_of(SEGMENTERS[name], text)
  if expected is None:  # what stands before the first header joins it
    assert found == ["Hm.\nStep 1: a\n", "Step 2: c"]
  elif expected[-1] is None:
    assert found == [expected[0], text[len(expected[0]) :]]
  else:
    assert found == expected


def test_a_separator_is_some_text():
  with pytest.raises(UserError, match="matches an empty text"):
    Separator(r"\n*")


def test_a_separator_at_the_end_makes_no_empty_step():
  for n in range(1, 6):
    assert len(steps_of(SEGMENTERS["blank_line"], "a\n\nb" + "\n" * n)) == 2


def test_a_line_break_in_a_formula_opens_no_fence():
  text = r"\begin{align*} x&=1\\[4pt] y&=2 \end{align*}" + "\n\nb\n\nc"
  assert len(steps_of(SEGMENTERS["blank_line_fenced"], text)) == 3
  inside = "a\n\n\\[x\\\\]\n\ny\\]\n\nb"  # ends with \], not with \\]
  assert len(steps_of(SEGMENTERS["blank_line_fenced"], inside)) == 3


@pytest.mark.parametrize(("opening", "closing"), FENCES)
def test_a_fence_keeps_its_blank_lines(opening, closing):
  text = f"a\n\n{opening}x\n\ny{closing}\n\nb"
  assert len(steps_of(SEGMENTERS["blank_line"], text)) == 4
  found = steps_of(SEGMENTERS["blank_line_fenced"], text)
  assert found == ["a\n\n", f"{opening}x\n\ny{closing}\n\n", "b"]
  # One that never closes, as in a truncated text, reaches to its end.
  cut = text[: text.index(closing, 5)]
  assert len(steps_of(SEGMENTERS["blank_line_fenced"], cut)) == 2
