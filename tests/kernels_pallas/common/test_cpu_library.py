"""Compiled libraries: built once, intact, named after a hash of inputs."""

import dataclasses
import re

import pytest

from kernels_pallas.common import cpu_library
from kernels_pallas.decode_attention import cpu as decoding
from kernels_pallas.flash_attention import cpu as attention
from kernels_pallas.quantized_matmul import cpu as products

LIBRARIES = [products.LIBRARY, attention.LIBRARY, decoding.LIBRARY]


pytestmark = pytest.mark.usefixtures("cxx")


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_library_is_not_loaded(damage, tmp_path):
  made = products.LIBRARY.build(cpu_library.cache_folder())
  good = made.read_bytes()
  bad = dict(
    cut=good[: len(good) // 2],
    flipped=good[:99] + bytes([good[99] ^ 1]) + good[100:],
    empty=b"",
  )[damage]
  assert cpu_library.is_intact(made)
  copy = tmp_path / made.name
  copy.write_bytes(bad)
  assert not cpu_library.is_intact(copy)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
def test_every_source_names_the_library(library, tmp_path, monkeypatch):
  folder, copy = library.source.parent, tmp_path / "kernels" / "one" / "cpu"
  kinds = ("*.cc", "*.h", "*.inc")
  found = {path.name for kind in kinds for path in folder.glob(kind)}
  text = "".join((folder / name).read_text() for name in found)
  found |= set(re.findall(r'#include "(\.\./[^"]+)"', text))
  assert found == {library.source.name, *library.includes}
  monkeypatch.setenv("CXX", str(_compiler(tmp_path)))
  copy.mkdir(parents=True)
  for name in found:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes((folder / name).read_bytes())
  library = dataclasses.replace(library, source=copy / library.source.name)
  made = {library.build(tmp_path / "libraries")}
  for name in found:
    with open(copy / name, "a") as source:
      source.write("// changed\n")
    made.add(library.build(tmp_path / "libraries"))
  assert len(made) == 1 + len(found)


def _compiler(folder):
  """Returns a compiler that records its calls in `folder / "calls"`."""
  script = folder / "cxx"
  script.write_text(
    "#!/bin/sh\n"
    '[ "$1" = --version ] && echo a compiler && exit\n'
    f"echo called >> {folder}/calls\n"
    'for last; do :; done; echo library > "$last"\n'
  )
  script.chmod(0o700)
  return script


def test_a_library_is_built_once_and_again_if_damaged(tmp_path, monkeypatch):
  monkeypatch.setenv("CXX", str(_compiler(tmp_path)))
  folder = tmp_path / "libraries"
  made = products.LIBRARY.build(folder)
  assert cpu_library.is_intact(made)
  assert products.LIBRARY.build(folder) == made
  assert (tmp_path / "calls").read_text() == "called\n"
  made.write_bytes(b"half")
  assert products.LIBRARY.build(folder) == made
  assert cpu_library.is_intact(made)
  assert (tmp_path / "calls").read_text() == "called\n" * 2
  assert [path.name for path in folder.iterdir()] == [made.name]
