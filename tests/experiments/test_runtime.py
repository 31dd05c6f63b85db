"""What a command sets for its process, which tests share."""

import jax
import pytest

from experiments import runtime

NAME = "jax_persistent_cache_min_compile_time_secs"


@pytest.mark.parametrize(("said", "kept"), [("0", 0.0), (None, 0.3)])
def test_what_the_environment_says_of_the_cache_holds(monkeypatch, said, kept):
  """A worker that has called a command keeps all programs, as before."""
  before = getattr(jax.config, NAME)
  monkeypatch.delenv(NAME.upper(), raising=False)
  if said is not None:
    monkeypatch.setenv(NAME.upper(), said)
  try:
    jax.config.update(NAME, 0.0)
    runtime.setup()
    assert getattr(jax.config, NAME) == kept
  finally:
    jax.config.update(NAME, before)
