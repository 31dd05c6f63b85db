"""Files are replaced whole or not at all; what is no file is written to."""

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


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
  old, new = tmp_path / "old.json", tmp_path / "new.json"
  folders.write_text(old, "old")

  def half(self, text, **options):
    self.write_bytes(text[:1].encode())
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(pathlib.Path, "write_text", half)
  for path in (old, new):
    with pytest.raises(OSError, match="No space left"):
      folders.write_text(path, "later")
  assert old.read_text() == "old" and not new.exists()
