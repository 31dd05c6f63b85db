"""Which adapter goes with which prompt of `experiments.generate`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from research import weights
from research.generation import generate
from research.interop import adapters
from research.interop.loaded import Loaded
from research.lora.serving import pool
from research.lora.serving.pool import BASE
from research.quant.layouts import cpu_layout
from research.typing import UserError


def named(texts: Sequence[str]) -> tuple[list[str], dict[str, str]]:
  """Returns the adapters' names in the order of their flags, and the places.

  Raises:
    UserError: one of them is no NAME=DIR, or takes a name again.
  """
  names, places = [], {}
  for text in texts:
    name, equals, folder = text.partition("=")
    again = name in places or name == BASE
    if not (name and equals and folder) and not (again and not equals):
      raise UserError(
        f"--adapter={text}: expected NAME=DIR, e.g. mine=runs/a/adapter"
      )
    if equals and again:
      raise UserError(f"--adapter={text}: {name} is taken, choose another name")
    names.append(name)
    places |= {name: folder} if equals else {}
  return names, places


def rows(
  prompts: Sequence[str], names: Sequence[str]
) -> list[tuple[str, str | None]]:
  """Returns (prompt, adapter's name or None) of each row of the batch.

  Raises:
    UserError: there are neither as many of both, nor one of either.
  """
  prompts, names = list(prompts), list(names) or [None]
  if len(names) == 1:
    names *= len(prompts)
  if len(prompts) == 1:
    prompts *= len(names)
  if len(names) != len(prompts):
    raise UserError(
      f"--adapter: found {len(names)} for {len(prompts)} prompts, expected "
      "one for all or one for each; a name may be given again"
    )
  return list(zip(prompts, names, strict=True))


def on_all_rows(
  loaded: Loaded, names: Sequence[str | None], places: Mapping[str, str]
) -> Loaded:
  """Returns the model under the adapter of all rows, if they share one.

  Images come after it: an adapter of the embedding leaves them as they are.

  Args:
    places: name -> an adapter's directory or file; empty for none.
  """
  if not places or len(set(names)) > 1:
    return loaded
  place = places[names[0]]
  params = adapters.load_adapter(place, loaded.params, loaded.model)
  return dataclasses.replace(loaded, params=params)


def prepared(
  loaded: Loaded, names: Sequence[str | None], places: Mapping[str, str]
) -> Any:
  """Returns parameters for decoding, each row's adapter in them."""

  def ready(params):
    fast = cpu_layout.for_decoding(params, loaded.model.dtype)
    return generate.prepare(fast, loaded.model)

  if not places or len(set(names)) == 1:
    return ready(loaded.params)
  adapter_pool = pool.from_directories(
    loaded.params, loaded.model, places, adapters.read_factors
  )
  adapter_pool, ids = pool.use(adapter_pool, names)
  return weights.bind(ready(adapter_pool.params), ids=ids)
