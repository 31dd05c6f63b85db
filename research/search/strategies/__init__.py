"""Search strategies, one file each."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "beam": ["Beam"],
    "diverse_trees": ["DiverseTrees"],
    "independent": ["Independent"],
    "rebase": ["Rebase"],
    "tree": ["TreeSearch"],
  },
)
