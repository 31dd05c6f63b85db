"""All formats, by the names that run files use."""

from collections.abc import Mapping

from research.prm.formats.files import Format
from research.prm.formats.genprm import GenPRM
from research.prm.formats.math_aps import (
  MathAPSFlat,
  MathAPSProcess,
  MathAPSTree,
)
from research.prm.formats.math_shepherd import MathShepherd
from research.prm.formats.native import Native
from research.prm.formats.prm800k import PRM800K
from research.prm.formats.prmbench import PRMBench
from research.prm.formats.processbench import ProcessBench
from research.prm.formats.rlhflow import RLHFlow
from research.prm.formats.thinkprm import ThinkPRM
from research.prm.formats.trl import TRL

FORMATS: Mapping[str, Format] = {
  "genprm": GenPRM(),
  "math_aps_flat": MathAPSFlat(),
  "math_aps_process": MathAPSProcess(),
  "math_aps_tree": MathAPSTree(),
  "math_shepherd": MathShepherd(),
  "native": Native(),
  "prm800k": PRM800K(),
  "prmbench": PRMBench(),
  "processbench": ProcessBench(),
  "rlhflow": RLHFlow(),
  "thinkprm": ThinkPRM(),
  "trl": TRL(),
}
"""A new format is a file, and a line here."""
