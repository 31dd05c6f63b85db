"""Experts in Hugging Face's directories: fields of config.json, and tensors.

The Hub's files hold each expert's matrices under names of their own, and so
does what transformers 5 writes by default. With `save_original_format=False`
it writes the layout that it computes with:

  mlp.experts.gate_up_proj  [E, 2F, D]  gate above up
  mlp.experts.down_proj     [E, D, F]
  mlp.gate.weight           [E, D]      whatever the family calls its router

`unstack` takes it apart into one tensor each.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from research.interop import quantized
from research.interop.hf import llada2
from research.interop.hf import names as hf_names
from research.interop.hf.families import COUNTS, MODEL_TYPES
from research.interop.parts import Address
from research.io.fields import Fields
from research.nn import presets
from research.nn.block import Block
from research.nn.moe import Moe
from research.nn.moe.routing import Routing
from research.nn.transformer import Transformer
from research.typing import UserError

MAX_EXPERTS = 2_048
MAX_MATRICES = 2**18
"""Experts in all layers; what a file claims is written out one by one."""

STACKS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
"""Of a layer's experts, as the model computes with them: theirs -> ours."""

_STACKED = re.compile(
  rf"model\.layers\.(0|[1-9]\d{{0,5}})\.mlp\."
  rf"(experts\.(?P<stack>{'|'.join(STACKS)})|gate\.weight)"
)


def from_config(fields: Fields, kind: str) -> presets.Sparse | None:
  """Returns the experts that a config.json of `kind` describes, if any.

  `router_jitter_noise` and the weights of balance losses change training in
  transformers, never what a model computes; they are not read.
  """
  if not MODEL_TYPES[kind].expert_fields:
    return None
  experts = _count(fields)
  depth = fields.integer("num_hidden_layers")
  if experts * depth > MAX_MATRICES:
    raise UserError(
      f"{fields.where}: {experts} experts in {depth} layers, expected at most "
      f"{MAX_MATRICES} in all"
    )
  active = fields.integer("num_experts_per_tok")
  if active > experts:
    raise fields.wrong("num_experts_per_tok", f"at most {experts} experts")
  if kind == "mixtral":
    routing = Routing(experts=experts, active=active)
    return presets.Sparse(
      routing=routing, hidden=fields.integer("intermediate_size")
    )
  if kind == llada2.KIND:
    return _llada2_from_config(fields, experts, active, depth)
  return presets.Sparse(
    routing=Routing(
      experts=experts,
      active=active,
      normalised=fields.flag("norm_topk_prob"),
    ),
    hidden=fields.integer("moe_intermediate_size"),
    dense=_dense(fields, depth),
  )


def _llada2_from_config(
  fields: Fields, experts: int, active: int, depth: int
) -> presets.Sparse:
  """Returns LLaDA 2's experts, whose choice is DeepSeek-V3's."""
  dense = fields.integer("first_k_dense_replace", least=0, most=depth)
  return presets.Sparse(
    routing=Routing(
      experts=experts,
      active=active,
      score="sigmoid",
      normalised=active > 1,
      scale=fields.number("routed_scaling_factor"),
      biased=True,
      groups=fields.integer("n_group"),
      active_groups=fields.integer("topk_group"),
      group_score="top2",
    ),
    hidden=fields.integer("moe_intermediate_size"),
    shared=fields.integer("num_shared_experts", least=0),
    dense=tuple(range(dense)),
  )


def _count(fields: Fields) -> int:
  given = [name for name in COUNTS if name in fields.values]
  found = {
    fields.integer(name, most=MAX_EXPERTS) for name in given or COUNTS[:1]
  }
  if len(found) > 1:
    raise fields.wrong(COUNTS[1], f"the same as {COUNTS[0]}")
  return found.pop()


def _dense(fields: Fields, depth: int) -> tuple[int, ...]:
  every = fields.integer("decoder_sparse_step")
  named = fields.get("mlp_only_layers") or []
  if not isinstance(named, list) or not all(
    type(i) is int and 0 <= i < depth for i in named
  ):
    raise fields.wrong("mlp_only_layers", f"numbers of layers below {depth}")
  return tuple(i for i in range(depth) if i in named or (i + 1) % every)


def to_config(kinds: Sequence[Block], model_type: str) -> dict[str, Any]:
  """Returns the fields that describe layers of such `kinds`, as read."""
  sparse = [kind.mlp for kind in kinds if isinstance(kind.mlp, Moe)]
  if not sparse or not MODEL_TYPES[model_type].expert_fields:
    return {}
  moe = sparse[0]
  routing = moe.routing
  out: dict[str, Any] = dict(num_experts_per_tok=routing.active)
  if model_type == "mixtral":
    # Mixtral has no other layers, and one name for their size.
    return out | dict(
      num_local_experts=routing.experts, intermediate_size=moe.hidden
    )
  out |= dict(
    num_experts=routing.experts,
    moe_intermediate_size=moe.hidden,
    norm_topk_prob=routing.normalised,
  )
  if model_type == llada2.KIND:
    return out | _llada2_to_config(kinds, moe)
  return out | dict(
    decoder_sparse_step=1,
    mlp_only_layers=[
      i for i, kind in enumerate(kinds) if not isinstance(kind.mlp, Moe)
    ],
  )


def _llada2_to_config(kinds: Sequence[Block], moe: Moe) -> dict[str, Any]:
  routing = moe.routing
  shared = moe.shared.hidden // moe.hidden if moe.shared else 0
  return dict(
    num_shared_experts=shared,
    n_group=routing.groups,
    topk_group=routing.active_groups,
    routed_scaling_factor=routing.scale,
    score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    first_k_dense_replace=next(
      i for i, kind in enumerate(kinds) if isinstance(kind.mlp, Moe)
    ),
  )


def unstack(
  model: Transformer,
  rows: hf_names.Table,
  tensors: Mapping[str, quantized.Tensor],
) -> dict[str, quantized.Tensor]:
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
    if isinstance(moe, Moe) and found["stack"]:
      paths = [f"mlp/experts/{part}" for part in STACKS[found["stack"]]]
      made = _matrices(name, tensor, layer, moe, paths, rows)
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
