"""Settings of KV cache quantization, and their command-line form.

`init_cache(..., kv=KVQuantizer(bits_k=8, bits_v=4))` returns a quantized cache
with the interface of the full one. `parse` reads the short form of a command
line: `k8v4,residual=0,key=per_token`.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from research.quant.kv.kv_cache import KeysOrValues, QuantizedLayer
from research.quant.kv.kv_grid import BITS, Grid
from research.ranges import NonNegativeInt, OneOf, PositiveInt, Ranged
from research.typing import UserError

AXES = ("per_channel", "per_token", "hadamard+per_token")
"""Numbers that share a scale: tokens of a channel, or channels of a token."""


@dataclasses.dataclass(frozen=True)
class KVQuantizer(Ranged):
  """Settings of a quantized KV cache: KIVI's, sinks, rotation, key bias.

  Attributes:
    key, value: numbers that share a scale, one of `AXES`; with `hadamard`,
      each head is first rotated by a Hadamard matrix, which spreads large
      channels.
    bits_k, bits_v: 2, 4, 8, `"int8"`, `"fp8"`, or 16 for the model's dtype.
    group: numbers that share a scale.
    residual: number of recent tokens in full precision; per channel, that many
      tokens are packed at a time, at least a group.
    sink_tokens: number of first tokens in full precision, in layers without a
      window.
    less_bias: whether the key projection's bias, rotated to each position, is
      subtracted before packing: Qwen 2's is far larger than the rest of its
      keys.
  """

  key: OneOf(*AXES) = "per_channel"
  value: OneOf(*AXES) = "per_token"
  bits_k: OneOf(*BITS) = 4
  bits_v: OneOf(*BITS) = 4
  group: PositiveInt = 32
  residual: NonNegativeInt = 128
  sink_tokens: NonNegativeInt = 0
  less_bias: bool = False
  scale_dtype: OneOf("float16", "bfloat16", "float32") = "float16"

  def __post_init__(self):
    super().__post_init__()
    if self.residual % self.group and any(g.packs_blocks for g in self.grids):
      raise UserError(
        f"kv residual: found {self.residual}, expected a multiple of the group "
        f"of {self.group} tokens, which are packed together per channel"
      )

  @property
  def grids(self) -> tuple[Grid, Grid]:
    def grid(axis, bits):
      return Grid(
        bits,
        axis == "per_channel",
        self.group,
        axis.startswith("hadamard"),
        self.scale_dtype,
      )

    return grid(self.key, self.bits_k), grid(self.value, self.bits_v)

  def for_layers(self, layers: Sequence[int]) -> "KVQuantizer":
    """Returns the settings for some layers: itself for all."""
    del layers
    return self

  def empty(
    self,
    lead: tuple[int, ...],
    slots: int,
    dim: int,
    dtype: Any,
    windowed: bool = False,
  ) -> QuantizedLayer:
    """Returns an empty cache of a layer, or of a run of layers.

    Args:
      lead: `[L, B, K]`, or `[B, K]` for one layer.
      slots: number of positions, rounded up to a multiple of the ring buffer.
      windowed: whether new positions overwrite old ones.

    Raises:
      UserError: the group does not divide heads of `dim` channels.
    """
    grids = self.grids
    for grid, what in zip(grids, ("kv keys", "kv values"), strict=True):
      grid.check(dim, what)
    first = 0 if windowed else min(self.sink_tokens, slots - 1)
    unit = max(self.residual, 1)
    if any(g.packs_blocks for g in grids):
      unit = max(unit, self.group)
    slots = -(-(slots - first) // unit) * unit

    def whole(size):
      # Separate arrays, since a donated buffer may occur only once.
      return jnp.zeros((*lead, size, dim), dtype) if size else None

    def side(grid):
      ring = unit if grid.packs_blocks else self.residual
      ring = 0 if grid.unquantized else ring
      return KeysOrValues(
        grid.empty(lead, slots, dim, dtype), whole(ring), grid
      )

    sinks = (whole(first), whole(first)) if first else None
    return QuantizedLayer(*map(side, grids), sinks, self.less_bias)


@dataclasses.dataclass(frozen=True)
class KVByLayer:
  """Per-layer settings; often the first and last layers are more sensitive.

  Attributes:
    default: settings of all other layers.
    others: (layer, settings), each layer at most once.
  """

  default: KVQuantizer
  others: tuple[tuple[int, KVQuantizer], ...] = ()

  def check_depth(self, depth: int) -> None:
    """Raises UserError for settings of a layer that a model has not."""
    beyond = [i for i, _ in self.others if i >= depth]
    if beyond:
      raise UserError(
        f"kv: found layer {beyond[0]}, expected 0 to {depth - 1}, the model's"
      )

  def for_layers(self, layers: Sequence[int]) -> KVQuantizer:
    """Returns the settings of layers that are scanned together.

    Raises:
      UserError: the layers have different settings.
    """
    others = dict(self.others)
    found = {others.get(i, self.default) for i in layers}
    if len(found) > 1:
      raise UserError(
        f"kv: found layers {layers[0]} to {layers[-1]} with different bits, "
        "expected the same in a run of layers.\nUnroll the parameters "
        "(`research.tree.unroll`)."
      )
    return found.pop()


def parse(text: str) -> KVQuantizer | KVByLayer | None:
  """Parses a command line's settings, such as `k8v4,group=64`; "" is None.

  Args:
    text: `kAvB` with A and B of `BITS`, or one of them for both; then
      `field=value` for other fields of `KVQuantizer`. Settings of single layers
      follow: `k4v4;0,29=k8v8`.

  Raises:
    UserError: the text does not have that form.
  """
  if not text:
    return None
  first, *rest = text.split(";")
  default, others = _parse_one(first, text), {}
  for part in rest:
    layers, equals, own = part.partition("=")
    if not equals or not re.fullmatch(r"\d+(,\d+)*", layers):
      raise UserError(
        f"kv={text}: found {part!r}, expected layers and their bits, e.g. "
        "0,29=k8v8"
      )
    for layer in map(int, layers.split(",")):
      if layer in others:
        raise UserError(f"kv={text}: found layer {layer} twice, expected once")
      others[layer] = _parse_one(own, text)
  return KVByLayer(default, tuple(others.items())) if others else default


def _parse_one(part: str, text: str) -> KVQuantizer:
  head, *rest = part.split(",")
  fields = _bits(head, text)
  known = {f.name: f for f in dataclasses.fields(KVQuantizer)}
  for name in ("bits_k", "bits_v"):
    del known[name]
  for word in rest:
    name, equals, value = word.partition("=")
    if not equals or name not in known:
      near = difflib.get_close_matches(name, known, 1) or sorted(known)
      raise UserError(
        f"kv={text}: found {word!r}, expected one of {', '.join(known)} as "
        f"NAME=VALUE, e.g. {near[0]}={known[near[0]].default}"
      )
    fields[name] = _value(known[name], value, text)
  return KVQuantizer(**fields)


def _bits(head: str, text: str) -> dict[str, int | str]:
  names = {str(b): b for b in BITS}
  if head in names:
    return {"bits_k": names[head], "bits_v": names[head]}
  key, v, value = head[1:].partition("v")
  if head[:1] != "k" or not v or not {key, value} <= names.keys():
    raise UserError(
      f"kv={text}: found {head!r}, expected bits of keys and of values, e.g. "
      f"k8v4, k4vfp8 or int8; each may be {', '.join(names)}"
    )
  return {"bits_k": names[key], "bits_v": names[value]}


def _value(field, value: str, text: str) -> Any:
  kind = type(field.default)
  if kind is bool and value in ("true", "false"):
    return value == "true"
  if kind is int and value.isdecimal():
    return int(value)
  if kind is str:
    return value
  kinds = {bool: "true or false", int: "a number of tokens"}
  raise UserError(
    f"kv={text}: found {field.name}={value}, expected {kinds[kind]}"
  )
