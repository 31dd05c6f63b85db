"""Adapters by name: a run stands for the adapter that it trained."""

import functools
import pathlib
import shutil

import jax
import numpy as np
import pytest

from research.interop import adapters, load
from research.typing import UserError

MODELS = pathlib.Path(__file__).resolve().parents[2] / "golden" / "models"
ADAPTER = MODELS / "peft_lora"


@functools.cache
def base():
  return load.load_model(MODELS / "llama")


@pytest.fixture
def run(tmp_path):
  """A run's working directory, with the adapter that it trained."""
  (tmp_path / "config.gin").write_text("")
  shutil.copytree(ADAPTER, tmp_path / "adapter")
  return tmp_path


def test_a_run_is_its_adapter(run):
  params, model = base().params, base().model
  for read in (
    adapters.load_adapter,
    functools.partial(adapters.read_factors, rank=8),
  ):
    of_run, of_directory = (read(p, params, model) for p in (run, ADAPTER))
    same = jax.tree.map(np.array_equal, of_run, of_directory)
    assert all(jax.tree.leaves(same))


def test_a_run_without_an_adapter(run):
  shutil.rmtree(run / "adapter")
  with pytest.raises(UserError, match="has not written adapter/"):
    adapters.locate(run)
  (run / "model").mkdir()
  with pytest.raises(UserError, match="trained a full model"):
    adapters.locate(run)
  assert adapters.locate(ADAPTER) == ADAPTER
