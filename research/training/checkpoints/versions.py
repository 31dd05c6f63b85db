"""Records the code and library versions of a run in its workdir.

With another version, results may round differently, so a resumed run need not
be bitwise equal to an uninterrupted one. This is a warning, not an error.
"""

import hashlib
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Mapping

import jax

from research.io import folders
from research.io.folders import Folder

FILE = "versions.json"
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "grain")
LIBRARIES += ("orbax-checkpoint", "tokenizers")
_PACKAGES = ("research", "kernels_pallas", "experiments")


def current() -> dict[str, str]:
  """Returns name -> version of everything that affects a run's numbers."""
  versions = {"python": platform.python_version()}
  for name in LIBRARIES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = "none"
  devices = jax.devices()
  versions["devices"] = f"{len(devices)} x {devices[0].device_kind}"
  versions["code"] = code()
  return versions


def code() -> str:
  """Returns a digest of this repository's Python sources."""
  digest = hashlib.sha256()
  root = pathlib.Path(__file__).resolve().parents[3]
  for package in _PACKAGES:
    for path in sorted((root / package).rglob("*.py")):
      digest.update(f"{path.relative_to(root)}\n".encode())
      digest.update(path.read_bytes())
  return digest.hexdigest()[:12]


def record(workdir: Folder) -> None:
  """Appends this process's versions to the workdir's versions.json.

  The file lists all sets of versions that the run has used, in order. Warns if
  the last one differs from this process's.
  """
  path, now = workdir / FILE, current()
  known = _read(path)
  before = known[-1] if known else now
  changes = [
    f"{name} {before.get(name, 'unknown')} -> {version}"
    for name, version in now.items()
    if before.get(name) != version
  ]
  if changes:
    folders.warn(
      f"{path}: other versions than before: {', '.join(changes)}.\n"
      "The run resumes, but may not be bitwise reproducible."
    )
  if (changes or not known) and jax.process_index() == 0:
    with folders.writing(path):
      folders.write_text(path, json.dumps([*known, now], indent=2) + "\n")


def _read(path: Folder) -> list[Mapping[str, str]]:
  """Returns the recorded versions; warns if the file cannot be read."""
  try:
    recorded = json.loads(path.read_bytes())
  except FileNotFoundError:
    return []
  except (OSError, ValueError):
    recorded = None
  if isinstance(recorded, list) and all(
    isinstance(x, Mapping) for x in recorded
  ):
    return recorded
  folders.warn(f"{path}: cannot be read; it will be rewritten")
  return []
