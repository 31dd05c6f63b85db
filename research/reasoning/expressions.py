"""Arithmetic in answers, parsed without ever evaluating text as code.

`sympy.parse_expr` is Python's `eval`, which a model's text must not reach. This
parser knows numbers, single letters, a few names, `+ - * / ^`, parentheses and
products without a sign; anything else is refused.
"""

import dataclasses
import math
import operator
import re
from fractions import Fraction

MAX_LENGTH = 400
"""Characters of an expression at most."""

MAX_DEPTH = 40
MAX_EXPONENT = 64
MAX_BITS = 1 << 12

FUNCTIONS = "sqrt", "log", "ln", "sin", "cos", "tan"
CONSTANTS = "pi", "inf"
ARITHMETIC = {
  "+": operator.add,
  "-": operator.sub,
  "*": operator.mul,
  "/": operator.truediv,
}
"""Kind of a node -> its value by those of its operands, of any type."""

_TOKEN = re.compile(
  r"\s*(?:(\d+\.?\d*|\.\d+)|(sqrt|log|ln|sin|cos|tan|pi|inf|[a-z])"
  r"|([-+*/^()]))"
)


@dataclasses.dataclass(frozen=True)
class Node:
  """A number, a name, or an operation on other nodes.

  Attributes:
    kind: "number", "name", a function's name, or one of `+ - * / ^`.
    value: a number's value.
    name: a name's text.
    inner: operands.
  """

  kind: str
  value: Fraction = Fraction(0)
  name: str = ""
  inner: tuple["Node", ...] = ()


class NotAnExpression(ValueError):
  """A text that the grammar does not have."""


def parse(text: str) -> Node:
  """Returns the tree of an expression, in lower case.

  Raises:
    NotAnExpression: the text is not one, or too long or too deep.
  """
  if len(text) > MAX_LENGTH:
    raise NotAnExpression(f"{len(text)} characters")
  tokens, at = [], 0
  while at < len(text.rstrip()):
    match = _TOKEN.match(text, at)
    if not match:
      raise NotAnExpression(f"{text[at : at + 20]!r}")
    tokens.append(match.group().strip())
    at = match.end()
  parser = _Parser([*tokens, ""])
  tree = parser.sum(0)
  if parser.token:
    raise NotAnExpression(f"{parser.token!r}")
  return tree


def rational(text: str) -> Fraction | None:
  """Returns the exact value of a constant expression.

  None if the text is no expression, has names or irrational values in it,
  divides by zero, or is too large.
  """
  try:
    return value_of(parse(text))
  except (NotAnExpression, ZeroDivisionError):
    return None


def value_of(node: Node) -> Fraction | None:
  """Returns the exact value of a tree; None if it has none that is rational.

  Raises:
    ZeroDivisionError: the tree divides by zero.
  """
  if node.kind == "number":
    return node.value
  inner = [value_of(x) for x in node.inner]
  if node.kind == "name" or None in inner:
    return None
  if node.kind in ARITHMETIC:
    return ARITHMETIC[node.kind](*inner)
  if node.kind == "^":
    return _power(*inner)
  if node.kind == "sqrt":
    [a] = inner
    roots = [math.isqrt(max(x, 0)) for x in (a.numerator, a.denominator)]
    exact = Fraction(*roots) ** 2 == a
    return Fraction(*roots) if exact else None
  return None


def _power(a: Fraction, b: Fraction) -> Fraction | None:
  if b.denominator != 1 or abs(b) > MAX_EXPONENT:
    return None
  bits = max(a.numerator.bit_length(), a.denominator.bit_length())
  return None if bits * abs(b) > MAX_BITS else a ** int(b)


class _Parser:
  """Recursive descent; `token` is the next one, "" at the end."""

  def __init__(self, tokens: list[str]):
    self.tokens, self.at = tokens, 0

  @property
  def token(self) -> str:
    return self.tokens[self.at]

  def take(self) -> str:
    self.at += 1
    return self.tokens[self.at - 1]

  def sum(self, depth: int) -> Node:
    if depth > MAX_DEPTH:
      raise NotAnExpression(f"more than {MAX_DEPTH} levels")
    left = self.product(depth)
    while self.token in ("+", "-"):
      sign = self.take()
      left = Node(sign, inner=(left, self.product(depth)))
    return left

  def product(self, depth: int) -> Node:
    left = self.signed(depth)
    while self.token and self.token not in "+-)":
      # Without a sign between them, neighbours are multiplied.
      sign = self.take() if self.token in "*/" else "*"
      left = Node(sign, inner=(left, self.signed(depth)))
    return left

  def signed(self, depth: int) -> Node:
    if self.token in ("+", "-"):
      sign = self.take()
      inner = self.signed(depth + 1)
      zero = Node("number")
      return inner if sign == "+" else Node("-", inner=(zero, inner))
    return self.power(depth)

  def power(self, depth: int) -> Node:
    base = self.atom(depth)
    if self.token != "^":
      return base
    self.take()
    return Node("^", inner=(base, self.signed(depth + 1)))

  def atom(self, depth: int) -> Node:
    token = self.take() if self.token else ""
    if token == "(":
      inner = self.sum(depth + 1)
      if not self.token or self.take() != ")":
        raise NotAnExpression("a bracket without its end")
      return inner
    if token in FUNCTIONS:
      if self.token != "(":
        raise NotAnExpression(f"{token} without brackets")
      return Node(token, inner=(self.atom(depth + 1),))
    if token and token[0] in "0123456789.":
      return Node("number", value=Fraction(token))
    if token and token[0].isalpha():
      return Node("name", name=token)
    raise NotAnExpression(f"{token!r}" if token else "nothing")
