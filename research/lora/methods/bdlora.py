"""BD-LoRA: LoRA with a block-diagonal factor, for tensor parallelism.

Wang et al. 2025 (arXiv:2510.23346). For a matrix sharded along its inputs, a is
block-diagonal, each block with some of the inputs and of the ranks; for one
sharded along its outputs, b is. Each device then needs only its own blocks.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from research.lora.method import uniform, zeros
from research.lora.methods.lora import LoRA
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BDLoRA(LoRA):
  """`a [r, in / blocks]`, `b [r, out]`, or `a [r, in]`, `b [r / blocks, out]`.

  Attributes:
    side: the block-diagonal factor, or "" for neither; set by `for_matrix`.
    by_input, by_output: names of the matrices with blocks in a, and in b.
    strict: whether a matrix named by neither is an error.
  """

  blocks: int = 4
  side: Literal["a", "b", ""] = "b"
  by_input: tuple[str, ...] = ("o", "down")
  by_output: tuple[str, ...] = ("q", "k", "v", "gate", "up")
  strict: bool = True

  PER_MODULE: ClassVar = ("rank", "alpha", "side")
  PEFT_FLAG: ClassVar = "use_bdlora"

  def for_matrix(self, name, sizes):
    module_name = name.replace("/", ".").rsplit(".", 1)[-1]
    # PEFT matches substrings of module names, our addresses match whole names.
    matched = {
      side: any(
        n == module_name if "/" in name else n in module_name for n in names
      )
      for side, names in (("a", self.by_input), ("b", self.by_output))
    }
    if all(matched.values()):
      raise UserError(
        f"BDLoRA: {name} is among both inputs' and outputs' names"
      )
    if self.strict and not any(matched.values()):
      raise UserError(
        f"BDLoRA: names neither by input, {self.by_input}, nor by output, "
        f"{self.by_output}, have {name}; or set strict, PEFT's match_strict, "
        "to false"
      )
    side = next((side for side, there in matched.items() if there), "")
    return dataclasses.replace(self, side=side)

  def canonical(self):
    return dataclasses.replace(self, by_input=(), by_output=(), strict=False)

  @property
  def pair_scale(self):
    return None if self.side else self.scale  # blocks are separate pairs

  def init_arrays(self, key, spec, w, stats=None):
    n = self.blocks if self.side else 1
    cut = spec.size_in if self.side == "a" else spec.size_out
    if self.rank % n or cut % n or spec.embedding:
      what = "an embedding" if spec.embedding else f"rank {self.rank}, {cut}"
      raise UserError(f"BDLoRA: found {what}, expected multiples of {n} blocks")
    inner = spec.size_in // (n if self.side == "a" else 1)
    a = uniform(key, (self.rank, inner), inner**-0.5)
    rows = self.rank // (n if self.side == "b" else 1)
    return {"a": a, "b": zeros(rows, spec.size_out)}, {}

  def _full_factors(self, p):
    """Returns a and b as full matrices, zero outside of the blocks."""
    a, b, n = p["a"], p["b"], self.blocks
    if self.side == "a":
      return {"a": _block_diagonal(a.reshape(n, -1, a.shape[-1])), "b": b}
    if self.side == "b":
      parts = b.reshape(len(b), n, -1).swapaxes(0, 1)
      return {"a": a, "b": _block_diagonal(parts)}
    return {"a": a, "b": b}

  def delta(self, p, w):
    return super().delta(self._full_factors(p), w)

  def branch(self, eq, x, p, w):
    return super().branch(eq, x, self._full_factors(p), w)

  def rows(self, ids, p, w):
    return super().rows(ids, self._full_factors(p), w)

  def ragged(self, x, p, w, sizes):
    return super(LoRA, self).ragged(x, p, w, sizes)

  def axes(self, names):
    a = (names[0], None) if self.side == "a" else (None, names[0])
    return {"a": a, "b": (None, names[1])}

  def peft_fields(self, methods):
    ends = {
      side: sorted(
        {m.rsplit(".", 1)[-1] for m, x in methods.items() if x.side == side}
      )
      for side in ("a", "b", "")
    }
    bdlora_fields = dict(
      target_modules_bd_a=ends["a"] or None,
      target_modules_bd_b=ends["b"] or None,
      nblocks=self.blocks,
      match_strict=not ends[""],
    )
    return super().peft_fields(methods) | dict(use_bdlora=bdlora_fields)

  @classmethod
  def from_fields(cls, fields):
    config = fields.object("use_bdlora")
    names = {}
    for ours, theirs in (("by_input", "bd_a"), ("by_output", "bd_b")):
      x = config.get(f"target_modules_{theirs}") or []
      if not isinstance(x, list) or not all(type(t) is str for t in x):
        raise config.wrong(
          f"target_modules_{theirs}", "a list of names or null"
        )
      names[ours] = tuple(x)
    plain = super().from_fields(fields)
    names["strict"] = config.get("match_strict") is not False
    return dataclasses.replace(plain, blocks=config.integer("nblocks"), **names)


def _block_diagonal(parts):
  n, rows, columns = parts.shape
  out = jnp.eye(n, dtype=parts.dtype)[:, None, :, None] * parts[:, :, None]
  return out.reshape(n * rows, n * columns)
