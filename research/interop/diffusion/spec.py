"""What a checkpoint says about diffusion: its mask, its shift, its blocks.

It stands in config.json, whatever the weights are stored in: under `diffusion`
for models of any family that were converted or trained here, or in the fields
of families that are diffusion models anyway (`research.interop.hf.llada`,
`llada2`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from research.interop.hf import llada, llada2
from research.io.fields import Fields

FIELD = "diffusion"

_MASKS = {157_184: 156_895}
"""Of LLaDA-MoE and LLaDA 2, by the size of their vocabulary: their model cards
give the mask to those who sample, their config.json has none."""

_BLOCK = 32
"""Of LLaDA 2, likewise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """How a model's masks are to be filled.

  Attributes:
    mask_id: the token that hides others.
    shift: whether a token is predicted by the state before it, as in models
      that began autoregressive.
    block: tokens of a block where blocks see those before them and themselves;
      None where all tokens see each other.
    end: ids that end a text.
  """

  mask_id: int
  shift: bool = False
  block: int | None = None
  end: tuple[int, ...] = ()

  @property
  def predicts_next_token(self) -> bool:
    """Whether blocks of one token see what is before them, and no more."""
    return self.shift and self.block == 1

  def to_config(self) -> dict[str, Any]:
    return {
      "mask_token_id": self.mask_id,
      "shift": self.shift,
      "block": self.block,
      "eos_token_id": list(self.end),
    }


def from_config(
  config: Mapping[str, Any], where: str = "config.json"
) -> Spec | None:
  """Returns what a config.json says about diffusion, or None.

  Raises:
    UserError: a field is of the wrong type, or beyond the vocabulary.
  """
  whole = Fields(config, where)
  given = whole.object(FIELD)
  if given is not None:
    vocabulary = whole.integer("vocab_size")
    return Spec(
      mask_id=_mask(given, vocabulary),
      shift=given.flag("shift"),
      block=given.maybe_integer("block"),
      end=_ends(given, vocabulary),
    )
  kind = config.get("model_type")
  if kind not in (*llada.KINDS, llada2.KIND, "Dream"):
    return None
  if kind == llada2.KIND or llada.is_mixture(config):
    return _of_mixture(config, where)
  name = "vocab_size" if kind == "Dream" else "embedding_size"
  size = name if whole.get(name) is not None else "vocab_size"
  vocabulary = whole.integer(size)
  return Spec(
    mask_id=_mask(whole, vocabulary),
    shift=kind == "Dream",
    end=_ends(whole, vocabulary),
  )


def _of_mixture(config: Mapping[str, Any], where: str) -> Spec:
  """Returns what LLaDA-MoE's and LLaDA 2's files say, or leave out."""
  vocabulary = Fields(config, where).integer("vocab_size")
  defaults = dict(
    mask_token_id=_MASKS.get(vocabulary),
    eos_token_id=config.get("pad_token_id"),
    block_length=_BLOCK,
  )
  fields = Fields(config, where, defaults)
  blocks = config["model_type"] == llada2.KIND
  return Spec(
    mask_id=_mask(fields, vocabulary),
    block=fields.integer("block_length") if blocks else None,
    end=_ends(fields, vocabulary),
  )


def _mask(fields: Fields, vocabulary: int) -> int:
  return fields.integer("mask_token_id", least=0, most=vocabulary - 1)


def _ends(fields: Fields, vocabulary: int) -> tuple[int, ...]:
  found = fields.get("eos_token_id")
  ids = found if isinstance(found, list) else [found]
  ids = [] if found is None else ids
  if any(type(i) is not int or not 0 <= i < vocabulary for i in ids):
    raise fields.wrong(
      "eos_token_id", f"ids from 0 to {vocabulary - 1}, or null"
    )
  return tuple(ids)
