"""Records the frozen base weights of a run, once.

Stores a reference to their source or, if they have none, a copy.
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
  """Returns a hash of every array's path, shape, dtype and sampled values.

  It distinguishes base models without reading all of their weights.
  """
  digest = hashlib.sha256()
  for path, x in tree.flatten_paths(weights):
    digest.update(f"{path} {x.shape} {x.dtype}\n".encode())
    digest.update(
      np.asarray(_sample(x, checksums.replicated_sharding([x]))).tobytes()
    )
  return digest.hexdigest()


@functools.partial(jax.jit, static_argnums=1)
def _sample(x, sharding):
  sample = x.reshape(-1)[:: max(1, x.size // 256)]
  if sharding is None:
    return sample
  return jax.lax.with_sharding_constraint(sample, sharding)


def record_base(
  folder: str | os.PathLike,
  frozen: Any,
  source: Mapping[str, Any] | None,
  saved: bool = True,
) -> None:
  """Records the frozen weights of a run, or checks them against the record.

  Args:
    source: a JSON object that says where the weights can be loaded from. If
      None, they are copied into `folder/frozen`.
    saved: whether the run has saved anything; until then, what it recorded is
      replaced.

  Raises:
    UserError: the run was started with other weights.
  """
  folder = folders.folder(folder)
  note = folder / "base.json"
  current = fingerprint(frozen)
  here = None if source is None else dict(source)
  if saved and note.exists():
    known = _read_note(note)
    if known["fingerprint"] != current:
      raise UserError(
        f"{note}: this run's frozen weights came from {known.get('source')} and"
        f" are not the same as now, from {here}.\n"
        "Use the same base weights, or another workdir."
      )
    return
  with folders.writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
    record = {"source": here, "fingerprint": current}
    if source is None and jax.tree.leaves(frozen):
      record["sums"] = checksums.sums(frozen)
      checkpoint.save_tree(folder / "frozen", frozen)
    # Written last: if the note exists, the copy is complete.
    if jax.process_index() == 0:
      folders.write_text(note, json.dumps(record, indent=2) + "\n")


def warn_of_other_base(
  folder: str | os.PathLike, frozen: Any, source: Mapping[str, Any] | None
) -> None:
  """Warns if a run's checkpoint is read on top of other frozen weights.

  No error: other hardware may round weights that a transform has computed, such
  as quantized ones, in another way.
  """
  note = folders.folder(folder) / "base.json"
  if not note.exists():  # of a run from before there were notes
    return
  known = _read_note(note)
  if known["fingerprint"] != fingerprint(frozen):
    folders.warn(
      f"{note}: this run's frozen weights came from {known['source']} and are"
      f" not the same as now, from {None if source is None else dict(source)}."
      "\nUnless other hardware has rounded them, results are those of another"
      " model; use the same base weights."
    )


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
      f"{note}: not a record of base weights ({error}).\n"
      "Expected JSON with source and fingerprint; use another workdir."
    ) from error


def load_frozen(folder: str | os.PathLike, target: Any) -> Any:
  """Loads the frozen weights that `record_base` copied.

  Args:
    target: a tree with their structure, shapes, dtypes and shardings.

  Raises:
    UserError: there are none, they do not match `target`, or their checksums
      differ.
  """
  path = folders.folder(folder) / "frozen"
  if not path.is_dir():
    raise UserError(
      f"{path}: found no frozen weights; base.json names their source."
    )
  frozen = checkpoint.load_tree(path, target)
  note = path.parent / "base.json"
  known = _read_note(note)["sums"] if note.exists() else {}
  if known:
    sums = checksums.sums(frozen)
    bad = [name for name in sums if sums[name] != known.get(name)]
    if bad:
      raise UserError(
        f"{path}: {bad[0]} differs from its checksum in {note}.\n"
        "The files are damaged: copy them again."
      )
  return frozen
