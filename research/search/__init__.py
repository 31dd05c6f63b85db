"""Test-time compute: searches, what they buy, and what they cost.

`strategies/` search over steps, `choose` picks among the samples.
`estimators/` says from one pool of samples what any budget would reach,
`ledger` what it costs, `protocols` and `optimal` compare systems at equal cost.
Of these none needs JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "cached_verifier": ["CachedVerifier"],
    "choose": ["BestOf", "Confident", "Majority", "Weighted", "answers_of"],
    "diffusion_policy": ["DiffusionPolicy"],
    "engine": ["Engine", "StateVerifier", "Verifier"],
    "generative_judge": [
      "GenPRMChat",
      "GenerativeJudge",
      "LanguageModelWriter",
      "ThinkPRMChain",
    ],
    "ledger": [
      "Incremental",
      "Ledger",
      "Rescoring",
      "break_even",
      "generation",
      "training_flops",
      "verification",
    ],
    "lookahead": ["Lookahead"],
    "optimal": [
      "Choice",
      "absolute_bins",
      "compute_optimal",
      "quantile_bins",
    ],
    "policy": ["Path", "Policy", "PolicyCost"],
    "protocols": [
      "Curve",
      "EffectiveSize",
      "Point",
      "at_equal_cost",
      "crossover",
      "effective_size",
      "inference_multiplier",
      "total_flops",
    ],
    "reward_verifiers": ["PolicyProbe", "StepScore", "verifier_of"],
    "step_search": ["Limits", "Samples", "StepSearch", "Strategy"],
  },
)
