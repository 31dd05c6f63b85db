"""Which adapter goes with which prompt of `experiments.generate`."""

from collections.abc import Sequence

from research.lora.serving.pool import BASE
from research.typing import UserError


def named(texts: Sequence[str]) -> tuple[list[str], dict[str, str]]:
  """Returns the adapters' names in the order of their flags, and the places.

  Args:
    texts: of --adapter.

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

  Args:
    prompts: of --prompt.
    names: of adapters, from `named`.

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
