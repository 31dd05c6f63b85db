"""On what frozen weights a run stands, recorded once.

As a reference to where they can be had again or, where they came from nowhere,
as one copy.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from research import tree
from research.training import checkpoint
from research.typing import UserError


def fingerprint(weights: Any) -> str:
  """Returns a hash of every array's path, shape, type and a sample of values.

  It tells one base model from another without reading all of it.
  """
  digest = hashlib.sha256()
  for path, x in tree.flatten_paths(weights):
    digest.update(f"{path} {x.shape} {x.dtype}\n".encode())
    digest.update(np.asarray(_sample(x)).tobytes())
  return digest.hexdigest()


@jax.jit
def _sample(x):
  return x.reshape(-1)[:: max(1, x.size // 256)]


def record_base(
  folder: str | os.PathLike, frozen: Any, source: Mapping[str, Any] | None
) -> None:
  """Records once on which frozen weights a run stands.

  Args:
    folder: of the run's checkpoints.
    frozen: the frozen tree.
    source: a JSON object that says where the weights can be had again; None
      if nowhere, and then they are copied into `folder/frozen`.

  Raises:
    UserError: the run stands on other weights.
  """
  folder = pathlib.Path(folder).absolute()
  note = folder / "base.json"
  found = fingerprint(frozen)
  here = None if source is None else dict(source)
  if note.exists():
    known = _read_note(note)
    if known["fingerprint"] != found:
      raise UserError(
        f"{note}: this run's frozen weights came from {known.get('source')} and"
        f" are not the same as now, from {here}.\n"
        "Use the same base weights, or another workdir."
      )
    return
  with checkpoint.writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
    if source is None and jax.tree.leaves(frozen):
      checkpoint.save_tree(folder / "frozen", frozen)
    # Written last and in one move: where there is a note, it is whole.
    draft = note.with_suffix(".tmp")
    record = {"source": here, "fingerprint": found}
    draft.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    draft.replace(note)


def _read_note(note: pathlib.Path) -> dict[str, Any]:
  try:
    known = json.loads(note.read_bytes())
    return {"source": known.get("source"), "fingerprint": known["fingerprint"]}
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise UserError(
      f"{note}: not a note on base weights ({error}).\n"
      "Expected JSON with source and fingerprint; use another workdir."
    ) from error


def load_frozen(folder: str | os.PathLike, target: Any) -> Any:
  """Returns the frozen weights that `record_base` copied.

  Args:
    folder: of the run's checkpoints.
    target: a tree with their structure, shapes, types and shardings.
  """
  path = pathlib.Path(folder).absolute() / "frozen"
  if not path.is_dir():
    raise UserError(
      f"{path}: no frozen weights here; base.json says where they came from."
    )
  return checkpoint.load_tree(path, target)
