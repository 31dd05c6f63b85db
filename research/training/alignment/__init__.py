"""Policy gradients from rewards: advantages, surrogate, KL, rollouts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "advantages": ["Standardized", "centered", "leave_one_out"],
    "divergence": ["KL"],
    "policy_gradient": ["PolicyGradient"],
    "surrogate": ["Clip", "Surrogate"],
  },
)
