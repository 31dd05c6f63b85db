"""How the next token is chosen, as the flags of `generate` say."""

import math

from research.errors import UserError
from research.generation import sampling
from research.generation.sampling import Sampling


def of_flags(
  *,
  temperature: float | None,
  repetition_penalty: float | None,
  seeded: bool = False,
  **rules: float | int | None,
) -> Sampling:
  """Returns what the flags say about choosing tokens.

  Args:
    temperature: of --temperature; None for 0, or 1 if a rule is given.
    repetition_penalty: of --repetition_penalty.
    seeded: whether --seed is given.
    **rules: of --top_k, --top_p and --min_p; None if not given.

  Raises:
    UserError: a flag has no effect or no meaning.
  """
  given = [name for name, value in rules.items() if value is not None]
  if temperature is None:
    temperature = 1.0 if given else 0.0
  if not 0 <= temperature < math.inf:
    raise UserError(
      f"--temperature={temperature:g}: expected a number above 0, or 0, which "
      "takes the likeliest token"
    )
  given += ["seed"] * seeded
  if temperature == 0 and given:
    raise UserError(
      f"--{given[0]}: has no effect at --temperature=0, which takes the "
      "likeliest token; give a temperature above 0"
    )
  found = Sampling(
    temperature=temperature or None,
    repetition_penalty=repetition_penalty,
    **rules,
  )
  try:
    sampling.check(found)
  except UserError as error:
    raise UserError(f"--{error}") from error
  return found
