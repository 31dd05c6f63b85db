"""QA-LoRA: inputs pooled in groups, so that merging moves zero points only.

Xu et al. 2023 (arXiv:2309.14717), equation 4: a sees the mean of each group of
inputs, so the update is constant within a group of a row; added to an affine
4-bit base it changes the groups' offsets and no code. PEFT's factor on the
mean is the number of groups.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from research.lora.method import contracts_output, dense_fp32, uniform, zeros
from research.lora.methods.lora import LoRA
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class QALoRA(LoRA):
  """`a [r, in / group]`, `b [r, out]`.

  Attributes:
    group: inputs that are pooled; a multiple of the base's groups where the
      adapter is to be merged into it.
  """

  group: int = 16

  PEFT_FLAG: ClassVar = "use_qalora"
  PEFT_DEFAULTS: ClassVar = LoRA.PEFT_DEFAULTS | dict(qalora_group_size=16)

  @property
  def pair_scale(self):
    return None  # a group of inputs moves at once

  def start(self, key, place, w, seen=None):
    if place.embedding or place.size_in % self.group:
      what = "an embedding" if place.embedding else f"{place.size_in} inputs"
      raise UserError(
        f"QALoRA: found {what}, expected inputs in groups of {self.group}"
      )
    groups = place.size_in // self.group
    a = uniform(key, (self.rank, groups), groups**-0.5)
    return {"a": a, "b": zeros(self.rank, place.size_out)}, {}

  def _factor(self, p):
    """Returns what an input's own share of its group's feature is."""
    return p["a"].shape[-1] / self.group

  def _pooled(self, x, p):
    groups = x.reshape(*x.shape[:-1], -1, self.group)
    return groups.mean(-1) * p["a"].shape[-1]

  def delta(self, p, w):
    return jnp.repeat(super().delta(p, w) * self._factor(p), self.group, 0)

  def branch(self, eq, x, p, w):
    if not contracts_output(eq):
      return super().branch(eq, self._pooled(x, p), p, w)
    y = super().branch(eq, x, p, w) * self._factor(p)
    return jnp.repeat(y, self.group, -1)

  def rows(self, ids, p, w):
    return super().rows(ids // self.group, p, w) * self._factor(p)

  def ragged(self, x, p, w, sizes):
    return super().ragged(self._pooled(x, p), p, w, sizes)

  def peft_fields(self, methods):
    own = dict(use_qalora=True, qalora_group_size=self.group)
    return super().peft_fields(methods) | own

  @classmethod
  def from_fields(cls, fields):
    group = fields.integer("qalora_group_size")
    return dataclasses.replace(super().from_fields(fields), group=group)


def merged_offsets(t: Any) -> Any:
  """Returns the base of an adapter with the update in its groups' offsets.

  Codes and scales stay what they are; the only rounding is that of the offsets
  to their dtype.

  Args:
    t: an `AdaptedTensor` of this method over a base with an offset a group
      (ggml's Q4_1 or Q5_1), its blocks along the inputs.

  Raises:
    UserError: the base has no offsets, or groups that the adapter's cut.
  """
  w, method = t.w, t.method
  parts = getattr(w, "parts", {})
  offset = parts.get("offset")
  if offset is None or w.axis != -2:
    raise UserError(
      "QALoRA: merging into zero points takes a base with offsets, such as "
      "ggml's Q4_1"
    )
  size = w.shape[-2] // offset.shape[-2]
  if method.group % size:
    raise UserError(
      f"QALoRA: group is {method.group}, expected a multiple of the base's "
      f"{size}"
    )
  scale = method.scale * method._factor(t.arrays)
  a, b = dense_fp32(t.arrays["a"]), dense_fp32(t.arrays["b"])
  moved = scale * jnp.einsum("...rg,...ro->...go", a, b)
  moved = jnp.repeat(moved, method.group // size, -2)
  new = (offset.astype(jnp.float32) + moved).astype(offset.dtype)
  return dataclasses.replace(w, parts=parts | {"offset": new})
