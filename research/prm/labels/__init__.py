"""Labels of steps, derived from rollouts, judges and exact oracles."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "binary_search": ["Located", "locate_errors"],
    "consensus": ["Consensus", "consensus"],
    "monte_carlo": [
      "Complete",
      "Rollout",
      "chance_of_positive",
      "hard",
      "monte_carlo",
      "soft",
      "truncate",
    ],
    "omegaprm": ["OmegaPRM", "State", "Tree"],
    "oracle": ["Transition", "is_solvable", "label_steps", "state_value"],
    "progress": [
      "advantages",
      "best_of_k_value",
      "effective_reward",
      "preference_pairs",
      "relative_progress",
    ],
  },
)
