"""The model that `convert` reads: whatever loads, and checkpoints of runs."""

import pathlib
from typing import Any

from experiments.core import config, train_eval
from research.interop import load, sources
from research.interop.diffusion import from_autoregressive
from research.typing import UserError


def open_source(name: str) -> Any:
  """Returns a source; a run without a written model by its checkpoint."""
  path = load.last_stage(pathlib.Path(name))
  written = [path / "adapter" / load.ADAPTER_CONFIG, path / "model"]
  if (path / "config.gin").is_file() and not any(p.exists() for p in written):
    return open_checkpoint(path)
  return sources.open_source(name)


def open_checkpoint(workdir: pathlib.Path) -> Any:
  """Returns the best checkpoint of a run, or else its last one.

  Its base is made again as the run made it: the run's `adapter/` has the name
  of the base alone, and not how that was packed.
  """
  experiment = config.read_workdir(str(workdir)).experiment
  built = experiment.build()
  step, trained = train_eval.restore_checkpoint(experiment, built, workdir)
  origin = dict(format="run", path=str(workdir), step=step)
  name = str(getattr(experiment.model, "name", "")) or None
  return sources.from_training(
    built.loaded, trained.params, origin, name, built.params
  )


def as_diffusion(source: Any, mask_token: str, block: int | None) -> Any:
  """Returns an autoregressive source as a masked diffusion model.

  Args:
    mask_token: a token's text, its id, or `new`.
    block: tokens of a block, which see each other; None for all.

  Raises:
    UserError: there is no such token.
  """
  index = None
  if mask_token != "new":
    tokenizer = source.tokenizer
    index = tokenizer.backend.token_to_id(mask_token) if tokenizer else None
    if index is None and mask_token.isdecimal() and len(mask_token) < 9:
      index = int(mask_token)
    if index is None:
      raise UserError(
        f"--mask_token={mask_token}: is not a token of the model, expected a "
        "token's text, its id, or new"
      )
  return from_autoregressive.source_to_diffusion(source, index, block)
