"""What is no file is written to, not replaced."""

import pathlib

import pytest

from research.io import folders

NULL = pathlib.Path("/dev/null")


@pytest.mark.skipif(not NULL.is_char_device(), reason="needs /dev/null")
def test_a_device_is_not_replaced(tmp_path):
  """By a link to it, which is all that a mistake could replace here."""
  link = tmp_path / "result.json"
  link.symlink_to(NULL)
  folders.write_text(link, "x")
  assert link.is_symlink() and list(tmp_path.iterdir()) == [link]
