"""Files are replaced whole or not at all; what is no file is written to."""

import os
import pathlib

import pytest

from research.io import folders

NULL = pathlib.Path("/dev/null")
FILES = pathlib.Path("/proc/self/fd")


@pytest.mark.skipif(not NULL.is_char_device(), reason="needs /dev/null")
def test_a_device_is_not_replaced(tmp_path):
  """By a link to it, which is all that a mistake could replace here."""
  link = tmp_path / "result.json"
  link.symlink_to(NULL)
  folders.write_text(link, "x")
  assert link.is_symlink() and list(tmp_path.iterdir()) == [link]


def test_a_link_stays_and_leads_to_the_new_file(tmp_path):
  target, link = tmp_path / "target.json", tmp_path / "link.json"
  target.write_text("old")
  link.symlink_to(target)
  folders.write_text(link, "new")
  assert link.is_symlink() and target.read_text() == "new"


@pytest.mark.skipif(not FILES.is_dir(), reason="needs /proc")
def test_an_open_file_is_written_to(tmp_path):
  """As /dev/stdout is: a link to a link, by which others write to the file."""
  with (tmp_path / "out").open("w") as out:
    link = tmp_path / "stdout"
    link.symlink_to(FILES / str(out.fileno()))
    folders.write_text(link, "x")
    inode = os.fstat(out.fileno()).st_ino
  assert link.is_symlink() and (tmp_path / "out").stat().st_ino == inode
  assert (tmp_path / "out").read_text() == "x"


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
  assert old.read_text() == "old" and list(tmp_path.iterdir()) == [old]


def test_processes_do_not_take_each_other_s_drafts(tmp_path, monkeypatch):
  """One is stopped in mid-write while the other writes all of the file."""
  path, write = tmp_path / "a.json", pathlib.Path.write_text

  def interrupted(self, text, **options):
    write(self, text, **options)
    if text == "mine":
      with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 7)
        folders.write_text(path, "theirs")

  monkeypatch.setattr(pathlib.Path, "write_text", interrupted)
  folders.write_text(path, "mine")
  assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]
