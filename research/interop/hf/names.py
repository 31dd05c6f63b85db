"""What Hugging Face calls our parameters: one table for every family.

Each row pairs a path of ours, within a layer or outside of them, with the name
in a checkpoint, and says whether the matrix is stored transposed (theirs are
`[out, in]`, ours `[in, out]`). Read in either direction it is the importer,
the exporter, and the naming of PEFT's adapters. Which rows a model has follows
from its own parameters; families differ only in what they call their norms.
"""

import dataclasses
import re
from collections.abc import Iterator

from research.interop.parts import Address
from research.nn.moe import Moe
from research.nn.transformer import Transformer

LAYER_PREFIX = "model.layers."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EXPERT = "<e>"
_NUMBER = re.compile(r"0|[1-9]\d{0,5}")


@dataclasses.dataclass(frozen=True)
class Row:
  """One parameter.

  Attributes:
    ours: path within a layer (`attention/q`) or outside (`embed`).
    theirs: name after `model.layers.<i>.`, or the whole name outside; `<e>`
      in it is the expert's number.
    transposed: whether theirs is ours, transposed.
  """

  ours: str
  theirs: str
  transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
  """The rows outside of layers, and those of each layer."""

  outside: tuple[Row, ...]
  layer: tuple[Row, ...]

  def rows(self) -> Iterator[Row]:
    yield from self.outside
    yield from self.layer

  def theirs(self, address: Address) -> tuple[str, bool]:
    """Returns (their name, transposed) of a parameter of ours.

    Raises:
      KeyError: no row has that path.
    """
    rows = self.outside if address.layer is None else self.layer
    row = {row.ours: row for row in rows}[address.path]
    if (EXPERT in row.theirs) != (address.expert is not None):
      raise KeyError(str(address))
    name = row.theirs.replace(EXPERT, str(address.expert))
    prefix = "" if address.layer is None else f"{LAYER_PREFIX}{address.layer}."
    return prefix + name, row.transposed

  def ours(self, name: str) -> Address | None:
    """Returns the parameter of ours that they call `name`, or None."""
    rows, layer = self.outside, None
    found = re.fullmatch(rf"model\.layers\.({_NUMBER.pattern})\.(.*)", name)
    if found:
      rows, layer, name = self.layer, int(found[1]), found[2]
    for row in rows:
      if row.theirs == name:
        return None if EXPERT in name else Address(layer, row.ours)
      before, expert, after = row.theirs.partition(EXPERT)
      if expert and name.startswith(before) and name.endswith(after):
        number = name[len(before) : len(name) - len(after)]
        if _NUMBER.fullmatch(number):
          return Address(layer, row.ours, int(number))
    return None


_OUTSIDE = (
  Row("embed", EMBEDDING),
  Row("final_norm/scale", "model.norm.weight"),
  Row("head", HEAD, transposed=True),
)

_ATTENTION = (
  *(
    Row(f"attention/{x}", f"self_attn.{x}_proj.weight", transposed=True)
    for x in "qkvo"
  ),
  *(Row(f"attention/{x}_bias", f"self_attn.{x}_proj.bias") for x in "qkvo"),
  *(
    Row(f"attention/{x}_norm/scale", f"self_attn.{x}_norm.weight") for x in "qk"
  ),
)

_MLP = (
  *(
    Row(f"mlp/{x}", f"mlp.{x}_proj.weight", transposed=True)
    for x in ("gate", "up", "down")
  ),
  *(Row(f"mlp/{x}_bias", f"mlp.{x}_proj.bias") for x in ("gate", "up", "down")),
)

_NORMS = (
  Row("attention_norm/scale", "input_layernorm.weight"),
  Row("mlp_norm/scale", "post_attention_layernorm.weight"),
)

# Gemma 2 and 3. The name that means "before the MLP" above means "after the
# attention" here.
_SANDWICH_NORMS = (
  Row("attention_norm/scale", "input_layernorm.weight"),
  Row("post_attention_norm/scale", "post_attention_layernorm.weight"),
  Row("mlp_norm/scale", "pre_feedforward_layernorm.weight"),
  Row("post_mlp_norm/scale", "post_feedforward_layernorm.weight"),
)

# Qwen3-MoE; its dense layers have the rows above. A bias of the router and
# shared experts are LLaDA 2's.
_EXPERTS = (
  Row("mlp/router", "mlp.gate.weight", transposed=True),
  Row("mlp/router_bias", "mlp.gate.expert_bias"),
  *(
    Row(f"mlp/shared/{x}", f"mlp.shared_experts.{x}_proj.weight", True)
    for x in ("gate", "up", "down")
  ),
  *(
    Row(f"mlp/experts/{x}", f"mlp.experts.{EXPERT}.{x}_proj.weight", True)
    for x in ("gate", "up", "down")
  ),
)

_MIXTRAL = (
  Row("mlp/router", "block_sparse_moe.gate.weight", transposed=True),
  *(
    Row(
      f"mlp/experts/{x}", f"block_sparse_moe.experts.{EXPERT}.{w}.weight", True
    )
    for x, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
  ),
)

# What layers get of each token besides, and a factor of their output.
_PER_LAYER_OUTSIDE = (
  Row("per_layer/embed", "model.embed_tokens_per_layer.weight"),
  Row("per_layer/project", "model.per_layer_model_projection.weight", True),
  Row("per_layer/norm/scale", "model.per_layer_projection_norm.weight"),
)
_PER_LAYER = (
  Row("per_layer/gate", "per_layer_input_gate.weight", transposed=True),
  Row("per_layer/down", "per_layer_projection.weight", transposed=True),
  Row("per_layer/norm/scale", "post_per_layer_input_norm.weight"),
  Row("output_scale/scale", "layer_scalar"),
)

PLAIN = Table(_OUTSIDE, _ATTENTION + _MLP + _NORMS)
SANDWICH = Table(_OUTSIDE, _ATTENTION + _MLP + _SANDWICH_NORMS)
GEMMA4 = Table(
  _OUTSIDE + _PER_LAYER_OUTSIDE,
  _ATTENTION + _MLP + _SANDWICH_NORMS + _PER_LAYER,
)
SPARSE = Table(_OUTSIDE, _ATTENTION + _MLP + _EXPERTS + _NORMS)
MIXTRAL = Table(_OUTSIDE, _ATTENTION + _MIXTRAL + _NORMS)


def table(model: Transformer) -> Table:
  """Returns the names of `model`'s parameters in Hugging Face files."""
  kinds = model.layer_kinds()
  if any(isinstance(kind.mlp, Moe) for kind in kinds):
    # The families with experts differ in what they do to queries and keys.
    mixtral = kinds[0].attention.qk_norm is None
    return MIXTRAL if mixtral else SPARSE
  if kinds[0].output_scale is not None:
    return GEMMA4
  return PLAIN if kinds[0].post_norm is None else SANDWICH


def unused(model: Transformer) -> set[str]:
  """Returns names that files may have beside `model`'s: what it never reads.

  Layers that borrow keys and values were trained with a copy of their own.
  """
  return {
    f"{LAYER_PREFIX}{i}.self_attn.{x}.weight"
    for i, kind in enumerate(model.layer_kinds())
    if kind.attention.kv == "borrowed"
    for x in ("k_proj", "v_proj", "k_norm")
  }


BUFFERS = re.compile(
  r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|"
  r"model\.layers\.\d+\.self_attn\.(bias|masked_bias)"
)
"""Tables that old files carry along and every reader computes itself."""
