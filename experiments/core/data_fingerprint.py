"""The texts of a run by their hashes, and the special tokens around them.

A corpus that belongs to the machine, such as the standard library, may change
before a run is resumed, or differ between two machines: its hash shows that.
The tokenizer decides on the special tokens around a document, unless the
configuration does. The run records them, so that evaluations and resumed runs
read texts in the same way.
"""

import dataclasses
import json
import platform
from typing import Any

from experiments.core import artifacts
from experiments.core.experiment import Experiment
from research.data import predicted
from research.data.pipeline import Mixture, Pipeline
from research.data.sources import NoExamples
from research.io import folders
from research.io.folders import Folder
from research.nn.transformer import Transformer
from research.prm.model import RewardModel
from research.text import special_tokens
from research.text.special_tokens import NO_SPECIAL_TOKENS, SpecialTokens
from research.training.checkpoints import workdir as workdirs
from research.training.objectives.objective import NextToken
from research.typing import UserError
from research.vlm.contrastive.dual_encoder import DualEncoder
from research.vlm.model import VisionLanguageModel

PARTS = ("data", "validation", "heldout")
"""Fields of an experiment that hold data."""


def hashes(experiment: Experiment) -> dict[str, str]:
  """Returns part -> hash, for parts whose source has one (`sha256`)."""
  sources = {p: getattr(getattr(experiment, p), "source", None) for p in PARTS}
  found = {p: getattr(s, "sha256", None) for p, s in sources.items()}
  return {p: value for p, value in found.items() if value is not None}


def claim(experiment: Experiment, workdir: Folder) -> dict[str, str]:
  """Returns the hashes of a run's texts, which a new run records.

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


def _first(data: Any) -> Any:
  """Returns the first part of a mixture, whose rows are as long as all."""
  while isinstance(data, Mixture):
    data = data.parts[0]
  return data


def special_tokens_of(experiment: Experiment, tokenizer: Any) -> SpecialTokens:
  """Returns the special tokens around an experiment's training documents."""
  part = _first(experiment.data)
  if isinstance(part, Pipeline):
    return part.special_tokens(tokenizer)
  return special_tokens.from_tokenizer(tokenizer)


def restore_tokenizer(
  experiment: Experiment, tokenizer: Any, workdir: Folder, keep: bool = False
) -> Any:
  """Returns the tokenizer with the special tokens that the run began with.

  Args:
    experiment: of the run.
    tokenizer: of its model; None stays None.
    workdir: the run's, which may have a record of them. Runs from before there
      were records used none, unless they were configured.
    keep: whether to write a record where there is none.
  """
  if tokenizer is None:
    return None
  note, resumed = workdir / special_tokens.FILE, workdirs.has_progress(workdir)
  if resumed and note.exists():
    return dataclasses.replace(tokenizer, documents=special_tokens.read(note))
  if resumed and tokenizer.special != NO_SPECIAL_TOKENS:
    without = dataclasses.replace(tokenizer, documents=NO_SPECIAL_TOKENS)
    found = special_tokens_of(experiment, without)
    if found == NO_SPECIAL_TOKENS:
      artifacts.log(
        f"{workdir}: this run began without the tokens that its tokenizer puts "
        "around documents, and goes on so"
      )
  else:
    found = special_tokens_of(experiment, tokenizer)
  if keep:
    artifacts.write_text(note, json.dumps(found.record()) + "\n")
  return dataclasses.replace(tokenizer, documents=found)


def describe_special_tokens(tokenizer: Any) -> dict[str, Any] | None:
  """Returns the special tokens around documents, as a result has them."""
  if tokenizer is None:
    return None
  found = special_tokens.from_tokenizer(tokenizer)
  names = tokenizer.backend.id_to_token
  return found.record() | {
    "begin": [names(i) for i in found.begin],
    "end": [names(i) for i in found.end],
  }


def check_context(
  experiment: Experiment,
  model: Transformer | VisionLanguageModel | DualEncoder | RewardModel,
  tokenizer: Any,
) -> None:
  """Warns of texts that are longer than the model's context.

  It reads only rows that are longer: several documents may share one.
  """
  context, found = model.max_positions, {}
  for name in PARTS:
    data = getattr(experiment, name)
    if context is None or getattr(_first(data), "length", 0) <= context:
      continue
    try:
      rows = data.rows(tokenizer)
    except NoExamples:  # said by whoever reads them, or goes on without
      continue
    top = max(int(rows[i]["positions"].max()) + 1 for i in range(len(rows)))
    if top > context:
      found[name] = top
  if found:
    names = " and ".join(found)
    folders.warn(
      f"the rows of {names} hold texts of up to {max(found.values()):,} tokens,"
      f" and the model's context is {context:,}: generate and perplexity refuse"
      f" what lies beyond.\nSet LENGTH={context}, or less."
    )


def bits_per_byte(
  experiment: Experiment, tokenizer: Any, found: dict[str, float] | None
) -> float | None:
  """Returns the held-out bits per byte; None where they are not defined.

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
  of = predicted.count_predicted(experiment.heldout, tokenizer)
  return predicted.bits_per_byte(found["loss"], found["weight"], of)
