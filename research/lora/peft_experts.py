"""LoRA on stacked experts: target_parameters of a configuration, read alone.

PEFT adapts a parameter `[E, out, in]` of transformers 5's as one module
(lora.md section 2.4): the rows of `A [r E, in]` are experts' one after the
other, the columns of `B [out, r E]` ranks' one after the other. Gates stand
above the matrices beside them in `gate_up_proj`, with one A for both. Where
both of a layer's parameters are adapted, the first is in the second's
base_layer.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.interop import hf
from research.interop.fields import Fields
from research.lora import match, peft_whole, wrap
from research.lora.methods.lora import LoRA
from research.typing import Params, UserError

FIELD = "target_parameters"
PARAMETERS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
"""Of a layer's experts, as the model has them: theirs -> ours."""


@dataclasses.dataclass(frozen=True)
class Stack:
  """An adapted parameter.

  Attributes:
    name: theirs.
    prefix: of its keys in the file.
    addresses: of our matrices in it, from the top of `[E, out, in]`.
    method: of each.
    size: (experts, in, out of all).
  """

  name: str
  prefix: str
  addresses: tuple[str, ...]
  method: LoRA
  size: tuple[int, int, int]

  @property
  def shapes(self) -> dict[str, tuple[int, int]]:
    """Of its tensors, by their keys."""
    experts, size_in, size_out = self.size
    r = self.method.rank * experts
    return {
      f"{self.prefix}.lora_A.weight": (r, size_in),
      f"{self.prefix}.lora_B.weight": (size_out, r),
    }


def stacks(fields: Fields, params: Params, usual: Any) -> list[Stack]:
  """Returns what a configuration adapts of experts.

  Args:
    fields: the configuration.
    params: the base's.
    usual: the method of `fields`.
  """
  wanted = names(fields)
  if not wanted:
    return []
  if type(usual) is not LoRA or usual.dropout:
    raise fields.wrong(FIELD, "null beside another method, or dropout")
  sizes, out, used = wrap.experts(params), [], set()
  for layer in sorted({int(path.split("/")[1]) for path in sizes}):
    module = f"model.layers.{layer}.mlp.experts"
    prefix, inner = f"{peft_whole.PREFIX}{module}", []
    for name, ours in PARAMETERS.items():
      key = f"{module}.{name}"
      hits = {t for t in wanted if key == t or key.endswith(f".{t}")}
      paths = tuple(f"layers/{layer}/mlp/experts/{part}" for part in ours)
      if not hits or any(path not in sizes for path in paths):
        continue
      used |= hits
      experts, size_in, size_out = sizes[paths[0]]
      size = (experts, size_in, size_out * len(paths))
      method = _of(fields, usual, key)
      inner.append(Stack(key, prefix, paths, method, size))
    if len(inner) == 2:
      inner[0] = dataclasses.replace(inner[0], prefix=f"{prefix}.base_layer")
    out += inner
  unused = sorted(set(wanted) - used)
  if unused:
    raise fields.wrong(FIELD, f"parameters of experts, not {unused[0]!r}")
  return out


def names(fields: Fields) -> Sequence[str]:
  """Returns the ends of parameters' names that a configuration adapts."""
  found = fields.get(FIELD)
  if found is None:
    return ()
  if not isinstance(found, list) or not all(isinstance(t, str) for t in found):
    raise fields.wrong(FIELD, "a list of names, or null")
  return tuple(found)


def _of(fields: Fields, usual: LoRA, key: str) -> LoRA:
  given = {}
  for name, of in (("rank", "integer"), ("alpha", "number")):
    inner = fields.object(LoRA.PEFT_PATTERNS[name])
    read = {k: getattr(inner, of)(k) for k in inner.values} if inner else {}
    field = LoRA.PEFT_PATTERNS[name]
    given[name] = match.by_pattern(key, read, getattr(usual, name), field)
  return dataclasses.replace(usual, **given)


def read(
  file: Any, tensors: Mapping[str, Any], found: Sequence[Stack]
) -> dict[str, dict[str, np.ndarray]]:
  """Returns the arrays of every adapted matrix, by address, experts in front.

  Raises:
    UserError: a tensor is not there, or not of its shape, or not finite.
  """
  out = {}
  for stack in found:
    both = {key: tensors.get(key) for key in stack.shapes}
    missing = sorted(key for key, x in both.items() if x is None)
    if missing:
      raise hf.difference(file, missing, [])
    for key, shape in stack.shapes.items():
      x = both[key]
      if x.shape != shape or str(x.dtype) not in hf.DTYPES:
        raise UserError(
          f"{file}: {key} is {x.dtype} {list(x.shape)}, expected numbers "
          f"{list(shape)} by its configuration and the base model"
        )
    a, b = (x.read().astype(np.float32) for x in both.values())
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
      raise UserError(
        f"{file}: {stack.prefix} holds a number that is not finite; the run "
        "that wrote it had diverged"
      )
    experts, size_in, _ = stack.size
    a = a.reshape(experts, -1, size_in)
    b = b.reshape(len(b), -1, experts).transpose(2, 1, 0)  # [E, r, out]
    parts = np.split(b, len(stack.addresses), axis=-1)
    for address, part in zip(stack.addresses, parts, strict=True):
      out[address] = {"a": a, "b": part}
  return out
