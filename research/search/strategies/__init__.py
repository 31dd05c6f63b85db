"""Search strategies, one file each."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "adaptive": ["Adaptive"],
    "allocation": ["AdaptiveAllocation", "Agreement", "MeanScore"],
    "beam": ["Beam"],
    "budget_forcing": ["BudgetForcing"],
    "diverse_trees": ["DiverseTrees"],
    "independent": ["Independent"],
    "rebase": ["Rebase"],
    "remasking": ["AllButBest", "BelowThreshold", "Remasking"],
    "rounds": ["LastTries", "Rounds", "Subsets"],
    "step_revision": ["StepRevision"],
    "tree": ["TreeSearch"],
  },
)
