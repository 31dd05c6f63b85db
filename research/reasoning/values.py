"""What an expression is worth at fixed points: equal ones agree, others do not.

Two expressions that agree to 30 digits at points chosen without regard to them
are equal but for a chance that nobody meets (Schwartz 1980, Zippel 1979). So
their values are a form in which equal answers are one, whoever compares them.
Every operation is on 60 digits: it takes microseconds, also where sympy hangs.
"""

import decimal
import functools
import hashlib
import operator
import random
from decimal import Decimal

from research.reasoning import expressions

_DIGITS = 30
_CONTEXT = decimal.Context(
  prec=60,
  Emax=10**6,
  Emin=-(10**6),
  traps=[decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow],
)
_PI = Decimal("3.141592653589793238462643383279502884197169399375105820974944")
_SIGNS = (1, 1), (-1, 1), (1, -1), (-1, -1)  # of letters in a-m, and in n-z
_OPERATIONS = expressions.ARITHMETIC | {
  "^": operator.pow,
  "sqrt": Decimal.sqrt,
  "log": Decimal.ln,
  "ln": Decimal.ln,
}


class _NoValue(Exception):
  """An expression is not defined at a point."""


def at_points(tree: expressions.Node) -> str | None:
  """Returns the values of a tree, as text; None if it has none anywhere.

  A constant has one value; letters have four each, of which a digest is given.
  """
  letters = names(tree)
  values = [_at(tree, i) for i in range(len(_SIGNS) if letters else 1)]
  if all(x is None for x in values):
    return None
  if not letters:
    return f"≈{values[0]}"
  digest = hashlib.sha256(repr(values).encode()).hexdigest()[:16]
  return f"≈{''.join(sorted(letters))}:{digest}"


def names(tree: expressions.Node) -> set[str]:
  """Returns the letters in a tree that stand for a number."""
  if tree.kind == "name":
    return {tree.name} - set(expressions.CONSTANTS)
  return set().union(*map(names, tree.inner))


def _at(tree: expressions.Node, point: int) -> str | None:
  with decimal.localcontext(_CONTEXT):
    try:
      value = _value(tree, point)
    except (_NoValue, decimal.DecimalException, OverflowError):
      return None
    # What cancels leaves a rest of the last digits.
    if abs(value) < Decimal(10) ** -_DIGITS:
      return "0"
    return f"{decimal.Context(prec=_DIGITS).plus(value).normalize():g}"


@functools.cache
def _letter(name: str, point: int) -> Decimal:
  digits = random.Random(f"{name} {point}").randrange(10**40)
  sign = _SIGNS[point][name > "m"]
  return sign * (Decimal("0.5") + 2 * Decimal(digits).scaleb(-40))


def _value(node: expressions.Node, point: int) -> Decimal:
  if node.kind == "number":
    return Decimal(node.value.numerator) / Decimal(node.value.denominator)
  if node.kind == "name":
    if node.name == "inf":
      raise _NoValue
    return _PI if node.name == "pi" else _letter(node.name, point)
  inner = [_value(x, point) for x in node.inner]
  if node.kind in _OPERATIONS:
    return _OPERATIONS[node.kind](*inner)
  return _trigonometric(node.kind, *inner)


def _trigonometric(kind: str, angle: Decimal) -> Decimal:
  if abs(angle) > 10**6:  # no digits would be left
    raise _NoValue
  angle = angle.remainder_near(2 * _PI)
  term, sine, cosine = Decimal(1), Decimal(0), Decimal(0)
  for n in range(80):  # pi^80 / 80! is 1e-79
    if n % 2:
      sine += term if n % 4 == 1 else -term
    else:
      cosine += term if n % 4 == 0 else -term
    term *= angle / (n + 1)
  if kind == "tan" and abs(cosine) < Decimal(10) ** -_DIGITS:
    raise _NoValue
  return {"sin": sine, "cos": cosine}.get(kind, sine / cosine)
