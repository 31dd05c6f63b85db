"""On what frozen weights a run stands, recorded once.

As a reference to where they can be had again or, where they came from nowhere,
as one copy.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from research import tree
from research.io import folders
from research.io.folders import Folder
from research.training.checkpoints import checkpoint, checksums
from research.typing import UserError


def fingerprint(weights: Any) -> str:
  """Returns a hash of every array's path, shape, type and a sample of values.

  It tells one base model from another without reading all of it.
  """
  digest = hashlib.sha256()
  for path, x in tree.flatten_paths(weights):
    digest.update(f"{path} {x.shape} {x.dtype}\n".encode())
    digest.update(np.asarray(_sample(x, checksums.everywhere([x]))).tobytes())
  return digest.hexdigest()


@functools.partial(jax.jit, static_argnums=1)
def _sample(x, sharding):
  sample = x.reshape(-1)[:: max(1, x.size // 256)]
  if sharding is None:
    return sample
  return jax.lax.with_sharding_constraint(sample, sharding)


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
  folder = folders.folder(folder)
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
  with folders.writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
    record = {"source": here, "fingerprint": found}
    if source is None and jax.tree.leaves(frozen):
      record["sums"] = checksums.sums(frozen)
      checkpoint.save_tree(folder / "frozen", frozen)
    # Last: where there is a note, it is whole.
    if jax.process_index() == 0:
      folders.write_text(note, json.dumps(record, indent=2) + "\n")


def _read_note(note: Folder) -> dict[str, Any]:
  try:
    known = json.loads(note.read_bytes())
    return {
      "source": known.get("source"),
      "fingerprint": known["fingerprint"],
      "sums": dict(known.get("sums") or {}),
    }
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

  Raises:
    UserError: there are none, they differ from `target`, or from what was
      saved.
  """
  path = folders.folder(folder) / "frozen"
  if not path.is_dir():
    raise UserError(
      f"{path}: no frozen weights here; base.json says where they came from."
    )
  found = checkpoint.load_tree(path, target)
  note = path.parent / "base.json"
  known = _read_note(note)["sums"] if note.exists() else {}
  if known:
    sums = checksums.sums(found)
    bad = [name for name in sums if sums[name] != known.get(name)]
    if bad:
      raise UserError(
        f"{path}: {bad[0]} differs from its checksum in {note}.\n"
        "The files are damaged: get them again."
      )
  return found
