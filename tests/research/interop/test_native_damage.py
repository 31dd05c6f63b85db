"""Damaged arrays of our own packed checkpoints are refused by name."""

import pathlib
import shutil

import pytest

from research.interop import load
from research.typing import UserError

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "quantized" / "ours"
STATE = "arrays/frozen/state"

# Of threads that find their event loop closed: users would see a traceback.
pytestmark = pytest.mark.filterwarnings(
  "error::pytest.PytestUnraisableExceptionWarning"
)


def cut(data):
  return data[: len(data) // 2]


def blank(data):
  return bytes(len(data))


def flip(data):
  at = len(data) // 2
  return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("damage", [cut, blank, flip])
@pytest.mark.parametrize(
  "pattern", [f"{STATE}/ocdbt.process_0/d/*", f"{STATE}/manifest.ocdbt"]
)
def test_damaged_arrays(pattern, damage, tmp_path):
  folder = tmp_path / "ours"
  shutil.copytree(GOLDEN, folder)
  file = max(folder.glob(pattern), key=lambda file: file.stat().st_size)
  file.write_bytes(damage(file.read_bytes()))
  with pytest.raises(UserError, match="arrays/frozen: "):
    load.load_model(folder)


def test_another_tree_in_the_metadata(tmp_path):
  folder = tmp_path / "ours"
  shutil.copytree(GOLDEN, folder)
  file = folder / STATE / "_METADATA"
  text = file.read_text()
  assert text.count("order") > 2
  file.write_text(text.replace("order", "(a+)+$", 4))
  with pytest.raises(UserError, match="arrays/frozen: "):
    load.load_model(folder)
