r"""The conservative ladder that makes of an answer the form it is compared in.

It follows the grader of PRM800K (Lightman et al. 2023, arXiv:2305.20050;
github.com/openai/prm800k): units, currency and LaTeX's ways of writing one
thing go; what could change the value stays. It differs where that grader errs:
a comma within brackets separates, as does a space between two numbers;
`\frac{x+1}{2}` keeps its numerator together and `2^{n+1}` its exponent; 7 3/4
is not 73/4, -7 3/4 is below -7, and 3 million is 3000000.
"""

import itertools
import re
from collections.abc import Callable
from fractions import Fraction

from research.reasoning import expressions, values

MAX_LENGTH = 2000
"""Characters of an answer at most; a longer one is compared as it is."""

_PASSES = 5
"""What one step of the ladder lays bare another may have to remove."""

_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*(?=\{)")
_GROUPED = re.compile(r"(?:\^|\\sqrt *\[[^][]*\]) *(?=\{)")
_ATOM = re.compile(
  r"(?:-? *(?:\d+(?:\.\d+)?|[A-Za-z]|\\[A-Za-z]+)|\([^()]*\))?"
)
_SPACES = re.compile(r"\\[!,;: ]|\\quad|\\qquad|~")
_UNITS = (
  "centimeters?|cm|kilometers?|km|meters?|miles?|degrees?|seconds?|minutes?"
  "|hours?|days?|weeks?|months?|years?|foot|feet|inch(?:es)?|yards?|dollars?"
  "|cents?|units?|points?"
)
_UNIT = re.compile(
  rf"(?<=[\d)}}])[ {{]*(?:square +|cubic +)?\b(?:{_UNITS})\b"
  rf"(?:[ }}]*\^ *\{{?\d\}}?)?"
  rf"|(?<=\d)(?:cm|km)\b(?: *\^ *\{{?\d\}}?)?"
)
_SCALES = {"million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALED = re.compile(
  r"(?<![\d./])(\d+(?:\.\d+)?)[ {]*(million|billion|trillion)\b"
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_SPACED = re.compile(
  r"(?<![\d.,/] )(?<![\d.,/])\d{1,3}(?: \d{3})+(?![\d.,/]| \d)"
)
_NEIGHBOURS = re.compile(r"(?<=\d) +(?=\d)")
_MIXED = re.compile(r"(-?) *(?<![\d./])(\d+) +(\d+/\d+)(?![\d/])")
_FLOAT = re.compile(r"(-?\d+)\.0*")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?e\+?\d{1,2}")
_INTEGER = re.compile(r"-?\d+")
_FRACTION = re.compile(r"-?\d+/0*[1-9]\d*")
_NAMED = re.compile(r"[a-z]{1,2} *= *(?=[^=]+$)")
_SYMBOLS = {
  r"\cdot": "*",
  r"\times": "*",
  r"\div": "/",
  r"\pi": "pi",
  r"\infty": "inf",
  r"\cup": "∪",
  r"\pm": "±",
  **{rf"\{x}": x for x in ("sin", "cos", "tan", "log", "ln")},
  "×": "*",
  "·": "*",
  "−": "-",
  "π": "pi",
  "∞": "inf",
}
_WORD = re.compile(r"(?!sqrt|log|sin|cos|tan|inf)(?<![a-z])[a-z]{3,}")
_OPEN, _CLOSE = "([", ")]"


def normalize(text: str) -> str:
  """Returns the form of an answer in which it is compared.

  `normalize(normalize(x)) == normalize(x)`, so stored forms stay what they are.
  """
  if len(text) > MAX_LENGTH:
    return text.strip()
  for _ in range(_PASSES):
    before, text = text, _once(text)
    if text == before:
      break
  return text


def _once(text: str) -> str:
  out = _plain(text.strip())
  out = _NAMED.sub("", out, count=1) if _NAMED.match(out) else out
  out = _SCALED.sub(_scaled, _thousands(out))
  out = _mixed(_UNIT.sub("", out))
  out = re.sub(r"\s+", " ", re.sub(r"[{}]", "", out))
  out = _SPACED.sub(lambda x: x[0].replace(" ", ""), out)
  # 3 4 is two answers, not 34.
  out = _NEIGHBOURS.sub(",", out).replace(" ", "")
  return ",".join(_number(x) for x in out.split(","))


def elements(normalized: str) -> tuple[str, list[str]]:
  """Returns the brackets around an answer and the elements between them.

  `"(1,2]"` gives `("(]", ["1", "2"])`; a list without brackets gives none, and
  brackets around a single element do not count: `(B)` is B.
  """
  inner = normalized[1:-1]
  if (
    len(normalized) > 2
    and normalized[0] in _OPEN
    and normalized[-1] in _CLOSE
    and _balanced(inner)
  ):
    parts = _outside(inner, ",")
    around = normalized[0] + normalized[-1] if len(parts) > 1 else ""
    return around, parts
  return "", _outside(normalized, ",")


def _outside(text: str, separator: str) -> list[str]:
  """Returns the parts between separators that are outside of brackets."""
  if not _balanced(text):
    return [text]
  parts, depth = [""], 0
  for character in text:
    depth += (character in _OPEN) - (character in _CLOSE)
    if character == separator and not depth:
      parts.append("")
    else:
      parts[-1] += character
  return parts


def _balanced(text: str) -> bool:
  """Whether each bracket has its other half, of whichever shape."""
  depths = list(
    itertools.accumulate((x in _OPEN) - (x in _CLOSE) for x in text)
  )
  return not depths or (min(depths) >= 0 and depths[-1] == 0)


def is_integer(normalized: str) -> bool:
  """Whether an element is an integer, digit by digit."""
  return _INTEGER.fullmatch(normalized) is not None


def is_fraction(normalized: str) -> bool:
  """Whether an element is one integer over another."""
  return _FRACTION.fullmatch(normalized) is not None


def has_word(normalized: str) -> bool:
  """Whether three letters or more stand together: no product, as in Monday."""
  return _WORD.search(normalized) is not None


def canonical(normalized: str) -> str:
  """Returns the form that equal answers share, and no others.

  An integer must be given as one and a fraction as the same fraction: 2+1 and
  6/2 are not 3, and 2/4 is not 1/2, as PRM800K's grader has it. What is equal
  for other reasons is one: 0.5 and 1/2, x+1 and 1+x. Lists without brackets and
  unions of intervals have no order.
  """
  intervals = _outside(normalized, "∪")
  if len(intervals) > 1:
    return "∪".join(sorted(map(canonical, intervals)))
  around, inner = elements(normalized)
  forms = [
    canonical(x) if "," in x and x != normalized else _canonical(x)
    for x in inner
  ]
  if not around:
    forms.sort()
  return around[:1] + ",".join(forms) + around[1:]


def _canonical(element: str) -> str:
  if is_integer(element) or is_fraction(element) or has_word(element):
    return element
  try:
    tree = expressions.parse(element)
    value = expressions.value_of(tree)
  except (expressions.NotAnExpression, ZeroDivisionError):
    return element
  if value is not None:  # 3/1 is no integer as it is written
    return f"{value.numerator}/{value.denominator}"
  points = values.at_points(tree)
  letters = "".join(values.names(tree))
  if len(letters) == 1:
    alone = values.at_points(expressions.parse(letters))
    return letters if points == alone else points or element
  return points or element


def _plain(text: str) -> str:
  """Removes LaTeX, and lower-cases what is left."""
  text = text.replace("\\%", "%").replace("\\$", "$")
  text = re.sub(r"\\[()\[\]]|[$%]", "", text)
  text = re.sub(r"\\(?:left|right|big|Big)(?![A-Za-z])", "", text)
  text = text.replace("{,}", ",").replace(",\\!", ",")
  text = _TEXT.sub("", _SPACES.sub(" ", text))
  text = re.sub(r"\^ *\{? *\\circ *\}?|°", "", text)
  text = _grouped(text)
  text = re.sub(r"\\[dtc]frac", r"\\frac", text)
  text = _macro(text, "frac", 2, _frac)
  text = _macro(text, "sqrt", 1, lambda before, x: f"sqrt({x})")
  for name, plain in _SYMBOLS.items():
    text = text.replace(name, plain)
  text = text.replace("\\{", "{").replace("\\}", "}")
  text = re.sub(r"\b(?:or|and)\b", ",", text.lower())
  text = re.sub(r"- +", "-", text)
  return re.sub(r"\.$", "", text.strip())


def _grouped(text: str) -> str:
  r"""Brackets an exponent of several parts, and what `\sqrt[n]` is taken of."""
  at = 0
  while match := _GROUPED.search(text, at):
    at = match.end()
    inner, end = _argument(text, at)
    if inner is not None:
      made = inner if _ATOM.fullmatch(inner) else f"({inner})"
      text = text[:at] + made + text[end:]
  return text


def _macro(text: str, name: str, count: int, build: Callable[..., str]) -> str:
  r"""Replaces `\name{a}{b}` by `build(text before, a, b)`, innermost last."""
  pattern = re.compile(rf"\\{name}(?![A-Za-z])")
  # A macro without its arguments stays, so there is an end to the search.
  at = 0
  while match := pattern.search(text, at):
    arguments, end = [], match.end()
    for _ in range(count):
      argument, end = _argument(text, end)
      arguments.append(argument)
    if None in arguments:
      at = match.end()
      continue
    before = text[: match.start()]
    made = build(before, *arguments)
    text, at = before + made + text[end:], match.start()
  return text


def _argument(text: str, at: int) -> tuple[str | None, int]:
  """Returns a macro's argument at a position, and where it ends."""
  while at < len(text) and text[at] == " ":
    at += 1
  if at >= len(text) or text[at] in "}\\[":
    return None, at
  if text[at] != "{":
    return text[at], at + 1
  depth = 0
  for i in range(at, len(text)):
    depth += {"{": 1, "}": -1}.get(text[i], 0)
    if not depth:
      return text[at + 1 : i].strip(), i + 1
  return None, at


def _frac(before: str, top: str, bottom: str) -> str:
  """Returns a fraction, in brackets where it would read as something else."""
  simple = re.compile(r"-?\d+|[A-Za-z]")
  parts = [x if simple.fullmatch(x) else f"({x})" for x in (top, bottom)]
  made, last = "/".join(parts), before.rstrip()[-1:]
  if re.search(r"(?<![\d.^/])\d+ *$", before):  # 7\frac{3}{4} is a mixed number
    return f" {made}"
  product = last and (last.isalnum() or last in ")^/")
  return f"({made})" if product else made


def _scaled(match: re.Match) -> str:
  number = Fraction(match[1]) * _SCALES[match[2]]
  return str(number) if number.denominator == 1 else match[0]


def _thousands(text: str) -> str:
  """Removes well-formed commas of thousands, but not those in brackets."""
  out, depth, at = [], 0, 0
  for match in _THOUSANDS.finditer(text):
    part = text[at : match.start()]
    depth += sum(part.count(x) for x in _OPEN)
    depth -= sum(part.count(x) for x in _CLOSE)
    number = match[0] if depth > 0 else match[0].replace(",", "")
    out += [part, number]
    at = match.end()
  return "".join([*out, text[at:]])


def _mixed(text: str) -> str:
  """Makes sums of mixed numbers: 7 3/4 becomes 7+3/4."""
  return _MIXED.sub(
    lambda m: f"-({m[2]}+{m[3]})" if m[1] else f"{m[2]}+{m[3]}", text
  )


def _number(text: str) -> str:
  """Makes integers of whole floats, and drops zeros and a plus before."""
  around = re.fullmatch(r"([(\[]?)(.*?)([)\]]?)", text)
  before, inner, after = around.groups()
  inner = re.sub(r"^\++(?=[^+])", "", inner)
  if _SCIENTIFIC.fullmatch(inner) and Fraction(inner).denominator == 1:
    inner = str(Fraction(inner))
  if match := _FLOAT.fullmatch(inner):
    inner = match[1]
  if _INTEGER.fullmatch(inner):
    inner = str(int(inner))
  return before + inner + after
