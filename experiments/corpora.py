"""Which texts a run learns from, and is measured on, by their hashes.

A corpus that belongs to the machine, such as the standard library, may change
under a run that is resumed, or between two machines; a hash tells.
"""

import json
import platform
from typing import Any

from experiments.experiment import Experiment
from research.data import predicted
from research.training import folders
from research.training.folders import Folder
from research.training.objective import NextToken
from research.typing import UserError


def hashes(experiment: Experiment) -> dict[str, str]:
  """Returns part -> hash, for parts whose source has one (`sha256`)."""
  parts = ("data", "validation", "heldout")
  sources = {p: getattr(getattr(experiment, p), "source", None) for p in parts}
  found = {p: getattr(s, "sha256", None) for p, s in sources.items()}
  return {p: value for p, value in found.items() if value is not None}


def claim(experiment: Experiment, workdir: Folder) -> dict[str, str]:
  """Returns the run's hashes, and records them where it begins.

  Raises:
    UserError: the run began on other texts.
  """
  note, now = workdir / "corpus.json", hashes(experiment)
  if not now:
    return {}
  if note.exists():
    try:
      before = json.loads(note.read_text("utf-8"))
      known = {part: before[part] for part in now}
      python = before["python"]
    except (ValueError, TypeError, KeyError) as error:
      raise UserError(
        f"{note}: is no record of a run's texts ({error}); use another workdir."
      ) from error
    if known != now:
      raise UserError(
        f"{note}: this run began with other texts (Python {python}; here"
        f" {platform.python_version()}).\n"
        "Resume it with that Python, or use another workdir."
      )
    return now
  record = now | {"python": platform.python_version()}
  with folders.writing(note):
    folders.write_text(note, json.dumps(record, indent=2) + "\n")
  return now


def bits_per_byte(
  experiment: Experiment, tokenizer: Any, found: dict[str, float] | None
) -> float | None:
  """Returns the held-out bits per byte; None where there are no such.

  Args:
    experiment: whose held-out texts were evaluated.
    tokenizer: of its model.
    found: `loss`, a mean, and `weight`, the number of tokens.
  """
  loss = experiment.objective
  plain = isinstance(loss, NextToken) and not (
    loss.z_loss or loss.label_smoothing
  )
  if found is None or tokenizer is None or not plain:
    return None
  of = predicted.predicted(experiment.heldout, tokenizer)
  return predicted.bits_per_byte(found["loss"], found["weight"], of)
