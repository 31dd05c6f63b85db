"""How quantized checkpoints round activations: applied, or refused.

compressed-tensors' schemes that measure each token, or each call, become the op
of a matrix' inputs (`research.quant.activations`), by the package's own rules:
integers' scale is `2 max|x| / (2^bits - 1)`, E4M3's `max|x| / 448`. Scales of a
calibration, a quantized KV cache and 4-bit floats are refused by name. In 8
bits, bitsandbytes multiplies integers, outliers apart
(`research.quant.llm_int8`). Weights decoded at once (`packed=False`) are
weights alone, as for every tool's checkpoint.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from research import tree, weights
from research.interop.quantized import bnb
from research.interop.quantized.compressed_config import KV_CACHE, METHOD
from research.io.fields import Fields
from research.quant.activations import InputTensor, Op, Round, RoundFloat
from research.quant.llm_int8 import Outliers
from research.quant.qtensor import QTensor
from research.typing import Params, UserError

CONFIG = "quantization_config"

_ROUNDING = Round, RoundFloat, Outliers

_ALONE = "load the weights alone, with packed=False (--nopacked)"


def round_inputs(params: Params, quantization: Any, where: str) -> Any:
  """Returns `params` whose packed matrices round their inputs, as configured.

  Raises:
    UserError: activations are to be rounded in a way that is not known here.
  """
  op = None if quantization is None else op_of(quantization, where)
  if op is None:
    return params

  def one(path: str, w: Any) -> Any:
    del path
    packed = isinstance(w, QTensor) and w.axis == -2
    return InputTensor(w, op=op) if packed else w

  return tree.map_paths(one, params, is_leaf=weights.is_weight)


def stated(quantization: Any) -> tuple[Any, ...]:
  """Returns each group's `input_activations`, None where nothing is rounded.

  Args:
    quantization: a `quantization_config`, of any method, or None; the op itself
      of bitsandbytes.
  """
  if not isinstance(quantization, dict):
    return ()
  if quantization.get("quant_method") == bnb.METHOD:
    op = op_of(quantization, CONFIG)
    return () if op is None else (op,)
  if quantization.get("quant_method") != METHOD:
    return ()
  groups = Fields(quantization, CONFIG).object("config_groups")
  if groups is None:
    return ()
  found = [x for x in map(groups.object, groups.values) if x is not None]
  said = [x.get("input_activations") for x in found]
  if quantization.get(KV_CACHE) is not None:
    said.append({KV_CACHE: quantization[KV_CACHE]})
  return tuple(said)


def rounding(params: Params, said: Sequence[Any]) -> tuple[Any, ...]:
  """Returns how weights round their inputs; nothing if they do not.

  Args:
    params: of a model; adapters may be on them.
      stand for themselves.
  """
  found: dict[Op, None] = {}
  for w in jax.tree.leaves(params, is_leaf=weights.is_weight):
    while isinstance(w, weights.WrappedWeight):
      if isinstance(w, InputTensor) and isinstance(w.op, _ROUNDING):
        found[w.op] = None
      w = w.w
  return tuple(said or found) if found else ()


def unrounded(w: weights.AnyWeight) -> weights.AnyWeight:
  """Returns the weight alone, without the rounding of its inputs."""
  rounds = isinstance(w, InputTensor) and isinstance(w.op, _ROUNDING)
  return w.w if rounds else w


def op_of(quantization: Mapping[str, Any], where: str) -> Op | None:
  """Returns what rounds the inputs of packed matrices; None for nothing.

  Raises:
    UserError: see `round_inputs`.
  """
  if quantization.get("quant_method") == bnb.METHOD:
    scheme = bnb.parse(quantization, f"{where}: {CONFIG}")
    return None if scheme.bits == 4 else Outliers(threshold=scheme.threshold)
  if quantization.get("quant_method") != METHOD:
    return None
  fields = Fields(quantization, f"{where}: {CONFIG}")
  if fields.get(KV_CACHE) is not None:
    raise fields.wrong(
      KV_CACHE,
      f"null: a cache is quantized by --kv, not by a checkpoint; or {_ALONE}",
    )
  groups = fields.object("config_groups")
  ops = []
  for name in groups.values:
    found = groups.object(name).object("input_activations")
    ops.append(None if found is None else _op(found))
  if any(op != ops[0] for op in ops):
    raise groups.wrong(
      list(groups.values)[0], f"activations alike in all groups; or {_ALONE}"
    )
  return ops[0] if ops else None


def _op(fields: Fields) -> Op:
  def refused(name: str, expected: str) -> UserError:
    return fields.wrong(name, f"{expected}; or {_ALONE}")

  if fields.get("dynamic") is not True:
    raise refused("dynamic", "true: scales of a calibration are not applied")
  strategy = fields.get("strategy")
  if strategy is None:  # as for weights, see `compressed_config`
    strategy = "tensor" if fields.get("group_size") is None else "group"
  if strategy not in ("token", "tensor", "group"):
    raise refused("strategy", "'token', 'tensor' or 'group'")
  per = "tensor" if strategy == "tensor" else "token"
  kind = str(fields.get("type") or "int").lower()
  bits = fields.get("num_bits")
  symmetric = fields.get("symmetric") is not False
  if kind == "float":
    if bits != 8 or strategy == "group" or not symmetric:
      raise refused("num_bits", "8, symmetric, by token or tensor, of floats")
    return RoundFloat(per=per)
  if kind != "int" or type(bits) is not int or not 2 <= bits <= 8:
    raise refused("num_bits", "2 to 8, of integers")
  group = 0
  if strategy == "group":
    group = fields.integer("group_size", 1, 2**20)
  return Round(
    bits=bits, per=per, group=group, symmetric=symmetric, full=symmetric
  )
