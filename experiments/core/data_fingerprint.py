"""The texts of a run: checks, their hashes, the special tokens around them.

Files are checked before a model is loaded, which may take minutes. Files, or a
corpus that belongs to the machine such as the standard library, may change
before a run is resumed, or differ between two machines: a hash shows that. One
changed record would move every later batch, unnoticed.
The tokenizer decides on the special tokens around a document, unless the
configuration does. The run records them, so that evaluations and resumed runs
read texts in the same way.
"""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from experiments.core import artifacts, cli, runtime
from experiments.core.experiment import Experiment
from research.data import predicted
from research.data.pipeline import Mixture, Pipeline
from research.data.sources import NoExamples, expand
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

EVALUATIONS = ("validation", "heldout", "answers", "step_report")
"""Fields of an experiment that hold data of evaluations."""


@runtime_checkable
class ChecksFiles(Protocol):
  """A source of files, or data that has one, see `sources.FromFiles`."""

  def check_files(self) -> None: ...


def sources(data: Any) -> Iterator[tuple[Any, str]]:
  """Yields the sources in a part's data that have a hash, with it."""
  return _outermost(data, lambda x: getattr(x, "sha256", None))


def _outermost(
  data: Any, value_of: Callable[[Any], Any]
) -> Iterator[tuple[Any, Any]]:
  """Yields the outermost objects in a part's data that have a value, with it.

  Args:
    data: an object, or a tuple or list of such, that others are fields of.
    value_of: an object's value; None for an object that has none.
  """
  if isinstance(data, type):  # which makes a part, such as a guard
    return
  value = value_of(data)
  if value is not None:
    yield data, value
  elif isinstance(data, tuple | list):
    for each in data:
      yield from _outermost(each, value_of)
  elif dataclasses.is_dataclass(data):
    for field in dataclasses.fields(data):
      yield from _outermost(getattr(data, field.name), value_of)


def check_files(
  experiment: Experiment, parts: Sequence[str] = ("data", *EVALUATIONS)
) -> None:
  """Checks the files of an experiment's data, before a model is loaded.

  Each file is read once, whatever the number of its splits.

  Raises:
    UserError: a file cannot be read, or a record of it is wrong.
  """
  done: list[Any] = []
  for part in parts:
    for source, _ in _outermost(
      getattr(experiment, part), lambda x: isinstance(x, ChecksFiles) or None
    ):
      whole = source
      if getattr(source, "split", None) is not None:
        whole = dataclasses.replace(source, split=None)
      if whole not in done:
        whole.check_files()
        done.append(whole)


def hashes(experiment: Experiment) -> dict[str, str]:
  """Returns part -> hash, for parts whose sources have one."""
  found = {}
  for part in PARTS:
    each = [value for _, value in sources(getattr(experiment, part))]
    if len(each) == 1:
      found[part] = each[0]
    elif each:
      found[part] = hashlib.sha256("\n".join(each).encode()).hexdigest()
  return found


def claim(experiment: Experiment, workdir: Folder) -> dict[str, str]:
  """Returns the hashes of a run's texts, which a new run records.

  A run without a checkpoint is new: its texts may have been mended since. The
  first process decides, and all others must read the same.

  Raises:
    UserError: the run began on other texts.
  """
  note, now = workdir / "corpus.json", hashes(experiment)
  if not now:
    return {}
  started = workdirs.has_progress(workdir) or not runtime.is_first_process()
  if started and note.exists():
    try:
      before = json.loads(note.read_text("utf-8"))
      # A part without a hash is of a run from before files had one.
      known = {part: before.get(part, now[part]) for part in now}
      python = before["python"]
    except (ValueError, TypeError, KeyError) as error:
      raise UserError(
        f"{note}: cannot be read as a run's data fingerprint ({error}); use"
        " another workdir."
      ) from error
    if known != now:
      changed = [part for part in now if known[part] != now[part]]
      raise _changed(experiment, changed, note, python)
    return now
  record = now | {"python": platform.python_version()}
  with folders.writing(note):
    folders.write_text(note, json.dumps(record, indent=2) + "\n")
  return now


def _changed(
  experiment: Experiment, parts: Sequence[str], note: Folder, python: str
) -> UserError:
  """Returns the error for parts whose texts are not those of the run."""
  files, libraries = set(), False
  for part in parts:
    for source, _ in sources(getattr(experiment, part)):
      named = getattr(source, "paths", getattr(source, "path", ()))
      files |= set(expand(named)) if named else set()
      libraries |= not named
  found = ", ".join(sorted(files)[:4]) + ", ..." * (len(files) > 4)
  if libraries:
    found += f"{', ' * bool(files)}Python {python}; here"
    found += f" {platform.python_version()}"
  mend = "Restore the files" if files else "Resume it with that Python"
  return UserError(
    f"{note}: the texts of {' and '.join(parts)} ({found}) have changed since"
    f" this run began.\n{mend}, or use another workdir."
  )


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
      cli.log(
        f"{workdir}: this run started without the special tokens that its "
        "tokenizer puts around documents, and continues without them"
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
      f"the rows of {names} have texts of up to {max(found.values()):,} tokens,"
      f" and the model's context is {context:,}: generate and perplexity refuse"
      f" longer texts.\nSet LENGTH={context}, or less."
    )


def bits_per_byte(
  experiment: Experiment, tokenizer: Any, found: dict[str, float] | None
) -> float | None:
  """Returns the held-out bits per byte; None where they are not defined.

  Args:
    found: `loss`, a mean, and `weight`, the number of tokens.
  """
  plain = isinstance(experiment.objective, NextToken)
  if found is None or tokenizer is None or not plain:
    return None
  of = predicted.count_predicted(experiment.heldout, tokenizer)
  return predicted.bits_per_byte(found["loss"], found["weight"], of)
