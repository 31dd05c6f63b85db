"""What a model does with each token by itself, in the end.

The last layer's feed-forward, the final norm and the head see one token at a
time. A loss that needs few tokens' logits forms those alone, chunk by chunk,
and can do the rest of this there, too: less work, and less to keep.
"""

from typing import Any

import jax

from research import sharding, tree, weights
from research.nn.mlp import Mlp
from research.nn.transformer import Transformer
from research.typing import Array, Float, Params

HEAD = ("embed", "head")
"""Top-level parameters that make logits of hidden states."""

NORM = "final_norm"

_FEED = ("mlp", "mlp_norm", "post_mlp_norm")


def head_of(params: Params) -> Params:
  """Returns the parameters that `method="logits"` needs."""
  return {k: params[k] for k in HEAD if k in params}


def states(
  model: Transformer, params: Params, *inputs: Any, time: Array | None = None
) -> tuple[Float[Array, "B T D"], Params]:
  """Returns each token's state, and the parameters that `logits` needs of it.

  The states are those before the last feed-forward where that is a matter of
  each token: of a layer that is a run of its own (`tree.last_apart`), without
  experts, times, or weights that differ from token to token, on one device.
  Else they are final ones.

  Args:
    model: the Transformer.
    params: its parameters.
    *inputs: as in a call: tokens or embeddings, positions, mask.
    time: as in a call.
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
  model: Transformer, some: Params, hidden: Float[Array, "*B D"]
) -> Float[Array, "*B V"]:
  """Returns logits of states.

  Args:
    model: the Transformer.
    some: the parameters that came with the states.
    hidden: of any tokens.
  """
  for name in tree.runs(some):
    [layer] = some[name].values()
    one = jax.tree.map(lambda x: x[0], layer)
    block = model.layer_kinds()[-1]
    hidden, _ = block.apply({"params": one}, hidden, method="feed")
    hidden = model.norm.apply({"params": some[NORM]}, hidden)
  return model.apply({"params": head_of(some)}, hidden, method="logits")


def _feed(model: Transformer, params: Params) -> Params:
  """Returns the last feed-forward's parameters if it can wait, else {}."""
  name, block = tree.runs(params)[-1], model.layer_kinds()[-1]
  run = params[name]
  alone = tree.run_length(run) == 1
  if not alone or not isinstance(block.mlp, Mlp) or sharding.is_cut():
    return {}
  key = f"layer{len(run) - 1}"
  found = {k: run[key][k] for k in _FEED if k in run[key]}
  if model.clock is not None or not weights.token_wise(found):
    return {}
  return {name: {key: found}}
