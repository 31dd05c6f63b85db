"""Process reward models: data with labels of steps, and scores of steps.

`formats/` reads and writes the published layouts, `labels/` derives labels from
rollouts and oracles, `scores/` aggregates, calibrates and evaluates. Nothing
here needs a model, or JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "labelled": ["LabelledSolution"],
  },
)
