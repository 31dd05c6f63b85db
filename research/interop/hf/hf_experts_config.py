"""Experts in config.json: Mixtral's fields, Qwen3-MoE's and LLaDA 2's."""

from collections.abc import Sequence
from typing import Any

from research.interop.hf import llada2
from research.io.fields import Fields
from research.nn import presets
from research.nn.block import Block
from research.nn.moe import Moe
from research.nn.moe.routing import Routing
from research.typing import UserError

_COUNTS = ("num_local_experts", "num_experts")
KINDS = {
  "mixtral": _COUNTS,
  "qwen3_moe": (*_COUNTS, "moe_intermediate_size"),
  llada2.KIND: llada2.READ,
}
"""model_type -> the fields that mean something there and are refused
elsewhere."""

MAX_EXPERTS = 2_048
MAX_MATRICES = 2**18
"""Experts in all layers; what a file claims is written out one by one."""


def read(fields: Fields, kind: str) -> presets.Sparse | None:
  """Returns the experts that a config.json of `kind` describes, if any.

  `router_jitter_noise` and the weights of balance losses change training in
  transformers, never what a model computes; they are not read.
  """
  if kind not in KINDS:
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
    return _llada2(fields, experts, active, depth)
  return presets.Sparse(
    routing=Routing(
      experts=experts,
      active=active,
      normalised=fields.flag("norm_topk_prob"),
    ),
    hidden=fields.integer("moe_intermediate_size"),
    dense=_dense(fields, depth),
  )


def _llada2(
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
  """Returns the number of experts: transformers 5 renamed the field."""
  given = [name for name in _COUNTS if name in fields.values]
  found = {
    fields.integer(name, most=MAX_EXPERTS) for name in given or _COUNTS[:1]
  }
  if len(found) > 1:
    raise fields.wrong(_COUNTS[1], f"the same as {_COUNTS[0]}")
  return found.pop()


def _dense(fields: Fields, depth: int) -> tuple[int, ...]:
  """Returns the layers with a single feed-forward."""
  every = fields.integer("decoder_sparse_step")
  named = fields.get("mlp_only_layers") or []
  if not isinstance(named, list) or not all(
    type(i) is int and 0 <= i < depth for i in named
  ):
    raise fields.wrong("mlp_only_layers", f"numbers of layers below {depth}")
  return tuple(i for i in range(depth) if i in named or (i + 1) % every)


def spelled(kinds: Sequence[Block], model_type: str) -> dict[str, Any]:
  """Returns the fields that describe layers of such `kinds`, as read."""
  sparse = [kind.mlp for kind in kinds if isinstance(kind.mlp, Moe)]
  if not sparse or model_type not in KINDS:
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
    return out | _llada2_spelled(kinds, moe)
  return out | dict(
    decoder_sparse_step=1,
    mlp_only_layers=[
      i for i, kind in enumerate(kinds) if not isinstance(kind.mlp, Moe)
    ],
  )


def _llada2_spelled(kinds: Sequence[Block], moe: Moe) -> dict[str, Any]:
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
