"""What a command sets for its process, which tests share."""

import jax
import pytest

from experiments.core import runtime

NAME = "jax_persistent_cache_min_compile_time_secs"
SET = (
  NAME,
  "jax_persistent_cache_min_entry_size_bytes",
  "jax_compilation_cache_dir",
)


@pytest.fixture
def kept():
  """What tests after these have is what they had before."""
  before = {name: getattr(jax.config, name) for name in SET}
  yield before
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.mark.parametrize(("said", "want"), [("0", 0.0), (None, 0.3)])
def test_what_the_environment_says_of_the_cache_holds(
  monkeypatch, kept, said, want
):
  """A worker that has called a command keeps all programs, as before."""
  monkeypatch.delenv(NAME.upper(), raising=False)
  if said is not None:
    monkeypatch.setenv(NAME.upper(), said)
  jax.config.update(NAME, 0.0)
  runtime.setup()
  assert getattr(jax.config, NAME) == want


def test_setup_sets_nothing_that_is_not_put_back(monkeypatch, kept):
  named = []
  monkeypatch.setattr(jax.config, "update", lambda name, _: named.append(name))
  for name in SET:
    monkeypatch.delenv(name.upper(), raising=False)
  runtime.setup()
  assert set(named) == set(kept)
