"""Adapters of plain LoRA, from factors and a scale."""

import dataclasses

from research.lora import adapt
from research.lora.adapted import AdaptedTensor
from research.lora.methods.lora import LoRA


def lora(w, a, b, scale=1.0, dropout=0.0):
  """Returns `w` under the adapter `scale aᵀ b`."""
  rank = a.shape[-2]
  method = LoRA(rank=rank, alpha=scale * rank, dropout=dropout)
  return AdaptedTensor(w, {"a": a, "b": b}, method=method)


def adapting(**options):
  """Returns Adapt of plain LoRA; options are passed to either."""
  own = {f.name for f in dataclasses.fields(LoRA)} & set(options)
  method = LoRA(**{name: options.pop(name) for name in own})
  return adapt.Adapt(method=method, **options)


def with_arrays(tensor, **arrays):
  """Returns an adapter with other values of some trained arrays."""
  return dataclasses.replace(tensor, trained=tensor.trained | arrays)
