"""QA-LoRA: group-pooled inputs, so that merging changes zero points only.

Xu et al. 2023 (arXiv:2309.14717), equation 4: a multiplies the mean of each
group of inputs, so the update is constant within a group. Merged into an affine
4-bit base it changes the groups' offsets and no code. PEFT multiplies the mean
by the number of groups.
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
    group: inputs per pooled group; must be a multiple of the base's group for
      merging into a packed base.
  """

  group: int = 16

  PEFT_FLAG: ClassVar = "use_qalora"
  PEFT_DEFAULTS: ClassVar = LoRA.PEFT_DEFAULTS | dict(qalora_group_size=16)

  @property
  def pair_scale(self):
    return None  # a [r, groups] is not [r, in]

  def init_arrays(self, key, spec, w, stats=None):
    if spec.embedding or spec.size_in % self.group:
      what = "an embedding" if spec.embedding else f"{spec.size_in} inputs"
      raise UserError(
        f"QALoRA: found {what}, expected inputs in groups of {self.group}"
      )
    groups = spec.size_in // self.group
    a = uniform(key, (self.rank, groups), groups**-0.5)
    return {"a": a, "b": zeros(self.rank, spec.size_out)}, {}

  def _factor(self, p):
    """Returns the weight of one input in its group's pooled feature."""
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
    qalora_fields = dict(use_qalora=True, qalora_group_size=self.group)
    return super().peft_fields(methods) | qalora_fields

  @classmethod
  def from_fields(cls, fields):
    group = fields.integer("qalora_group_size")
    return dataclasses.replace(super().from_fields(fields), group=group)


def merged_offsets(t: Any) -> Any:
  """Merges a QA-LoRA adapter into the offsets of its packed base.

  Codes and scales are unchanged; only the offsets are rounded, to their dtype.

  Args:
    t: an `AdaptedTensor` of this method over a base with one offset per group
      (ggml's Q4_1 or Q5_1) and blocks along the inputs.

  Returns:
    the base with the new offsets.

  Raises:
    UserError: the base has no offsets, or the adapter's group is no multiple
      of the base's.
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
