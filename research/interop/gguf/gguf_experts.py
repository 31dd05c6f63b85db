"""Experts in a GGUF file: keys, names, and matrices stacked in one tensor.

llama.cpp keeps the matrices of a layer's experts in one tensor, expert after
expert (`ffn_up_exps [E, F, D]`). Mixtral is architecture "llama" with experts,
Qwen3-MoE is "qwen3moe"; it divides the chosen scores by their sum in both. A
router stays in float32.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from research.interop.gguf import Tensor
from research.io import mapped
from research.nn import presets
from research.nn.block import Block
from research.nn.moe import Moe
from research.nn.moe.routing import Routing
from research.typing import UserError

ROUTER = "mlp/router"
NAMES = {
  ROUTER: ("ffn_gate_inp.weight", "ED"),
  "mlp/experts/gate": ("ffn_gate_exps.weight", "EFD"),
  "mlp/experts/up": ("ffn_up_exps.weight", "EFD"),
  "mlp/experts/down": ("ffn_down_exps.weight", "EDF"),
}
"""Our path -> GGUF's name after `blk.N.`, and letters of its shape."""

OWN_SIZE = ("qwen3moe",)
"""Architectures whose experts have a size of their own."""


def read(keys: Any, architecture: str, hidden: int) -> presets.Sparse | None:
  """Returns the experts that a file's keys describe, or None.

  Args:
    keys: the architecture's, see `config`.
    architecture: of the file.
    hidden: its `feed_forward_length`.

  Raises:
    UserError: a key is missing, or more experts are used than there are.
  """
  own = architecture in OWN_SIZE
  if not own and not keys.left.get("expert_count"):
    return None
  experts = keys.needed("expert_count")
  active = keys.needed("expert_used_count")
  if active > experts:
    keys.fail("expert_used_count", active, f"at most the {experts} experts")
  if own:
    hidden = keys.needed("expert_feed_forward_length")
  routing = Routing(experts=experts, active=active)
  return presets.Sparse(routing=routing, hidden=hidden)


def spelled(kinds: Sequence[Block], architecture: str) -> dict[str, int]:
  """Returns the keys of layers' experts, without the architecture's name.

  Raises:
    UserError: some layers have experts, and others none.
  """
  dense = [i for i, kind in enumerate(kinds) if not isinstance(kind.mlp, Moe)]
  if len(dense) == len(kinds):
    return {}
  if dense:
    raise UserError(
      f"GGUF: layer {dense[0]} has no experts, and others have; expected them "
      f"in every layer of a {architecture!r}. Keep the model as --format=hf"
    )
  routing = kinds[0].mlp.routing
  out = {
    "expert_count": routing.experts,
    "expert_used_count": routing.active,
  }
  if architecture in OWN_SIZE:
    out["expert_feed_forward_length"] = kinds[0].mlp.hidden
  return out


def one(tensor: Tensor, expert: int) -> Tensor:
  """Returns an expert's matrix of a stacked tensor; no byte is read."""
  count, *shape = tensor.shape
  size = tensor.stored.size // count
  start, stop = expert * size, (expert + 1) * size
  if isinstance(tensor.stored, mapped.Bytes):
    stored = tensor.stored.part(start, stop)
  else:
    stored = tensor.stored[start:stop]
  return dataclasses.replace(tensor, shape=tuple(shape), stored=stored)
