"""`make test-peers` does not pass by skipping what it cannot compare with."""

import pytest

from tests.peers.missing import missing


def test_a_missing_peer_fails(monkeypatch):
  for allowed in ("", "0", None):
    monkeypatch.delenv("ALLOW_MISSING", raising=False)
    if allowed is not None:
      monkeypatch.setenv("ALLOW_MISSING", allowed)
    with pytest.raises(pytest.fail.Exception, match="run `make llama-cpp`, or"):
      missing("llama.cpp", "llama-cpp")


def test_unless_it_may(monkeypatch):
  monkeypatch.setenv("ALLOW_MISSING", "1")
  with pytest.raises(pytest.skip.Exception, match="gptqmodel is not installed"):
    missing("gptqmodel", "gptqmodel")
