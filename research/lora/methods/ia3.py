"""(IA)^3: a trained scale per output, or per input, of a matrix.

Liu et al. 2022 (arXiv:2205.05638), section 3.3: scales the outputs of keys and
values, and the inputs of the feed-forward's second matrix.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from research import weights
from research.lora.method import Method, contracts_output, dense_fp32


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(Method):
  """`w` times `l`, initialised to 1; rank and alpha are not used.

  A scale per output also scales the bias.

  Attributes:
    feedforward: name suffixes of the matrices that are scaled per input.
    by_input: whether this matrix is scaled per input; set by `for_matrix`.
  """

  feedforward: tuple[str, ...] = ("down", "down_proj")
  by_input: bool = False

  SUPPORTS_DROPOUT: ClassVar = False
  PEFT: ClassVar = "IA3"
  PER_MODULE: ClassVar = ("rank", "alpha", "by_input", "feedforward")

  def for_matrix(self, name, sizes):
    ends = tuple(f"/{end}" for end in self.feedforward)
    by_input = f"/{name.replace('.', '/')}".endswith(ends)
    return dataclasses.replace(self, by_input=by_input)

  @property
  def output_gain(self):
    return None if self.by_input else "l"

  def init_arrays(self, key, spec, w, stats=None):
    size = spec.size_in if self.by_input else spec.size_out
    return {"l": jnp.ones(size, jnp.float32)}, {}

  def delta(self, p, w):
    l = dense_fp32(p["l"]) - 1
    return dense_fp32(w) * (l[:, None] if self.by_input else l)

  def einsum(self, eq, x, dropped, p, w):
    l = p["l"].astype(x.dtype)
    if self.by_input != contracts_output(eq):
      return weights.einsum(eq, x * l, w)
    return checkpoint_name(weights.einsum(eq, x, w), "unscaled") * l

  def ragged(self, x, p, w, sizes):
    l = jnp.repeat(p["l"] - 1, sizes, axis=0, total_repeat_length=x.shape[0])
    if self.by_input:
      return weights.ragged_dot(x * l.astype(x.dtype), w, sizes)
    return weights.ragged_dot(x, w, sizes) * l.astype(x.dtype)

  def rows(self, ids, p, w):
    l = p["l"] - 1
    return weights.take(w, ids) * (l[ids][..., None] if self.by_input else l)

  def axes(self, names):
    return {"l": (names[0 if self.by_input else 1],)}

  def to_peft(self, p, spec):
    return {"ia3_l": p["l"][None] if self.by_input else p["l"][:, None]}

  def from_peft(self, tensors, spec, w):
    return {"l": tensors["ia3_l"].reshape(-1)}, {}

  def peft_fields(self, methods):
    by_input = {m.rsplit(".", 1)[-1] for m, x in methods.items() if x.by_input}
    return dict(feedforward_modules=sorted(by_input), fan_in_fan_out=False)

  @classmethod
  def from_fields(cls, fields):
    names = fields.get("feedforward_modules") or []
    if not isinstance(names, list) or not all(
      isinstance(name, str) for name in names
    ):
      raise fields.wrong("feedforward_modules", "a list of names")
    return cls(feedforward=tuple(name.replace(".", "/") for name in names))
