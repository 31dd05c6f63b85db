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
  with needs("math-verify"):
    import math_verify

  config = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]
  # The caller's process has the time limit.
  gold, answer = (
    math_verify.parse(
      f"\\boxed{{{x}}}", config, parsing_timeout=None, raise_on_error=False
    )
    for x in (truth, given)
  )
  return bool(math_verify.verify(gold, answer, timeout_seconds=None))


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
