"""What a conversion changed, tensor by tensor."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import weights
from research.lora.adapted import AdaptedBias, AdaptedTensor
from research.typing import UserError


@dataclasses.dataclass(frozen=True)
class Change:
  """One tensor.

  Attributes:
    name: name in the file that was written.
    before, after: how it was and is stored.
    relative_error: norm of all differences over the norm of the tensor.
    fidelity: `||(written - base) - update|| / ||update||` of a merged adapter,
      with the base written alone, whose loss is not the adapter's; 0 keeps the
      whole update, above 1 is more noise than update. None where nothing was
      merged.
    kept: share of a merged update that is left along it: 1 where rounding
      errors have nothing to do with it, 0 where every number stayed what it
      was.
  """

  name: str
  before: str
  after: str
  max_abs_error: float = 0.0
  relative_error: float = 0.0
  fidelity: float | None = None
  kept: float | None = None
  update: float | None = None


Rounding = Callable[[str, np.ndarray, np.dtype], np.ndarray]
"""(name of a weight, its numbers, type) -> in that type; `cast` is one."""


class Comparison:
  """Adds up how two tensors differ, piece by piece."""

  def __init__(self) -> None:
    self._worst = self._size = self._lost = 0.0
    self._update = self._missed = self._along = 0.0
    self._merged = False

  def add(
    self,
    want: np.ndarray,
    got: np.ndarray,
    base: np.ndarray | None = None,
    alone: np.ndarray | None = None,
  ) -> None:
    """Counts one piece in, in float64.

    Args:
      base: what `want` was before an adapter was merged into it.
      alone: what `got` were of that; None for the same.
    """
    want, got = want.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(want)
    if not finite.all():
      # Infinities and NaNs are compared as what they are.
      if not np.array_equal(want[~finite], got[~finite], equal_nan=True):
        self._worst = np.inf
      want, got = np.where(finite, want, 0), np.where(finite, got, 0)
    difference = got - want
    self._worst = max(self._worst, float(np.abs(difference).max(initial=0)))
    self._size += float((want**2).sum())
    self._lost += float((difference**2).sum())
    if base is not None:
      self._merged = True
      update = want - base
      change = got - (base if alone is None else alone)
      self._update += float((update**2).sum())
      self._missed += float(((change - update) ** 2).sum())
      self._along += float((change * update).sum())

  def change(self, name: str, before: str, after: str) -> Change:
    merge: dict[str, float] = {}
    if self._merged:
      u = self._update
      merge["fidelity"] = (self._missed / u) ** 0.5 if u else 0.0
      merge["kept"] = self._along / u if u else 1.0
      merge["update"] = u**0.5
    relative = float(self._lost > 0)
    if self._size:
      relative = (self._lost / self._size) ** 0.5
    return Change(name, before, after, self._worst, relative, **merge)


LEAST_KEPT = 0.9
"""Of all updates, what a merge has to keep unless it may be lossy."""


def kept_share(changes: Iterable[Change]) -> float | None:
  """Returns the share of all merged updates that is left along them."""
  merged = [c for c in changes if c.update is not None]
  total = sum(c.update**2 for c in merged)
  if not merged:
    return None
  return sum(c.kept * c.update**2 for c in merged) / total if total else 1.0


def merge_summary(changes: Iterable[Change]) -> dict[str, Any]:
  """Returns what all merged updates have become, None where nothing is merged.

  kept   their share that is left along them
  lost   the rest of 1: 0 where all is left, or more than all by chance
  noise  norm of what else has changed, over the norm of the updates: rounding
         moves some numbers by a step and others not at all, which on average is
         the update
  worst  the tensor whose change is furthest from its update
  """
  merged = [c for c in changes if c.update is not None]
  share = kept_share(merged)
  if share is None:
    return dict.fromkeys(("kept", "lost", "noise", "worst"))
  total = sum(c.update**2 for c in merged) or 1.0
  missed = {c.name: (c.fidelity * c.update) ** 2 for c in merged}
  along = sum(((1 - c.kept) * c.update) ** 2 for c in merged)
  noise = max(0.0, sum(missed.values()) - along)
  return dict(
    kept=share,
    lost=max(0.0, 1 - share),
    noise=(noise / total) ** 0.5,
    worst=max(missed, key=missed.__getitem__),
  )


def check_kept(changes: Iterable[Change], least: float) -> None:
  """Raises UserError if less than that share of all updates is left."""
  changes = list(changes)
  share = kept_share(changes)
  if share is None or share >= least:
    return
  worst = min((c for c in changes if c.kept is not None), key=lambda c: c.kept)
  raise UserError(
    f"merging: {share:.0%} of the adapter's update would be left after "
    f"rounding to {worst.after}, expected at least {least:.0%} (least: "
    f"{worst.kept:.0%} of {worst.name}).\n"
    "Merge into float32 (--dtype=float32, gguf:F32), with "
    "--rounding=stochastic, or accept the loss with --lossy."
  )


class Log:
  """Collects the changes of one conversion, in the order of the file."""

  def __init__(self) -> None:
    self.changes: list[Change] = []

  def same(self, name: str, before: str, after: str) -> None:
    """Notes a tensor whose every bit was kept."""
    self.changes.append(Change(name, before, after))

  def compared(
    self,
    name: str,
    before: str,
    after: str,
    was: "DenseWeight",
    got: np.ndarray,
    alone: np.ndarray | None = None,
  ) -> None:
    """Notes a tensor that was read and is now, decoded, `got`.

    Args:
      alone: what its base is without an adapter; None for the same as before.
    """
    comparison = Comparison()
    for rows in pieces(got):
      base, alone_rows = (
        None if x is None else x[rows] for x in (was.base, alone)
      )
      comparison.add(was.array[rows], got[rows], base, alone_rows)
    self.changes.append(comparison.change(name, before, after))

  def summary(self) -> dict[str, Any]:
    kinds: dict[str, int] = {}
    for c in self.changes:
      key = c.before if c.before == c.after else f"{c.before} -> {c.after}"
      kinds[key] = kinds.get(key, 0) + 1
    moved = [c for c in self.changes if c.max_abs_error]
    merged = [c for c in self.changes if c.fidelity is not None]
    merge = merge_summary(self.changes)
    worst = max(moved, key=lambda c: c.relative_error, default=None)
    return {
      "tensors": len(self.changes),
      "changed": len(moved),
      "types": kinds,
      "max_abs_error": max((c.max_abs_error for c in moved), default=0.0),
      "max_relative_error": worst.relative_error if worst else 0.0,
      "worst": worst.name if worst else None,
      "merged": len(merged),
      "merge_kept": merge["kept"],
      "merge_loss": merge["lost"],
      "merge_noise": merge["noise"],
      "merge_worst": merge["worst"],
    }

  def table(self, shown: int = 12) -> str:
    """Returns the tensors that changed most, or whose type did, as text."""
    touched = [
      c
      for c in self.changes
      if c.before != c.after or c.max_abs_error or c.fidelity is not None
    ]
    touched.sort(key=lambda c: (-(c.fidelity or 0), -c.relative_error))
    if not touched:
      return f"all {len(self.changes)} tensors kept, bit for bit"
    lines = ["tensor, type, largest and relative error, lost of an adapter"]
    for c in touched[:shown]:
      lost = "" if c.fidelity is None else f"  {c.fidelity:.1e}"
      lines.append(
        f"  {c.name}  {c.before} -> {c.after}  {c.max_abs_error:.1e}  "
        f"{c.relative_error:.1e}{lost}"
      )
    if len(touched) > shown:
      lines.append(f"  and {len(touched) - shown} more")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class DenseWeight:
  """A weight as plain numbers.

  Attributes:
    array: what it stands for; float32 if it was packed or has an adapter,
      else in its own type.
    base: float32 without its adapter, or None where it has none.
  """

  array: np.ndarray
  base: np.ndarray | None = None


def dense_weight(weight: Any) -> DenseWeight:
  """Returns what a weight of any kind stands for; adapters merge in fp32."""
  if isinstance(weight, np.ndarray):
    return DenseWeight(weight)  # a view of a file: JAX would copy it, twice
  weight = jax.tree.map(jnp.asarray, weight)
  merged_and_base = in_float32(weight)
  if merged_and_base is not None:
    return DenseWeight(*merged_and_base)
  return DenseWeight(np.asarray(weights.dense(weight)))


def in_float32(weight: Any) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns (merged, base), both float32; None for a weight without adapters.

  Args:
    weight: any, or a bias of `wrap.biases`; adapters on adapters all count.
  """
  if isinstance(weight, AdaptedBias):
    base = jnp.asarray(weight.w).astype(jnp.float32)
    return np.asarray(weight.matrix.scaled_bias(base)), np.asarray(base)
  if not isinstance(weight, AdaptedTensor):
    return None
  below = in_float32(weight.w)
  if below is None:
    base = total = np.asarray(weights.dense(weight.w)).astype(np.float32)
  else:
    total, base = below
  delta = dataclasses.replace(weight, w=jnp.asarray(total)).delta()
  return total + np.asarray(delta), base


def cast(name: str, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns `x` rounded to nearest even.

  Raises:
    UserError: a finite number has no finite one in `dtype`.
  """
  if x.dtype == dtype:
    return x
  with np.errstate(over="ignore"):
    out = x.astype(dtype)
  if dtype.itemsize < x.dtype.itemsize or dtype == np.float16:
    bad = np.isfinite(x) & ~np.isfinite(out.astype(np.float32))
    if bad.any():
      raise UserError(
        f"{name}: {x[bad][0]} is beyond the range of {dtype}; "
        "use bfloat16 or float32"
      )
  return out


def pieces(x: np.ndarray, size: int = 1 << 20) -> list[Any]:
  """Returns indices that cut `x` by rows into parts of about `size`."""
  if not x.ndim:
    return [...]
  rows = max(1, size // max(1, x[:1].size))
  return [slice(i, i + rows) for i in range(0, len(x), rows)]
