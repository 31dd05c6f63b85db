"""What `experiments.convert` converts: what loads, and checkpoints of runs."""

import pathlib
from typing import Any

from experiments.core import config, runs
from research.interop import load, sources
from research.interop.diffusion import from_autoregressive
from research.typing import UserError


def source(name: str) -> Any:
  """Returns what is to be converted; a run by its own configuration.

  Args:
    name: what --model= takes, or a run whose whole model was trained.
  """
  path = pathlib.Path(name)
  written = [path / "adapter" / load.ADAPTER_CONFIG, path / "model"]
  if (path / "config.gin").is_file() and not any(p.exists() for p in written):
    return trained(path)
  return sources.open_source(name)


def trained(path: pathlib.Path) -> Any:
  """Returns the best checkpoint of a run, or else its last one.

  What it stands on is made again as the run made it: of what its `adapter/` is
  for, that says the name alone, and not how it was packed.

  Args:
    path: the run's working directory.
  """
  experiment, _ = config.read(str(path / "config.gin"))
  built = experiment.build()
  step, trained = runs.restored(experiment, built, path)
  origin = dict(format="run", path=str(path), step=step)
  name = str(getattr(experiment.model, "name", "")) or None
  return sources.from_training(built.loaded, trained.params, origin, name)


def filling(source: Any, token: str | None, block: int | None) -> Any:
  """Returns the source, as a diffusion model where there is a mask token.

  Args:
    source: a model that predicts the next token.
    token: --mask_token: a token's text, its id, or `new`; None for none.
    block: --block: tokens that see each other; None for all.
  """
  if token is None:
    if block is not None:
      raise UserError("--block: is for --mask_token, which is missing")
    return source
  index = None
  if token != "new":
    words = source.tokenizer
    index = words.backend.token_to_id(token) if words else None
    if index is None and token.isdecimal() and len(token) < 9:
      index = int(token)
    if index is None:
      raise UserError(
        f"--mask_token={token}: no token of the model's, expected its text, "
        "an id, or new"
      )
  return from_autoregressive.source_to_diffusion(source, index, block)
