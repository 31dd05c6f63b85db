"""Published layouts of step labels, one file each: read and written."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "catalogue": ["FORMATS"],
    "files": ["Format", "Skipped", "read", "read_valid", "write"],
    "genprm": ["GenPRM"],
    "math_aps": ["MathAPSFlat", "MathAPSProcess", "MathAPSTree"],
    "math_shepherd": ["MathShepherd"],
    "native": ["Native"],
    "prm800k": ["PRM800K"],
    "prmbench": ["PRMBench"],
    "processbench": ["ProcessBench"],
    "rlhflow": ["RLHFlow"],
    "thinkprm": ["ThinkPRM"],
    "trl": ["TRL"],
  },
)
