"""LoRA on stacked experts: target_parameters of a configuration.

PEFT adapts a parameter `[E, out, in]` of transformers 5's as one module
(research/lora/MATH.md 2.3): the rows of `A [r E, in]` are experts' one after
the other, the columns of `B [out, r E]` ranks' one after the other. Gates stand
above the matrices beside them in `gate_up_proj`, with one A for both: ours, if
they have one each, are written one below the other, at twice the rank. Where
both of a layer's parameters are adapted, the first is in the second's
base_layer.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.interop import hf
from research.interop.hf.experts import STACKS
from research.interop.peft import config as peft_config
from research.interop.peft.names import PREFIX
from research.io.fields import Fields
from research.lora import wrap
from research.lora.adapted import AdaptedTensor
from research.lora.methods.lora import LoRA
from research.typing import Params, UserError


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
    experts, size_in, size_out = self.size
    r = self.method.rank * experts
    return {
      f"{self.prefix}.lora_A.weight": (r, size_in),
      f"{self.prefix}.lora_B.weight": (size_out, r),
    }


def stacks(fields: Fields, params: Params, usual: Any) -> list[Stack]:
  """Returns what a configuration adapts of experts."""
  wanted = peft_config.expert_parameters(fields)
  if not wanted:
    return []
  if type(usual) is not LoRA or usual.dropout:
    raise fields.wrong(
      peft_config.EXPERTS, "null beside another method, or dropout"
    )
  sizes, out, used = wrap.experts(params), [], set()
  rule = peft_config.pattern_rule(fields, LoRA)
  for layer in sorted({int(path.split("/")[1]) for path in sizes}):
    module = f"model.layers.{layer}.mlp.experts"
    prefix, inner = f"{PREFIX}{module}", []
    for name, ours in STACKS.items():
      key = f"{module}.{name}"
      hits = {t for t in wanted if key == t or key.endswith(f".{t}")}
      paths = tuple(f"layers/{layer}/mlp/experts/{part}" for part in ours)
      if not hits or any(path not in sizes for path in paths):
        continue
      used |= hits
      experts, size_in, size_out = sizes[paths[0]]
      size = (experts, size_in, size_out * len(paths))
      method = rule(key, usual, usual)
      inner.append(Stack(key, prefix, paths, method, size))
    if len(inner) == 2:
      inner[0] = dataclasses.replace(inner[0], prefix=f"{prefix}.base_layer")
    out += inner
  unused = sorted(set(wanted) - used)
  if unused:
    raise fields.wrong(
      peft_config.EXPERTS, f"parameters of experts, not {unused[0]!r}"
    )
  return out


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
      raise hf.mismatch(file, missing, [])
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


def to_tensors(
  directory: Any, found: Mapping[str, AdaptedTensor], params: Params
) -> tuple[dict[str, np.ndarray], dict[str, LoRA], list[str]]:
  """Returns what a file says of adapters on stacked experts.

  Tensors by their names, a method for each parameter of PEFT's, and what to
  call all of these in `target_parameters`.

  Raises:
    UserError: an adapter there is not LoRA.
  """
  sizes, tensors, methods = wrap.experts(params), {}, {}
  every = []
  for layer in sorted({int(path.split("/")[1]) for path in sizes}):
    at, module = f"layers/{layer}/mlp/experts", f"model.layers.{layer}.mlp"
    own = []
    for name, ours in STACKS.items():
      paths = [f"{at}/{part}" for part in ours]
      every += [f"{module}.experts.{name}"] * all(p in sizes for p in paths)
      if any(path in found for path in paths):
        parts = [_part(directory, path, found, sizes) for path in paths]
        own.append((f"{module}.experts.{name}", *_joined(parts)))
    for i, (name, method, a, b) in enumerate(own):
      methods[name] = method
      prefix = f"{PREFIX}{module}.experts"
      prefix += ".base_layer" if i + 1 < len(own) else ""
      tensors[f"{prefix}.lora_A.weight"] = a.reshape(-1, a.shape[-1])
      tensors[f"{prefix}.lora_B.weight"] = b.transpose(2, 1, 0).reshape(
        b.shape[-1], -1
      )
  return tensors, methods, _short(methods, every)


_Part = tuple[LoRA, np.ndarray, np.ndarray]


def _part(directory, path, found, sizes) -> _Part | tuple[int, int, int]:
  """Returns (method, a, b) of one matrix, or its sizes if it has none."""
  if path not in found:
    return sizes[path]
  method, arrays = found[path].method.exported(found[path].arrays)
  if type(method) is not LoRA:
    raise UserError(
      f"{directory}: {path} has an adapter of {type(method).__name__}; on "
      "stacked experts PEFT has plain LoRA alone.\nConvert it first:"
      " experiments.adapters --op=lora, or merge it into the model."
    )
  a, b = (np.asarray(arrays[name], np.float32) for name in "ab")
  return dataclasses.replace(method, dropout=0.0), a, b


def _joined(parts) -> _Part:
  """Returns one update of matrices that lie beside each other."""
  have = [p for p in parts if isinstance(p[0], LoRA)]
  method, a, _ = have[0]
  same = [m == method and np.array_equal(x, a) for m, x, _ in have]
  if all(same):
    columns = [
      p[2] if isinstance(p[0], LoRA) else np.zeros((*a.shape[:2], p[2]), "f4")
      for p in parts
    ]
    return method, a, np.concatenate(columns, -1)
  # Each has rows of its own, at the scale of the first.
  rank = sum(m.rank for m, _, _ in have)
  size = method.rank**0.5 if method.rslora else method.rank
  more = rank**0.5 if method.rslora else rank
  joint = dataclasses.replace(
    method, rank=rank, alpha=method.alpha / size * more
  )
  out = np.zeros((len(a), rank, sum(b.shape[-1] for _, _, b in have)), "f4")
  row = column = 0
  for m, _, b in have:
    rows, columns = b.shape[1:]
    block = b * np.float32(m.scale / method.scale)
    out[:, row : row + rows, column : column + columns] = block
    row, column = row + rows, column + columns
  return joint, np.concatenate([x for _, x, _ in have], 1), out


def _short(methods: Mapping[str, LoRA], every: Sequence[str]) -> list[str]:
  """Returns ends of names that mean these parameters and no others."""
  ends = sorted({".".join(name.split(".")[-2:]) for name in methods})
  meant = {n for n in every if any(n.endswith(f".{end}") for end in ends)}
  return ends if meant == set(methods) else sorted(methods)
