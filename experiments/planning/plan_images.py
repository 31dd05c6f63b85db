"""Plans images: what one costs a published model, before anything is compiled.

No flags, no gin; `experiments.plan --preset=` is the command.
"""

import dataclasses
from typing import Any

from experiments.core import cli
from research.typing import UserError
from research.vlm import arithmetic, presets

MOST_PIXELS = 1 << 20
"""Along a side."""


def size(given: str) -> tuple[int, int]:
  """Returns what `480x640` stands for: height and width, in pixels.

  Raises:
    UserError: it stands for nothing.
  """
  parts = given.split("x")
  if len(parts) != 2 or not all(
    p.isdecimal() and 0 < int(p) < MOST_PIXELS for p in parts
  ):
    raise UserError(
      f"--image_size={given}: expected HEIGHTxWIDTH in pixels, e.g. 480x640"
    )
  height, width = map(int, parts)
  return height, width


def plan(name: str, given: str, text: int = 0) -> dict[str, Any]:
  """Returns what an image of a size costs a published model, and prints it.

  Raises:
    UserError: there is no such preset, or no such size.
  """
  height, width = size(given)
  preset = presets.preset(name)
  cost = arithmetic.image_cost(preset, height, width, text)
  cli.say(arithmetic.describe_cost(preset, cost, name))
  return {
    "preset": name,
    **dataclasses.asdict(cost),
    "encoder_share": cost.encoder_share,
  }
