"""Problems, verdicts, and traces: solutions in steps, with why they ended."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "trace": ["Finish", "MonteCarlo", "Sampler", "Step", "Trace"],
  },
)
