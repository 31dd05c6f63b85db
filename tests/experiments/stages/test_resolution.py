"""A stage of larger images: what it starts from reads and makes them alike."""

import dataclasses

import jax
import pytest

from experiments.stages.resolution import StageAtResolution
from experiments.stages.staged import StageResult
from research.interop.loaded import Loaded
from research.typing import UserError
from research.vlm import connectors
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.tiling.nanovlm import NanoVLM
from tests import support_vlm

LOW = Loaded(
  support_vlm.model(),
  support_vlm.params(),
  None,
  {},
  preprocessor=support_vlm.PREPROCESSOR,
)


def at(pixels, monkeypatch, **changes):
  low = dataclasses.replace(LOW, **changes)
  monkeypatch.setattr(StageResult, "load", lambda *_: low)
  return StageAtResolution(stage="low", pixels=pixels).load()


@pytest.mark.parametrize(
  "connector, tokens",
  [(LOW.model.connector, 16), (connectors.AttentionPool(32, queries=4), 4)],
)
def test_images_are_made_as_large_as_the_positions(
  connector, tokens, monkeypatch
):
  model = dataclasses.replace(LOW.model, connector=connector)
  params = LOW.params | model.new_towers(jax.random.key(0))
  found = at(32, monkeypatch, model=model, params=params)
  plan = found.preprocessor.plan(50, 60)
  assert plan.view == (32, 32)
  assert plan.patches == (8, 8)
  table = found.model.vision.positions
  assert (table.rows, table.columns) == plan.patches
  assert plan.soft_tokens == found.model.tokens_per_view(32, 32) == tokens


def test_a_model_without_a_preprocessor_has_none(monkeypatch):
  assert at(32, monkeypatch, preprocessor=None).preprocessor is None


def test_views_whose_size_is_more_than_a_number_are_refused(monkeypatch):
  how = Preprocessor(NanoVLM(longest=32, tile=16, patch=4, pool=2))
  with pytest.raises(UserError, match="found images cut by NanoVLM"):
    at(32, monkeypatch, preprocessor=how)
