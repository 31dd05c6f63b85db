"""Test-time compute: what it buys, and what it costs.

`estimators/` says from one pool of samples what any budget would reach,
`ledger` what it costs, `protocols` and `optimal` compare systems at equal cost.
Nothing here needs JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "cost": ["Causal", "Dense", "ModelCost", "model_cost"],
    "ledger": [
      "Incremental",
      "Ledger",
      "Rescoring",
      "break_even",
      "generation",
      "training_flops",
      "verification",
    ],
    "optimal": [
      "Choice",
      "absolute_bins",
      "compute_optimal",
      "quantile_bins",
    ],
    "protocols": [
      "Curve",
      "EffectiveSize",
      "effective_size",
      "inference_multiplier",
      "total_flops",
    ],
  },
)
