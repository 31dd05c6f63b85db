"""What users reach: commands and flags, run files, macros, names, formats.

  python -m tests.reach > tests/golden/reach.txt

rewrites the list that `test_reach` compares: what goes from it is a decision.
"""

import importlib
import re

from experiments.__main__ import commands
from tests.test_contents import PACKAGES, ROOT

CONFIGS = ROOT / "configs"


def reached():
  """Yields a line for each thing, by kind."""
  for name in commands():
    module = importlib.import_module(f"experiments.{name}")
    for flag in sorted(module.FLAGS):
      yield f"flag {name} --{flag}"
  configurables = set()
  for path in sorted(CONFIGS.rglob("*.gin")):
    text = path.read_text("utf-8")
    yield f"run file {path.relative_to(CONFIGS)}"
    macros = re.findall(r"^([A-Z][A-Z0-9_]*) *=", text, re.M)
    yield from (f"macro {path.relative_to(CONFIGS)} {x}" for x in {*macros})
    modules = re.findall(r"^from (\S+) import (\w+)$", text, re.M)
    places = {name: f"{package}.{name}" for package, name in modules}
    for module, name in re.findall(r"[@/\s(](\w+)\.([A-Za-z]\w*)", text):
      if module in places:
        configurables.add(f"{places[module]}.{name}")
  yield from (f"configurable {x}" for x in configurables)
  for path in (ROOT / "colab").glob("*.ipynb"):
    yield f"notebook {path.name}"
  for package in PACKAGES:
    for name in getattr(importlib.import_module(package), "__all__", ()):
      yield f"name {package}.{name}"
  yield from published()


def published():
  """Yields families of models, formats and methods."""
  from research.interop.gguf import architectures
  from research.interop.hf import families
  from research.interop.quantized import compressed_config
  from research.interop.vision.families import table
  from research.nn import presets
  from research.prm.formats import FORMATS

  yield from (f"preset {name}" for name in presets.FAMILIES)
  yield from (f"labels {name}" for name in FORMATS)
  yield from (f"compressed-tensors {x}" for x in compressed_config.FORMATS)
  yield from (f"vision {kind}" for kind in table.MODULES)
  yield from (f"language {kind}" for kind in families.MODEL_TYPES)
  yield from (f"gguf {kind}" for kind in architectures.ARCHITECTURES)
  for room in "quant/formats", "lora/methods", "vlm/connectors":
    for path in (ROOT / "research" / room).glob("[a-z]*.py"):
      yield f"module {room}/{path.stem}"


if __name__ == "__main__":
  print("\n".join(sorted({*reached()})))
