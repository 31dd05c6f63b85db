"""Training objectives (losses)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "distill": ["Distill"],
    "objective": ["NextToken", "Objective"],
    "preference": ["DPO"],
  },
)
