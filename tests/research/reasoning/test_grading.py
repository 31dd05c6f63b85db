r"""Graders against PRM800K's, lm-evaluation-harness', sympy and Fractions.

`golden/grading.json` has the verdicts of the first two. Where the ladder
differs from PRM800K's grader it is on purpose, and `DIFFERENT` lists all pairs.
"""

import fractions
import functools
import random

import hypothesis
import pytest
from hypothesis import strategies as st

from research.reasoning import (
  ExactMatch,
  Ladder,
  MathVerify,
  extraction,
  judge,
  rates,
)
from research.reasoning import expressions as ex
from research.reasoning.normalization import canonical, normalize
from research.reasoning.worker import _answer
from tests.research.reasoning.test_extraction import golden

LADDER = Ladder()
MATH_VERIFY = MathVerify(seconds=20)


def test_exact_match_is_lm_evals():
  metric = golden()["gsm8k"]["exact_match"]
  grader = ExactMatch()
  assert sum(x for *_, x in metric) > 5
  for truth, given, score in metric:
    assert grader.equal(truth, given) == bool(score), (truth, given)


def both(a, b, equal):
  """Returns our verdict on a pair, in either order."""
  return {(a, b): equal, (b, a): equal}


HALF = "\\frac{x+1}{2}"
DIFFERENT = {
  # A name before a value goes, however the value is written.
  **both("x=3", "3.0", True),
  **both("x=3", "3.", True),
  **both("x=3", "03", True),
  **both("x=3", "$3$", True),
  # Theirs drops the space of 7 3/4 before it looks for mixed numbers.
  **both("7 3/4", "73/4", False),
  **both("3 million", "3000000", True),
  **both("3 million", "3,000,000", True),
  # Theirs reads a numerator of two terms without its brackets.
  **both(HALF, "(x+1)/2", True),
  **both(HALF, "x/2+1/2", True),
  **both(HALF, "\\frac{1+x}{2}", True),
  **both("\\frac{1+x}{2}", "(x+1)/2", True),
  **both("\\frac{1+x}{2}", "x/2+1/2", True),
  **both(HALF, "x+1/2", False),
  # Of three answers two would be equal to the third, and not to each other.
  **both("6/2", "2+1", False),
  **both("0.5", "2/4", False),
  **both(".5", "2/4", False),
  # Theirs asks sympy for no power in brackets.
  **both("\\sqrt{2}", "2^{1/2}", True),
  **both("\\sqrt2", "2^{1/2}", True),
  **both("sqrt(2)", "2^{1/2}", True),
  # A list without brackets has no order.
  **both("3 or 4", "4 or 3", True),
  **both("3,4", "4 or 3", True),
  # Nothing is no answer.
  ("", ""): False,
}


def test_the_ladder_is_prm800ks_but_for_what_is_listed():
  pairs = golden()["prm800k"]
  assert len(pairs) > 500
  assert 0.2 < sum(x for *_, x in pairs) / len(pairs) < 0.6

  found = {
    (truth, given): ours
    for truth, given, theirs in pairs
    if (ours := LADDER.equal(truth, given)) != theirs
  }
  assert found == DIFFERENT


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    (r"\text{Monday}", "monday"),
    ("5 cm", "5"),
    (r"5\text{ cm}^2", "5"),
    (r"5\text{ meters}", "5"),
    (r"5 \text{ square feet}", "5"),
    (r"12\mbox{ inches}^2", "12"),
    (r"\frac{3}{4}\text{ hours}", "3/4"),
    (r"3.5\text{ million dollars}", "3500000"),
    ("1,200 million", "1200000000"),
    ("3/4 million", "3/4million"),
    ("3 million,4 million", "3000000,4000000"),
    ("$5$", "5"),
    (r"10\%", "10"),
    ("1,234,567", "1234567"),
    ("1,23", "1,23"),
    ("(1,234)", "(1,234)"),
    (r"\dfrac{1}{2}", "1/2"),
    (r"\frac12", "1/2"),
    (r"\frac1{72}", "1/72"),
    (r"\frac{x+1}{2}", "(x+1)/2"),
    (r"\frac{\frac12}{3}", "(1/2)/3"),
    (r"x\frac{1}{2}", "x(1/2)"),
    (r"x^2\frac{1}{2}", "x^2(1/2)"),
    (r"2^{10}\frac{1}{2}", "2^10(1/2)"),
    (r"1.5\frac{1}{2}", "1.5(1/2)"),
    (r"\frac{2}{3}\frac{4}{5}", "2/3(4/5)"),
    (r"12\frac{3}{4}", "12+3/4"),
    ("3 4", "3,4"),
    (r"1 \quad 2", "1,2"),
    ("12 000", "12000"),
    ("1 234 567", "1234567"),
    ("1 234 5", "1,234,5"),
    ("7 3/4", "7+3/4"),
    (r"7\frac{3}{4}", "7+3/4"),
    ("-7 3/4", "-(7+3/4)"),
    ("8-7 3/4", "8-(7+3/4)"),
    ("8 - 7 3/4", "8-(7+3/4)"),
    ("8+7 3/4", "8+7+3/4"),
    ("3 million", "3000000"),
    ("2.5 billion", "2500000000"),
    ("1 trillion", "1000000000000"),
    ("3.0", "3"),
    ("007", "7"),
    ("+7", "7"),
    (r"(3,+\infty)", "(3,inf)"),
    ("+", "+"),
    ("1e3", "1000"),
    ("1.5e2", "150"),
    ("1.55e1", "1.55e1"),
    ("x = 5", "5"),
    ("A or B", "a,b"),
    (r"\sqrt{2}", "sqrt(2)"),
    (r"\sqrt2", "sqrt(2)"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    (r"x^{10}", "x^10"),
    (r"x^{-1}y^{ 2 }", "x^-1y^2"),
    (r"f^{\prime}", r"f^\prime"),
    (r"x^{n^{2}+1}", "x^(n^2+1)"),
    (r"x^{(n+1)}", "x^(n+1)"),
    (r"x^{\frac{1}{2}}", "x^(1/2)"),
    (r"\sqrt[3]{x}", r"\sqrt[3]x"),
    (r"\sqrt[3]{x+1}", r"\sqrt[3](x+1)"),
    (r"\left( 1, 2 \right]", "(1,2]"),
    (r"2\cdot\pi", "2*pi"),
    ("", ""),
    (r"\frac", r"\frac"),
    (r"\frac{1}", r"\frac1"),
  ],
)
def test_normalize(text, expected):
  assert normalize(text) == expected


@pytest.mark.parametrize(
  ("truth", "given", "expected"),
  [
    ("2^{n+1}", "2^n+1", False),  # 4 and 3 for n = 1
    ("2^{n+1}", "2^(n+1)", True),
    ("x^{2y}", "x^2y", False),
    ("x^2y", "x^{2}y", True),
    (r"\frac{3}{4}", "3^{1/2}/2", False),  # the root of the truth
    (r"\sqrt[3]{x+1}", r"\sqrt[3]{x}+1", False),
  ],
)
def test_what_braces_group_stays_together(truth, given, expected):
  assert LADDER.equal(truth, given) == expected


@pytest.mark.parametrize(
  ("truth", "given", "expected"),
  [
    ("5", "(5)", True),
    ("5", "[5]", True),
    (r"\text{(A)}", "A", True),
    ("B", r"\textbf{(B)}", True),
    ("3/2", "(3/2)", True),
    ("1,2", "(1,2)", False),
    ("(1,2)", "[1,2]", False),
    ("5", "(6)", False),
  ],
)
def test_brackets_around_a_single_answer_do_not_count(truth, given, expected):
  """PRM800K's grader compares brackets of several elements alone."""
  assert LADDER.equal(truth, given) == LADDER.equal(given, truth) == expected
  same = LADDER.canonical(truth) == LADDER.canonical(given)
  assert same == expected


PIECES = (
  *("1", "23", "0", ",", ".", " ", "-", "/", "(", ")", "[", "]", "{", "}", "$"),
  *(r"\frac", r"\sqrt", r"\text{", "cm", "x", "=", " or ", "million", "%"),
  *("+", r"\left", r"\pi", "^", r"\circ", "days", "\\", r"\!", "3/4", ",234"),
)


@hypothesis.settings(max_examples=100)
@hypothesis.given(text=st.lists(st.sampled_from(PIECES)).map("".join))
def test_normal_forms_stay_what_they_are(text):
  found = normalize(text)
  assert normalize(found) == found
  assert canonical(canonical(found)) == canonical(found)


def test_equal_votes_have_equal_verdicts():
  """So it does not matter which of a group's answers is graded."""
  pool = [
    *("3", "3.0", "6/2", "2+1", "1/2", "2/4", "0.5", "50/100", "(1,2)"),
    *("(1, 2.0)", "[1,2]", "x", "1,2", ".25", "1/4", "-3", "7 3/4", "7.75"),
  ]
  truths = [x for x in pool if x not in ("6/2", "2/4", "50/100")]
  groups = {}
  for x in pool:
    groups.setdefault(LADDER.canonical(x), []).append(x)
  assert max(map(len, groups.values())) > 1
  for group in groups.values():
    for truth in truths:
      assert len({LADDER.equal(truth, x) for x in group}) == 1, (truth, group)


def test_equal_votes_have_equal_verdicts_of_math_verify():
  groups = [
    *(["10", "10.0", "$10$", "x=10"], ["3", "3.0", "6/2", "3.", "1+2=3"]),
    *(["0.1", "1/10", "2/20", "10%", r"10\%"], [r"3\approx 4"], ["4=3"]),
    *(["3 million", "3000000", "3,000,000"], ["1200", "1,200"]),
    *(["31/4", "7.75", r"7\frac{3}{4}", "7 3/4"], ["2<x", "x>2"]),
  ]
  votes = [{MATH_VERIFY.canonical(x) for x in group} for group in groups]
  assert list(map(len, votes)) == [1] * len(groups)
  assert len(set.union(*votes)) == len(groups)
  for truth in ("10", "0.1", "3", "3000000", r"\frac{31}{4}", "1200"):
    for group in groups:
      verdicts = {MATH_VERIFY.equal(truth, x) for x in group}
      assert len(verdicts) == 1, (truth, group)


def tree(rng, depth):
  """Returns an expression and its exact value, None for a division by zero."""
  if depth == 0:
    n = rng.randint(0, 9)
    return str(n), fractions.Fraction(n)
  (a, x), (b, y) = tree(rng, depth - 1), tree(rng, rng.randrange(depth))
  sign = rng.choice("+-*/")
  if x is None or y is None or (sign == "/" and y == 0):
    return f"({a}){sign}({b})", None
  value = {"+": x + y, "-": x - y, "*": x * y}.get(sign)
  return f"({a}){sign}({b})", x / y if sign == "/" else value


def test_rational_is_exact():
  rng = random.Random(0)
  found = [tree(rng, 3) for _ in range(80)]
  assert sum(x is None for _, x in found) > 3
  for text, value in found:
    assert ex.rational(text) == value, text


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("2^3^2", 512),
    ("-2^2", -4),
    ("2-3-4", -5),
    ("12/3/2", 2),
    ("2(3+1)", 8),
    ("(1+1)(2+2)", 8),
    ("1/2(3)", fractions.Fraction(3, 2)),
    ("2/3(4/5)", fractions.Fraction(8, 15)),
    ("--3", 3),
    ("2^-1", fractions.Fraction(1, 2)),
    ("sqrt(9/4)", fractions.Fraction(3, 2)),
    ("sqrt(2)", None),
    ("sqrt(0-4)", None),
    ("0.1+0.2", fractions.Fraction(3, 10)),
    ("1/0", None),
    ("0^-1", None),
    ("9^9^9", None),
    ("(" * 200 + "1" + ")" * 200, None),
    ("1" * 500, None),
    ("x", None),
    ("1+", None),
    ("", None),
    ("1)", None),
    ("(1", None),
    ("sqrt 4", None),
    ("__import__('os')", None),
    ("1;2", None),
  ],
)
def test_rational_of_written_expressions(text, value):
  assert ex.rational(text) == value


@pytest.mark.parametrize(
  ("truth", "given", "expected"),
  [
    ("x+1", "1+x", True),
    ("(x+1)^2", "x^2+2x+1", True),
    (r"\sqrt{8}", r"2\sqrt{2}", True),
    (r"\frac{\pi}{2}", r"0.5\pi", True),
    ("x+1", "x+2", False),
    ("xyz", "zyx", False),  # three letters may be a word
    (r"2^{100}x", r"x\cdot 2^{100}", True),
    (r"\sqrt{x^2}", "x", False),  # not where x is negative
    (r"\frac{x}{\sqrt{x}}", r"\sqrt{x}", True),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}", True),
    (r"\sin(x)^2+\cos(x)^2+x", "x+1", True),
    (r"\tan(\frac{\pi}{3})", r"\sqrt3", True),
    ("1", "1+10^{-20}", False),
    (r"\sqrt2", "1.41421356237309504880", False),
    ("monday", "dynamo", False),
    (r"(\sqrt2,\frac{\pi}{2})", r"(2^{1/2},0.5\pi)", True),
    ("(0,1)∪(2,3)", "(2,3)∪(0,1)", True),
    ("9^{9^{9^9}}x", "x", False),  # at once
    ("3", "2+1", False),  # an integer must be given as one
  ],
)
def test_values_decide_what_remains(truth, given, expected):
  assert LADDER.equal(truth, given) == expected


@pytest.mark.parametrize("seed", range(8))
def test_expressions_are_equal_where_sympy_says_so(seed):
  """Random ones, expanded, factored and perturbed by sympy."""
  sympy = pytest.importorskip("sympy")
  rng = random.Random(seed)
  x, y = sympy.symbols("x y")

  def build(depth):
    if depth == 0:
      return rng.choice([x, y, sympy.Integer(rng.randint(1, 9)), sympy.pi])
    a, b = build(depth - 1), build(rng.randrange(depth))
    return rng.choice([a + b, a - b, a * b, a / (b**2 + 1), a**2])

  for _ in range(5):
    a = build(3) + x
    for b in (sympy.expand(a), sympy.factor(a), a + 1, -a):
      same = sympy.simplify(a - b) == 0
      texts = [str(e).replace("**", "^") for e in (a, b)]
      assert LADDER.equal(*texts) == same, texts


MATH_VERIFY_DIFFERS = {
  # It reads no number with a full stop, or as a text, within a box.
  *("3.", "18.", r"\text{3}"),
  # It searches for the truth in an equation or an approximation, drops a
  # percent sign, and takes a pair for a set.
  *("3+4=8", r"3\approx 4", "4=3", "10", "(1,2)"),
}


def test_the_table_of_pairs_is_math_verifys():
  package = pytest.importorskip("math_verify")
  config = [package.LatexExtractionConfig(boxed_match_priority=0)]

  @functools.cache
  def parsed(text):
    return package.parse(f"\\boxed{{{text}}}", config, parsing_timeout=None)

  def accepts(*pair):
    return package.verify(*map(parsed, pair), timeout_seconds=None)

  equal, different = rates.pairs()
  wrong = [x for x in equal if not (accepts(*x) or accepts(*x[::-1]))]
  wrong += [x for x in different if accepts(*x)]
  assert {x for x in wrong if not MATH_VERIFY_DIFFERS & set(x)} == set()


@pytest.mark.parametrize("grader", [LADDER, MATH_VERIFY])
def test_grading_and_votes_are_one_equivalence(grader):
  equal, different = rates.pairs()
  for truth, given in (equal + different)[::7]:
    same = grader.canonical(truth) == grader.canonical(given)
    assert grader.equal(truth, given) == same, (truth, given)
    assert grader.equal(given, truth) == same, (truth, given)


@pytest.mark.parametrize(
  ("truth", "given", "expected"),
  [
    ("1/2", r"\frac{2}{4}", True),
    ("0.1", r"10\%", True),
    ("5", r"5 \text{ cm}", True),
    (r"\sqrt{8}", r"2\sqrt{2}", True),
    ("(1,2)", "(1, 2)", True),
    ("3", "4", False),
    ("3", "3 or 4", False),
    ("3", r"3 \text{ or } 4", False),
    ("3", "3; 4", False),
    ("3", "x = 3", True),
    ("3", "f(x) = 3", True),
    ("3", "4 = 3", False),
    ("3", "x = 4 = 3", False),
    ("x = 3", "3 = x", True),
    ("3", r"\frac{", False),
  ],
)
def test_math_verify_behind_one_answer(truth, given, expected):
  assert MATH_VERIFY.equal(truth, given) == expected


def test_math_verify_alone_accepts_a_hedge():
  """Why an answer is extracted first (math-verify 0.9, on whole texts)."""
  math_verify = pytest.importorskip("math_verify")
  text = "The answer is 3 or 4"
  parsed = [math_verify.parse(x, parsing_timeout=None) for x in ("$3$", text)]
  assert math_verify.verify(*parsed, timeout_seconds=None)
  found = judge(text, "3", extraction.answer_phrase, MATH_VERIFY)
  assert (found.correct, found.extracted) == (False, "3 or 4")


@pytest.mark.parametrize("grader", [ExactMatch(), LADDER, MATH_VERIFY])
def test_model_text_is_never_run(grader, tmp_path):
  file = tmp_path / "ran"
  code = f"__import__('pathlib').Path({str(file)!r}).touch()"
  for text in (
    code,
    f"1+{code}",
    f"\\text{{{code}}}",
    f"x=[{code}]",
    f"({code})",
  ):
    for answer in (
      text,
      text.replace("_", r"\_"),
      text.replace("(", "\\left("),
    ):
      assert not grader.equal("1", answer)
      grader.canonical(answer)
  assert not file.exists()


def test_judge():
  def verdict(text, truth="3", grader=LADDER):
    return judge(text, truth, extraction.boxed, grader)

  assert verdict(None).reason == verdict("3").reason == "no answer"
  assert verdict("3").canonical is None
  found = verdict(r"\boxed{3.0}")
  assert (found.correct, found.extracted, found.canonical) == (True, "3.0", "3")
  assert verdict(r"\boxed{4}").reason == "wrong"
  assert not verdict(r"\boxed{3}", truth=None).correct
  hang = MathVerify(seconds=1e-6)
  found = verdict(r"\boxed{x+2}", "x+1", hang)
  assert found.reason.startswith("timeout: more than 1e-06 s")
  assert (found.correct, found.canonical) == (False, LADDER.canonical("x+2"))
  assert not verdict(r"\boxed{log(0)/log(0)x}", "x").correct


def test_the_worker_answers_in_json():
  assert _answer(ex, '{"call": "rational", "args": ["x"]}') == {"value": None}
  assert "ValueError" in _answer(ex, "{")["error"] or "JSON" in str(
    _answer(ex, "{")
  )
  nan = _answer(__import__("math"), '{"call": "log", "args": [0]}')
  assert nan["error"].startswith("ValueError")
