"""Unbiased estimates from one pool of n samples a problem, and their errors."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "closed_forms": [
      "best_of_n_divergence",
      "beta_pass_at_k",
      "noisy_best_of_n",
      "tries_until_success",
    ],
    "coverage": ["BetaBinomial", "PowerLaw", "fit_beta", "fit_power_law"],
    "intervals": ["Estimate", "mean_accuracy", "paired_difference"],
    "pool": ["best_of_k", "pass_at_k"],
    "subsets": ["mean_over_subsets", "weighted_majority_at_k"],
    "voting": ["majority_at_k", "vote", "weighted_vote"],
  },
)
