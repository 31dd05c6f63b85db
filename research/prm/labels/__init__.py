"""Labels of steps, derived from rollouts, judges and exact oracles."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "agreement": ["Consensus", "consensus"],
    "binary_search": ["Located", "locate_errors"],
    "omegaprm": ["OmegaPRM", "State", "Tree"],
    "oracle": ["Transition", "is_solvable", "label_steps", "state_value"],
    "rollouts": [
      "Complete",
      "Rollout",
      "chance_of_positive",
      "hard",
      "monte_carlo",
      "soft",
      "truncate",
    ],
  },
)
