"""What sympy and math-verify say of two answers, in a process of their own.

They hang on some inputs, and math-verify's own time limit needs the main thread
(its issue 42). The functions here are the ones that `isolation.Worker` calls;
trees are built node by node, since `sympy.parse_expr` evaluates text as code.
"""

import functools
from typing import Any

from research.reasoning import expressions
from research.reasoning.extras import needs


def sympy_equal(a: str, b: str) -> bool:
  """Whether sympy simplifies the difference of two expressions to zero."""
  sympy, x, y = _sympy(), _tree(a), _tree(b)
  return bool(sympy.simplify(x - y) == 0)


def sympy_canonical(a: str) -> str:
  """Returns how sympy prints an expression, simplified and multiplied out."""
  sympy = _sympy()
  return str(sympy.expand(sympy.simplify(_tree(a))))


def math_verify_equal(truth: str, given: str) -> bool:
  """Whether math-verify accepts an answer for another, in this order."""
  gold, answer = _parsed(truth), _parsed(given)
  return bool(_math_verify().verify(gold, answer, timeout_seconds=None))


def math_verify_number(value: str, given: str) -> str:
  """Returns a number's value, with % if it is a percentage.

  Args:
    value: of the number, as the ladder reads it.
    given: the answer, which is returned if math-verify reads it otherwise.
  """
  sympy = _sympy()
  found = next(iter(_parsed(given)), None)
  if isinstance(found, sympy.Equality):  # x = 3
    found = found.rhs
  hundredth = sympy.UnevaluatedExpr(sympy.Rational(1, 100))
  percent = isinstance(found, sympy.Mul) and found.args[1:] == (hundredth,)
  if percent:
    found = found.args[0]
  if isinstance(found, sympy.Float):
    found = sympy.Rational(str(found))
  alike = isinstance(found, sympy.Rational) and str(found) == value
  if alike or math_verify_equal(value, given):
    return value + "%" * percent
  return given.strip()


def _parsed(answer: str) -> list[Any]:
  """Returns what math-verify reads in an answer."""
  package = _math_verify()
  config = [package.LatexExtractionConfig(boxed_match_priority=0)]
  # The caller's process has the time limit.
  return package.parse(
    f"\\boxed{{{answer}}}", config, parsing_timeout=None, raise_on_error=False
  )


@functools.cache
def _math_verify() -> Any:
  with needs("math-verify"):
    import math_verify
  return math_verify


@functools.cache
def _sympy() -> Any:
  with needs("sympy"):
    import sympy
  return sympy


def _tree(text: str) -> Any:
  return _build(expressions.parse(text))


def _build(node: expressions.Node) -> Any:
  sympy = _sympy()
  if node.kind == "number":
    return sympy.Rational(node.value.numerator, node.value.denominator)
  if node.kind == "name":
    constants = {"pi": sympy.pi, "inf": sympy.oo}
    return constants.get(node.name) or sympy.Symbol(node.name)
  inner = [_build(x) for x in node.inner]
  if node.kind == "+":
    return inner[0] + inner[1]
  if node.kind == "-":
    return inner[0] - inner[1]
  if node.kind == "*":
    return inner[0] * inner[1]
  if node.kind == "/":
    return inner[0] / inner[1]
  if node.kind == "^":
    return inner[0] ** inner[1]
  return getattr(sympy, node.kind)(*inner)
