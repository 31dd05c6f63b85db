"""What commands print."""

import re


def errors(text: str) -> str:
  """Returns a command's stderr without the lines on what it loads."""
  return re.sub(r"(?m)^loading .*\n", "", text)
