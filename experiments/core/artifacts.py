"""What a run leaves behind: a plot, weights, and commands to try next."""

import dataclasses
import os
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax

from experiments.core import cli, device_context, runtime
from experiments.core.experiment import BuiltExperiment, Experiment
from research import tree, weights
from research.interop import convert, load, peft, sources, vision
from research.interop.diffusion import spec
from research.interop.hf import rewards
from research.interop.hf import tokenizer as hf_tokenizer
from research.interop.hf import write as hf_write
from research.interop.loaded import Loaded
from research.interop.peft import base_fingerprint
from research.interop.peft import names as peft_names
from research.interop.vision import adapters
from research.io import folders
from research.io.folders import Folder
from research.lora import wrap
from research.prm.model import RewardModel
from research.training import state
from research.training.reports import plots
from research.typing import Params, UserError, WriteError
from research.vlm.contrastive.dual_encoder import DualEncoder
from research.vlm.image_conditioned import ImageConditioned

DEFAULT_WINDOW = 1024
"""Tokens that `experiments.perplexity` reads together."""


def write_text(path: Folder, text: str) -> None:
  """Writes a whole file, from the first process alone."""
  if runtime.is_first_process():
    with folders.writing(path):
      folders.write_text(path, text)


def save(
  experiment: Experiment,
  built: BuiltExperiment,
  trained: state.TrainState,
  workdir: Folder,
  heldout: dict[str, tuple[int, dict[str, float] | None]],
  title: str,
) -> bool:
  """Writes the plot of the loss, and the trained weights.

  Args:
    heldout: when -> (step, means over held-out data or None).

  Returns:
    Whether other commands can read the weights.
  """
  points = [
    (at, found["loss"], f"held out, {when}")
    for when, (at, found) in heldout.items()
    if found is not None
  ]
  with folders.locally(workdir) as place:
    if runtime.is_first_process():
      plots.loss_curve(
        workdir / "metrics.jsonl",
        place / "loss.png",
        title=title,
        points=points,
      )
    params = experiment.finished(trained.params)
    return _save_weights(place, experiment, built, params)


def _save_weights(place, experiment, built, params) -> bool:
  """Writes trained weights; returns whether other commands can read them.

  An adapter over a base that transforms have changed, such as packed, is
  written twice: alone, and over that base, as which the run is opened.
  """
  if not _save_adapter(place / "adapter", experiment, built, params):
    return _save_model(place / "model", experiment, built, params)
  if _has_other_base(built):
    cli.log(
      f"{place / load.MODEL} has the adapter over the base that it was trained"
      " over, as transforms have made that; other bases give other outputs."
    )
    _save_model(place / load.MODEL, experiment, built, params)
  return True


def _has_other_base(built: BuiltExperiment) -> bool:
  """Whether transforms have changed the base that adapters were added to.

  Not of models with images, whose checkpoints have no packed weights.
  """
  if isinstance(built.loaded.model, ImageConditioned):
    return False
  trees = (wrap.disable(built.params), built.loaded.params)
  before, after = (
    (
      base_fingerprint.sample(params),
      {
        tuple(type(x) for x in weights.nested(w) if weights.is_weight(x))
        for _, w in weights.named_weights(params)
      },
    )
    for params in trees
  )
  return before != after


def _save_adapter(folder, experiment, built, params) -> bool:
  """Writes trained adapters in PEFT's format; returns whether it did.

  Adapters describe the trained model only if nothing else was trained, if its
  masks are those of its base, and if their base has a name: it was not trained
  from scratch or by an earlier stage, it is no adapter itself, which would be
  added to these, and its images have the published size. Adapters that PEFT has
  no form for are left to the whole model.
  """
  added, rest = tree.partition(params, wrap.TRAINABLE)
  base = getattr(experiment.model, "name", None)
  if getattr(experiment.model, "image_size", None) is not None:
    return False
  if tree.count(tree.partition(built.loaded.params, wrap.TRAINABLE)[0]):
    return False
  if base is None or not tree.count(added) or _changed(experiment, rest):
    return False
  known, tokenizer = built.loaded.diffusion, built.loaded.tokenizer
  if _spec_of(experiment.objective, known, tokenizer) != known:
    return False
  params = tree.combine(device_context.gather(added), rest)
  written = runtime.is_first_process() and _wrote_adapter(
    folder, base, built.loaded, params
  )
  return runtime.from_first_process(written)


def _wrote_adapter(folder, base, loaded, params) -> bool:
  """Writes adapters, and says why if PEFT has no form for them."""
  if pathlib.Path(base).exists():
    base = str(load.locate(base).resolve())  # of a run, the model in it
  try:
    model, params = adapters.language_model(loaded.model, params)
    naming = peft_names.naming_of_source(loaded.source)
    _, start = adapters.language_model(loaded.model, loaded.params)
    peft.save_adapter(folder, params, model, base, naming=naming, base=start)
  except WriteError:
    raise
  except UserError as error:
    cli.log(f"The adapter is written with the whole model, for Heptad: {error}")
    return False
  return True


def _changed(experiment: Experiment, params: Params) -> bool:
  """Whether training has changed any of these parameters."""
  patterns = (experiment.trainable, experiment.transformed)
  parts = [tree.partition(params, p)[0] for p in patterns if p is not None]
  return any(tree.count(part) for part in parts)


def _save_model(folder, experiment, built, params) -> bool:
  """Writes the whole model, in Hugging Face's format where that has names.

  Models after the transforms of `after`, with adapters or a time embedding are
  written as our checkpoint, which has every leaf as it is.
  """
  model = built.loaded.model
  sees = isinstance(model, ImageConditioned)
  judges = sees and isinstance(model.language, RewardModel)
  if isinstance(model, DualEncoder) or judges:
    return False  # its checkpoint is all that commands read
  params = device_context.gather(params)
  if not runtime.is_first_process():
    return True
  if isinstance(model, RewardModel):
    _save_reward_model(folder, built.loaded, params)
    return False  # it writes no text: evaluate and search read it
  if sees:
    shutil.rmtree(folder, ignore_errors=True)
    write = vision.write_model
    return _write(folder, lambda: write(folder, built.loaded, params))
  source = sources.from_training(
    built.loaded,
    params,
    {"format": "run", "path": str(folder.parent)},
    getattr(experiment.model, "name", None),
    built.params if jax.process_count() == 1 else None,
  )
  source = _with_mask_config(source, experiment.objective)
  shutil.rmtree(folder, ignore_errors=True)
  adapted = tree.count(tree.partition(params, wrap.TRAINABLE)[0])
  timed = source.model.time_embedding is not None
  own = experiment.after or adapted or timed
  as_files = convert.to_orbax if own else convert.to_hf
  return _write(folder, lambda: as_files(source, folder))


def _write(folder: pathlib.Path, write: Callable[[], Any]) -> bool:
  """Returns whether a model was written; logs why its format cannot have it.

  Raises:
    WriteError: there is no room for it, or no permission.
  """
  try:
    write()
  except WriteError:
    raise
  except UserError as error:
    cli.log(f"{folder}: not written: {error}")
    return False
  return True


def _save_reward_model(folder, loaded, params) -> None:
  """Writes a reward model, in Hugging Face's format for token classifiers."""
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir()

  def write():
    config = loaded.source.get("config")
    rewards.write_reward_model(folder, loaded.model, params, config)
    hf_tokenizer.write(folder, None, loaded.tokenizer)

  if not _write(folder, write):
    shutil.rmtree(folder, ignore_errors=True)  # what it began with


def _with_mask_config(source: sources.Source, objective: Any) -> sources.Source:
  """Returns the source; its config says which masks it was trained to fill."""
  if getattr(objective, "mask_id", -1) < 0:
    return source
  config = source.config
  if config is None:
    config = hf_write.config_json(source.model, None, None, source.hint)
  known = spec.from_config(config)
  how = _spec_of(objective, known, source.tokenizer)
  if how == known:
    return source
  # Some families name it among the fields of their text model alone.
  config = {"vocab_size": source.model.vocab_size} | dict(config)
  config |= {spec.FIELD: how.to_config()}
  return dataclasses.replace(source, config=config)


def _spec_of(
  objective: Any, known: spec.Spec | None, tokenizer: Any
) -> spec.Spec | None:
  """Returns what a model's masks are after training by an objective.

  Args:
    objective: the loss; one without masks changes nothing.
    known: what they were before, or None.
    tokenizer: whose stop tokens end texts of a new diffusion model; or None.
  """
  mask = getattr(objective, "mask_id", -1)
  if mask < 0:
    return known
  end = (tokenizer.stop if tokenizer else ()) if known is None else known.end
  return spec.Spec(
    mask_id=mask,
    shift=getattr(objective, "shift", False),
    block=getattr(objective, "block", None),
    end=end,
  )


def with_masks(loaded: Loaded, objective: Any) -> Loaded:
  """Returns a model that says which masks it was trained to fill."""
  how = _spec_of(objective, loaded.diffusion, loaded.tokenizer)
  return dataclasses.replace(loaded, diffusion=how)


def next_commands(
  workdir: Folder, usable: Loaded | None, devices: int, chats: bool = False
) -> str:
  """Returns commands to try next, with the Python that runs this process.

  Args:
    usable: the trained model; None if nothing can be done with it alone.
    chats: whether it was trained on conversations.
  """
  python = os.path.relpath(sys.executable)
  if python.startswith(".."):
    python = sys.executable
  where = str(workdir)
  if not folders.is_remote(workdir):
    near = os.path.relpath(workdir)
    where = where if near.startswith("..") else near
  # A CPU has as many devices as the run's mesh only if it is asked for them.
  virtual = devices > 1 and jax.default_backend() == "cpu"
  many = f" --devices={devices}" if virtual else ""
  lines = [f"{python} -m experiments.evaluate --workdir={where}{many}"]
  if usable is not None and usable.tokenizer is not None:
    context = usable.model.max_positions or DEFAULT_WINDOW
    window = f" --window={context}" if context < DEFAULT_WINDOW else ""
    generate = f"{python} -m experiments.generate --model={where}"
    perplexity = f"{python} -m experiments.perplexity --model={where}"
    if isinstance(usable.model, ImageConditioned):
      tried = [f'{generate} --image=FILE --prompt="What is there?"']
    elif usable.diffusion is not None:
      tried = [f'{generate} --sampler=diffusion --prompt="A decorator is"']
    elif chats:
      tried = [f'{generate} --chat --prompt="What is a decorator?"']
    else:
      tried = [
        f'{generate} --prompt="A Python decorator is"',
        f"{perplexity} --text=README.md{window}",
      ]
    lines = [*tried, *lines]
  return f"picture: {where}/loss.png. To try next:\n  " + "\n  ".join(lines)
