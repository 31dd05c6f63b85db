"""An objective gets a model of its own kind, or says which it needs."""

import dataclasses
from typing import Any

import pytest

from research import training
from research.prm.model import RewardModel
from research.training.objectives.objective import with_model
from research.typing import UserError
from tests import support


@dataclasses.dataclass(frozen=True)
class OfAnyModel:
  """An objective of any model."""

  model: Any = None


def test_a_model_of_another_kind_is_refused():
  model = support.model()
  assert with_model(training.NextToken(), model).model is model
  reward = RewardModel(backbone=model)
  message = "NextToken.model: found RewardModel, expected Transformer"
  with pytest.raises(UserError, match=message):
    with_model(training.NextToken(), reward)
  assert with_model(OfAnyModel(), reward).model is reward
