"""Packages of the extra `reasoning`, imported when a task needs them."""

import contextlib
from collections.abc import Iterator

from research.errors import UserError


@contextlib.contextmanager
def needs(package: str) -> Iterator[None]:
  """Turns the ImportError of a package into an error that names the extra.

  Args:
    package: its name in the package index.
  """
  try:
    yield
  except ImportError as error:
    raise UserError(
      f"{package} is not installed ({error}).\n"
      "In Heptad's folder: pip install -e '.[reasoning]'"
    ) from error
