"""Families of vision language models in files: one row each.

A new family is a file with its row (`family.Family`): what its `config.json`
says of the parts, and what its files call their tensors; and a line in
`table.MODULES`. Nothing else knows a family.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "family": ["Family", "Language", "Parts"],
    "table": ["CONTRASTIVE", "MODULES", "check_naming", "family_of"],
  },
)
