"""Process reward models: models that judge every step of an answer."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "model": ["GenerativeReward", "RewardModel"],
    "objective": ["StepReward"],
  },
)
