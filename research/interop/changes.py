"""What a conversion changed, tensor by tensor."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import weights
from research.lora import merged
from research.typing import UserError


@dataclasses.dataclass(frozen=True)
class Change:
  """One tensor.

  Attributes:
    name: in the file that was written.
    before, after: how it was and is stored.
    max_abs_error: the largest difference of a number, as both are meant.
    relative_error: norm of all differences over the norm of the tensor.
    fidelity: where an adapter was merged, the norm of what its update lost
      over the norm of the update; 0 is all of it kept, 1 as much lost as
      there was. None where nothing was merged.
    kept: of a merged update, what is left along it: 1 where rounding errors
      have nothing to do with it, 0 where every number stayed what it was.
    update: the norm of the update.
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
    self._worst = self._size = self._lost = self._update = 0.0
    self._along = 0.0
    self._merged = False

  def add(
    self, want: np.ndarray, got: np.ndarray, base: np.ndarray | None = None
  ) -> None:
    """Counts one piece in, in float64.

    Args:
      want, got: as they were and are.
      base: what `want` was before an adapter was merged into it.
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
      self._update += float((update**2).sum())
      self._along += float(((got - base) * update).sum())

  def change(self, name: str, before: str, after: str) -> Change:
    """Returns what was found."""
    merge: dict[str, float] = {}
    if self._merged:
      u = self._update
      merge["fidelity"] = (self._lost / u) ** 0.5 if u else 0.0
      merge["kept"] = self._along / u if u else 1.0
      merge["update"] = u**0.5
    relative = float(self._lost > 0)
    if self._size:
      relative = (self._lost / self._size) ** 0.5
    return Change(name, before, after, self._worst, relative, **merge)


LEAST_KEPT = 0.9
"""Of all updates, what a merge has to keep unless it may be lossy."""


def kept(changes: Iterable[Change]) -> float | None:
  """Returns the share of all merged updates that is left along them."""
  merges = [c for c in changes if c.update is not None]
  total = sum(c.update**2 for c in merges)
  if not merges:
    return None
  return sum(c.kept * c.update**2 for c in merges) / total if total else 1.0


def check_kept(changes: Iterable[Change], least: float) -> None:
  """Raises UserError if less than that share of all updates is left."""
  changes = list(changes)
  found = kept(changes)
  if found is None or found >= least:
    return
  merges = [c for c in changes if c.kept is not None]
  worst = min(merges, key=lambda c: c.kept)
  raise UserError(
    f"merging: {found:.0%} of the adapter's update would be left after "
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
    self, name: str, before: str, after: str, read: "Read", got: np.ndarray
  ) -> None:
    """Notes a tensor that was read and is now, decoded, `got`."""
    found = Comparison()
    for rows in pieces(got):
      base = None if read.base is None else read.base[rows]
      found.add(read.array[rows], got[rows], base)
    self.changes.append(found.change(name, before, after))

  def summary(self) -> dict[str, Any]:
    """Returns what a JSON line can hold."""
    kinds: dict[str, int] = {}
    for c in self.changes:
      key = c.before if c.before == c.after else f"{c.before} -> {c.after}"
      kinds[key] = kinds.get(key, 0) + 1
    moved = [c for c in self.changes if c.max_abs_error]
    merges = [c for c in self.changes if c.fidelity is not None]
    worst = max(moved, key=lambda c: c.relative_error, default=None)
    lossy = max(merges, key=lambda c: c.fidelity or 0.0, default=None)
    return {
      "tensors": len(self.changes),
      "changed": len(moved),
      "types": kinds,
      "max_abs_error": max((c.max_abs_error for c in moved), default=0.0),
      "max_relative_error": worst.relative_error if worst else 0.0,
      "worst": worst.name if worst else None,
      "merged": len(merges),
      "merge_loss": lossy.fidelity if lossy else None,
      "merge_worst": lossy.name if lossy else None,
      "merge_kept": kept(self.changes),
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
class Read:
  """A weight as plain numbers.

  Attributes:
    array: what it stands for; float32 if it was packed or has an adapter,
      else in its own type.
    base: float32 without its adapter, or None where it has none.
  """

  array: np.ndarray
  base: np.ndarray | None = None


def read(weight: Any) -> Read:
  """Returns what a weight of any kind stands for; adapters merge in fp32."""
  if isinstance(weight, np.ndarray):
    return Read(weight)  # a view of a file: JAX would copy it, twice
  if hasattr(weight, "dense"):
    weight = jax.tree.map(jnp.asarray, weight)
  found = merged.in_float32(weight)
  if found is not None:
    return Read(*found)
  return Read(np.asarray(weights.dense(weight)))


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
