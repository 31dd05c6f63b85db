"""What math-verify reads in an answer, in a process of its own.

It hangs on some inputs, and its own time limit needs the main thread (its issue
42). The public function here is what `isolation.Worker` calls.
"""

import functools
from typing import Any

from research.reasoning.extras import needs

_DIGITS = 20
# Where expressions with letters are compared: equal ones agree there.
_POINTS = tuple(
  tuple(f"{sign * (k + 3) * 7919 % 1009 / 500:.3f}" for k in range(8))
  for sign in (1, -1)
)


def math_verify_form(answer: str) -> str | None:
  """Returns what math-verify reads in an answer, in a form by value.

  None where it reads nothing, or an equation that says nothing.
  """
  parsed = _parsed(answer)
  return _form(parsed[0]) if parsed else None


def _form(x: Any) -> str | None:
  sympy = _sympy()
  if isinstance(x, sympy.Equality):
    left, right = (_form(side) for side in x.args)
    if left == right or _is_name(x.lhs):
      return right
    return left if _is_name(x.rhs) else None
  if isinstance(x, sympy.Interval):
    ends = f"{_form(x.start)},{_form(x.end)}"
    return f"{'[('[bool(x.left_open)]}{ends}{'])'[bool(x.right_open)]}"
  if isinstance(x, sympy.FiniteSet | sympy.Union):
    parts = sorted(str(_form(part)) for part in x.args)
    return ("∪" if isinstance(x, sympy.Union) else ",").join(parts)
  if isinstance(x, sympy.Tuple | tuple | list):
    return f"({','.join(str(_form(part)) for part in x)})"
  if isinstance(x, sympy.core.relational.Relational):
    return str(x.canonical)  # 2 < x is x > 2
  if not isinstance(x, sympy.Expr):
    return str(x)
  x = x.doit()  # percentages are unevaluated products
  x = x.xreplace({f: sympy.Rational(str(f)) for f in x.atoms(sympy.Float)})
  if x.is_Rational or x.is_Symbol:
    return str(x)
  letters = sorted(x.free_symbols, key=str)
  values = []
  for point in _POINTS if letters else ((),):
    at = {x: sympy.Rational(y) for x, y in zip(letters, point, strict=False)}
    values.append(str(x.subs(at).evalf(_DIGITS)))
  return f"≈{','.join(map(str, letters))}:{';'.join(values)}"


def _is_name(x: Any) -> bool:
  sympy = _sympy()
  return isinstance(x, sympy.Symbol | sympy.core.function.AppliedUndef)


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
