"""Regular expressions for paths of trainable arrays."""

from collections.abc import Sequence

from research.typing import UserError


def no_matrix(what: str, matrices: str, paths: Sequence[str]) -> UserError:
  """Returns the error for an expression that no matrix's path matches.

  Args:
    what: has the expression.
    matrices: the expression.
    paths: of all trainable arrays.
  """
  return UserError(
    f"{what}: {matrices!r} matches no matrix among {len(paths)} trainable"
    f" arrays.\nExpected a regular expression for paths such as {paths[-1]!r}."
  )
