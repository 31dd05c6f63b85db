"""Rows of some tokens beside LoRA: trainable_token_indices of a configuration.

PEFT takes a list for the embedding, or lists by modules' names; where the head
is tied to the embedding, it has the embedding's rows.
"""

import dataclasses
from collections.abc import Mapping

from research.interop.peft import peft_config, peft_whole
from research.interop.peft.peft_naming import Naming
from research.io.fields import Fields
from research.lora.method import Method
from research.lora.methods import tokens
from research.lora.methods.tokens import Tokens
from research.typing import UserError


def methods(
  fields: Fields, taken: Mapping[str, Method], tied: bool, naming: Naming
) -> dict[str, Tokens]:
  """Returns which tokens get rows of their own, by address.

  Args:
    fields: the configuration.
    taken: what is adapted already.
    tied: whether the base's head is its embedding; both then have the rows.
    naming: of the base.
  """
  sides = {"embed": naming.embedding, "head": naming.head}
  name = peft_config.TOKENS
  found = fields.get(name)
  if found in (None, [], {}):
    return {}
  if isinstance(found, list):
    found = {naming.embedding: found}
  inner = dataclasses.replace(fields, values={name: found}).object(name)
  out: dict[str, tuple[int, ...]] = {}
  for key in inner.values if inner else ():
    matched = [a for a, m in sides.items() if f".{m}".endswith(f".{key}")]
    if len(matched) != 1:
      raise fields.wrong(name, "token ids by the embedding's or head's name")
    out[matched[0]] = tokens.read_ids(inner, key)
  if tied and "head" in out and out.pop("head") != out.get("embed"):
    raise fields.wrong(name, "the same of the embedding, to which it is tied")
  whole = peft_config.whole_modules(fields)
  for address in out:
    module = sides[address]
    if address in taken or peft_whole.saved_whole(module, whole):
      raise fields.wrong(
        name, f"none of {module}, which target_modules or modules_to_save name"
      )
  return {
    address: Tokens(ids=ids, beside=True).for_matrix(sides[address], {})
    for address, ids in out.items()
  }


def check(fields: Fields, found: Mapping[str, Method], count: int) -> None:
  """Raises UserError for rows of tokens that a vocabulary has not."""
  for address, method in found.items():
    if isinstance(method, Tokens) and max(method.ids) >= count:
      raise UserError(
        f"{fields.where}: rows of token {max(method.ids)} for {address}, "
        f"expected ids below {count}; the file holds no longer embedding"
      )
