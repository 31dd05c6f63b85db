"""The compiled library: made once, whole, named after what it is made of."""

import pytest

from kernels_pallas.quantized_matmul import cpu


@pytest.fixture(autouse=True)
def compiled():
  """Skips where there is no compiler."""
  try:
    cpu.compiler()
  except cpu.Unavailable as error:
    pytest.skip(str(error))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_library_is_not_loaded(damage, tmp_path):
  made = cpu.build(cpu.cache_folder())
  good = made.read_bytes()
  bad = dict(
    cut=good[: len(good) // 2],
    flipped=good[:99] + bytes([good[99] ^ 1]) + good[100:],
    empty=b"",
  )[damage]
  assert cpu.is_whole(made)
  copy = tmp_path / made.name
  copy.write_bytes(bad)
  assert not cpu.is_whole(copy)


def test_every_source_names_the_library(tmp_path, monkeypatch):
  folder = cpu.SOURCE.parent
  kinds = ("*.cc", "*.h", "*.inc")
  found = {path.name for kind in kinds for path in folder.glob(kind)}
  assert found == {cpu.SOURCE.name, *cpu.PARTS}
  monkeypatch.setenv("CXX", str(_compiler(tmp_path)))
  for name in found:
    (tmp_path / name).write_bytes((folder / name).read_bytes())
  monkeypatch.setattr(cpu, "SOURCE", tmp_path / cpu.SOURCE.name)
  made = {cpu.build(tmp_path / "libraries")}
  for name in found:
    with open(tmp_path / name, "a") as source:
      source.write("// changed\n")
    made.add(cpu.build(tmp_path / "libraries"))
  assert len(made) == 1 + len(found)


def _compiler(folder):
  """Returns a compiler that notes its calls in `folder / "calls"`."""
  script = folder / "cxx"
  script.write_text(
    "#!/bin/sh\n"
    '[ "$1" = --version ] && echo a compiler && exit\n'
    f"echo called >> {folder}/calls\n"
    'for last; do :; done; echo library > "$last"\n'
  )
  script.chmod(0o700)
  return script


def test_a_library_is_made_once_and_again_if_damaged(tmp_path, monkeypatch):
  monkeypatch.setenv("CXX", str(_compiler(tmp_path)))
  folder = tmp_path / "libraries"
  made = cpu.build(folder)
  assert cpu.is_whole(made)
  assert cpu.build(folder) == made
  assert (tmp_path / "calls").read_text() == "called\n"
  made.write_bytes(b"half")
  assert cpu.build(folder) == made
  assert cpu.is_whole(made)
  assert (tmp_path / "calls").read_text() == "called\n" * 2
  assert [path.name for path in folder.iterdir()] == [made.name]
