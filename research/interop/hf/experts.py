"""Experts' matrices stacked in a file, taken apart into one tensor each.

The Hub's files hold each expert's matrices under names of their own, and so
does what transformers 5 writes by default. With `save_original_format=False`
it writes the layout that it computes with:

  mlp.experts.gate_up_proj  [E, 2F, D]  gate above up
  mlp.experts.down_proj     [E, D, F]
  mlp.gate.weight           [E, D]      whatever the family calls its router
"""

import dataclasses
import re
from collections.abc import Mapping

from research.interop.hf import names as hf_names
from research.interop.parts import Address
from research.interop.quantized import hf_quant
from research.nn.moe import Moe
from research.nn.transformer import Transformer

_STACKED = re.compile(
  r"model\.layers\.(0|[1-9]\d{0,5})\.mlp\."
  r"(experts\.gate_up_proj|experts\.down_proj|gate\.weight)"
)
_HELD = {
  "experts.gate_up_proj": ("mlp/experts/gate", "mlp/experts/up"),
  "experts.down_proj": ("mlp/experts/down",),
}


def apart(
  model: Transformer,
  rows: hf_names.Table,
  tensors: Mapping[str, hf_quant.Tensor],
) -> dict[str, hf_quant.Tensor]:
  """Returns `tensors` with stacked experts under the names of `rows`, unread.

  What does not fit the model, or is in the file twice, is left as it is, and
  so will be called superfluous; nothing is made in proportion to a shape that
  a file claims.
  """
  kinds, out = model.layer_kinds(), {}
  if not any(_STACKED.fullmatch(name) for name in tensors):
    return dict(tensors)
  for name, tensor in tensors.items():
    found = _STACKED.fullmatch(name)
    layer = int(found[1]) if found else len(kinds)
    moe = kinds[layer].mlp if layer < len(kinds) else None
    made = {name: tensor}
    if isinstance(moe, Moe) and found[2] in _HELD:
      made = _matrices(name, tensor, layer, moe, _HELD[found[2]], rows)
    elif isinstance(moe, Moe):
      theirs, _ = rows.theirs(Address(layer, "mlp/router"))
      made = {theirs: tensor}
    twice = any(key in tensors and key != name for key in made)
    out |= {name: tensor} if twice else made
  return out


def _matrices(name, tensor, layer, moe, paths, rows):
  experts, shape = moe.routing.experts, tensor.shape
  if len(shape) != 3 or shape[0] != experts or shape[1] % len(paths):
    return {name: tensor}
  one = (shape[1] // len(paths), shape[2])
  size = tensor.raw.size // (experts * len(paths))
  out = {}
  for e in range(experts):
    for j, path in enumerate(paths):
      theirs, _ = rows.theirs(Address(layer, path, e))
      start = (e * len(paths) + j) * size
      raw = tensor.raw.part(start, start + size)
      out[theirs] = dataclasses.replace(tensor, shape=one, raw=raw)
  return out
