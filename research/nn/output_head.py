"""Token-wise end of the model: last feed-forward, final norm, output head.

These operate on each token independently. A loss that needs the logits of few
tokens computes them chunk by chunk for those tokens only, and can do the same
for the last feed-forward and norm, which saves compute and activation memory.
"""

from typing import Any

import jax

from research import sharding, tree, weights
from research.nn.mlp import Mlp
from research.nn.transformer import Transformer
from research.typing import Array, Float, Params

NORM = "final_norm"

_FEED = ("mlp", "mlp_norm", "post_mlp_norm")


def head_of(params: Params) -> Params:
  """Returns the parameters that `Transformer.logits` needs.

  The head, or the embedding where that is the head (`tied`). Not both: a loss
  accumulates a gradient of each parameter that it gets.
  """
  name = "head" if "head" in params else "embed"
  return {name: params[name]}


def head_inputs(
  model: Transformer, params: Params, *inputs: Any, time: Array | None = None
) -> tuple[Float[Array, "B T D"], Params]:
  """Returns each token's hidden state, and the parameters for `logits`.

  If possible, these are the states before the last feed-forward. That requires
  a last layer in a run of its own (`tree.split_last_layer`), without experts,
  time conditioning, anything behind its feed-forward, or weights that depend on
  other tokens, and no mesh. Otherwise they are the final hidden states.

  Args:
    model: the Transformer.
    params: its parameters.
    *inputs: as for `Transformer.__call__`: tokens or embeddings, positions,
      mask.
    time: as for `Transformer.__call__`.
  """
  feed = _feed(model, params)
  if not feed or time is not None:
    hidden, _ = model.apply({"params": params}, *inputs, time=time)
    return hidden, head_of(params)
  hidden = model.apply(
    {"params": params}, *inputs, method="before_feed_forward"
  )
  return hidden, head_of(params) | {NORM: params[NORM]} | feed


def logits(
  model: Transformer, params: Params, hidden: Float[Array, "*B D"]
) -> Float[Array, "*B V"]:
  """Returns the logits of states from `head_inputs`.

  Args:
    model: the Transformer.
    params: the parameters that `head_inputs` returned.
    hidden: its states, of any tokens.
  """
  for name in tree.runs(params):
    [layer] = params[name].values()
    layer_params = jax.tree.map(lambda x: x[0], layer)
    block = model.layer_kinds()[-1]
    hidden, _ = block.apply(
      {"params": layer_params}, hidden, method="feed_forward"
    )
    hidden = model.norm.apply({"params": params[NORM]}, hidden)
  return model.apply({"params": head_of(params)}, hidden, method="logits")


def _feed(model: Transformer, params: Params) -> Params:
  """Returns the last feed-forward's parameters if it can be split off."""
  name, block = tree.runs(params)[-1], model.layer_kinds()[-1]
  run = params[name]
  alone = tree.run_length(run) == 1
  if not alone or not isinstance(block.mlp, Mlp) or sharding.is_cut():
    return {}
  key = f"layer{len(run) - 1}"
  feed_params = {k: run[key][k] for k in _FEED if k in run[key]}
  after = block.per_layer is not None or block.output_scale is not None
  timed = model.time_embedding is not None
  if after or timed or not weights.token_wise(feed_params):
    return {}
  return {name: {key: feed_params}}
