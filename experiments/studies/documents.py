"""Documents of a source, as arrays."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.typing import Array, Int


def documents(source: Any, split: str, count: int) -> Int[Array, "N S"]:
  """Returns so many documents of a source, equally long."""
  made = dataclasses.replace(source, split=split, count=count)
  return jnp.asarray(np.stack([e.tokens for e in made.examples(None)]))
