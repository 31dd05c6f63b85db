"""Extractors, against lm-evaluation-harness' filters and written cases."""

import functools
import json
import pathlib

import pytest

from research.reasoning import extraction

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "grading.json"


@functools.cache
def golden():
  """Returns what `make_grading.py` wrote: others' filters and graders."""
  return json.loads(GOLDEN.read_text("utf-8"))


@pytest.mark.parametrize("name", ["strict", "flexible"])
def test_gsm8k_filters_are_those_of_lm_eval(name):
  extract = getattr(extraction, f"gsm8k_{name}")
  values = golden()["gsm8k"]
  found = [extract(x) for x in values["texts"]]
  assert found == [None if x == "[invalid]" else x for x in values[name]]
  assert found.count(None) >= 2
  assert len(set(found)) > 4


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    (r"so \boxed{5}.", "5"),
    (r"\boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
    (r"\boxed{a{b{c}}d}", "a{b{c}}d"),
    (r"\boxed{1} or \boxed{2}", "2"),
    (r"$\fbox{x}$", "x"),
    (r"\boxed 5$ and 6", "5"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
    (r"\boxed {7}", "7"),
    (r"\boxed{}", None),
    (r"first \boxed{1}, then \boxed{2", None),
    (r"\boxed", None),
    (r"\boxedtext{5}", None),
    ("5", None),
    ("", None),
  ],
)
def test_boxed(text, expected):
  assert extraction.boxed(text) == expected


@pytest.mark.parametrize(
  ("extract", "text", "expected"),
  [
    ("answer_tag", "<answer>1</answer> no: <answer> 2 </answer>", "2"),
    ("answer_tag", "<answer>1", None),
    ("answer_tag", "<answer>1\n2</answer><answer>3", "1\n2"),
    ("answer_tag", "1</answer>", None),
    ("answer_phrase", "The answer is $7$. I hope so.", "7"),
    ("answer_phrase", "The answer is 3 or 4", "3 or 4"),
    ("answer_phrase", "Answer: 3\nFinal answer: 4.5.", "4.5"),
    ("answer_phrase", "The answer is **5**.", "5"),
    ("answer_phrase", "**The answer is $2*x$.**", "2*x"),
    ("answer_phrase", "The answer is $x^*$.", "x^*"),
    ("answer_phrase", "The answer is **$x^*$**.", "x^*"),
    ("answer_phrase", "The answer is 42. The answer isn't 41.", "42"),
    ("answer_phrase", "The answer is 42.\nThis answer issues from it.", "42"),
    ("answer_phrase", "The answer is42", "42"),
    ("answer_phrase", "my answer", None),
    ("answer_phrase", "the answer is ", None),
    ("boxed_or_phrase", r"The answer is 3, \boxed{4}", "4"),
    ("boxed_or_phrase", r"The answer is 3, \boxed{4", None),
    ("boxed_or_phrase", "The answer is 3.", "3"),
    ("boxed_or_hash", r"#### 3 \boxed{4}", "4"),
    ("boxed_or_hash", "#### 3", "3"),
    ("whole", "  3 ", "3"),
    ("whole", "  ", None),
  ],
)
def test_other_extractors(extract, text, expected):
  assert getattr(extraction, extract)(text) == expected


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    # Ways to say it.
    ("The answer is\n5", "5"),
    ("So the answer is:\n\n5\n\nDone.", "5"),
    ("Answer = 5", "5"),
    ("answer: 5", "5"),
    ("Answer:\n5", "5"),
    ("The answer equals 5.", "5"),
    ("The answer should be 5.", "5"),
    ("The answers are 3 and 4.", "3 and 4"),
    ("The answer to the question is 5.", "5"),
    ("The answer is therefore 5.", "5"),
    ("**Answer**: 5", "5"),
    ("**Answer:** 5", "5"),
    ("### Final answer\n\n5", "5"),
    ("The answer is:\n- 5", "5"),
    ("The answer is -5", "-5"),
    ("The answer is\n-5", "-5"),
    # Formulas.
    ("The answer is\n$$5$$", "5"),
    ("The answer is\n\\[\n\\frac{1}{2}.\n\\]\nDone.", r"\frac{1}{2}"),
    (r"The answer is \(5\).", "5"),
    ("The answer is $5$ dollars.", "5 dollars"),
    (r"The answer is $(-\infty, 3)$, I think.", r"(-\infty, 3)"),
    # What follows it.
    ("The answer is 5, I think.", "5"),
    ("The answer is 5, right?", None),
    ("The answer is 5 because 2+3=5.", "5"),
    ("The answer is 5, since 2+3 is.", "5"),
    ("The answer is 5, not 6.", "5"),
    ("The answer is $x+1$, where $x$ is real.", "x+1"),
    ("The answer is 5.\nLet me check: 7.", "5"),
    # What belongs to it.
    ("The answer is 1,234.", "1,234"),
    ("The answer is 5.5.", "5.5"),
    ("The answer is (1, 2).", "(1, 2)"),
    ("The answer is 3, 4.", "3, 4"),
    ("The answer is Tuesday, March 5.", "Tuesday, March 5"),
    ("The answer is I, II and IV.", "I, II and IV"),
    ("The answer is 5!", "5!"),
    ("The answer is right.", "right"),
    # A hedge stays one, and so no grader accepts it.
    ("The answer is $3$ or $4$.", "3 or 4"),
    ("The answer is 5, I think, or 6.", "5, I think, or 6"),
    ("The answer is A, I think, or B.", "A, I think, or B"),
    ("The answer is 5, but it may be 6.", "5, but it may be 6"),
    # Phrases that name none.
    ("The answer is not 5.", None),
    ("If x were 1, the answer would be 5.", None),
    ("Could it be that the answer is 5? No.", None),
    ("The answer is 3. Is the answer to this is 4? No.", "3"),
    ("The answer is 3. The answer is not 4.", "3"),
    ("The answer is 3. If it were odd, the answer would be 4.", "3"),
    ("The answer is 5. The answer is correct.", "5"),
    ("Answer this: no", None),
  ],
)
def test_natural_phrases(text, expected):
  assert extraction.answer_phrase(text) == expected


def test_hostile_lengths_take_linear_time():
  """A million characters a pattern; quadratic time would be hours."""
  n = 1_000_000
  assert extraction.answer_tag("<answer>" * (n // 8)) is None
  assert extraction.boxed(r"\boxed{" * (n // 7)) is None
  assert extraction.answer_phrase("answer is" + " " * n + "x") == "x"
  assert extraction.answer_phrase("answer is? " * (n // 11)) is None
  assert extraction.answer_phrase(r"answer is \[? " * (n // 14)) is None
  assert extraction.answer_phrase("answer to a " * (n // 12)) is None
  assert extraction.answer_phrase("answer is 5" + ", because x" * n) == "5"
  assert extraction.gsm8k_flexible("-" * n) is None


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("The sum of 82 and 1 is 83.", "83"),
    ("so 1,234,567.", "1234567"),
    ("-4, or 3.50", "3.50"),
    ("it is -4.", "-4"),
    ("it is −4.", "-4"),
    ("it is .25.", ".25"),
    ("or -.5", "-.5"),
    ("section a.5", "5"),
    ("in 10-15 days", "15"),
    ("f(3)-2", "2"),
    ("by 10%-15%", "15"),
    ("20°-25°", "25"),
    ("x^{2}-5", "5"),
    ("it is -5%", "-5"),
    ("{-5}", "-5"),
    ("x=-3", "-3"),
    ("(-3)", "-3"),
    ("nothing", None),
  ],
)
def test_the_last_number_is_one(text, expected):
  assert extraction.last_number(text) == expected
