"""Adapter pool: serves many LoRA adapters over one base.

A pool has a fixed number of slots of a fixed rank, so any choice of adapters
runs the same compiled program. Other adapters wait in host memory; the least
recently used are dropped and read again from their directories.

  read = adapters.read_factors
  pool = pools.create(params, model, slots=4, rank=16, read=read)
  pool = pools.add(pool, "mine", "runs/a/adapter")
  pool, ids = pools.use(pool, ["mine", pools.BASE])
  params = weights.bind(pool.params, ids=ids)
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from research.lora import adapt
from research.lora.optim import row_factors
from research.lora.optim.row_factors import Factors
from research.lora.serving import adapter_slots as slots_of
from research.lora.serving.batched import NONE
from research.nn.transformer import Transformer
from research.typing import Array, Int, Params, UserError

BASE = "__base__"
"""Name of the base without an adapter, as in PEFT's mixed batches."""


Reader = Callable[[pathlib.Path, Params, Transformer, int], Factors]
"""(directory or file, base, its model, largest rank) -> an adapter's factors.

`research.interop.adapters.read_factors` is one."""

MAX_RANK = 256
"""Largest rank that `from_directories` accepts."""


@dataclasses.dataclass(frozen=True)
class Pool:
  """Adapters by name, and the base that they share.

  Immutable, except that `use` donates the memory of the slots: after
  `new, ids = use(pool, names)` only `new` may be used.

  Attributes:
    params: the base in `BatchedTensor`s, to bind ids to. `generate.prepare`
      may lay it out for decoding before or after adapters are loaded.
    model: the base's model.
    rank: rank of the slots.
    slots: name of the adapter in each slot, or None.
    recent: the names in slots, least recently used first.
    host: adapters in host memory, least recently used first.
    directories: paths of the adapters that can be read again.
    keep: number of re-readable adapters to keep in host memory.
    read: reads a directory; None if all adapters come from `add_tree`.
  """

  params: Any
  model: Transformer
  rank: int
  slots: tuple[str | None, ...]
  recent: tuple[str, ...] = ()
  host: Mapping[str, Factors] = dataclasses.field(default_factory=dict)
  directories: Mapping[str, pathlib.Path] = dataclasses.field(
    default_factory=dict
  )
  keep: int = 64
  read: Reader | None = None

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(sorted({*self.host, *self.directories}))


def create(
  params: Params,
  model: Transformer,
  *,
  slots: int = 8,
  rank: int = 16,
  keep: int = 64,
  targets: str | Sequence[str] = adapt.ALL_LINEAR,
  read: Reader | None = None,
) -> Pool:
  """Returns an empty pool over a base without adapters.

  Args:
    slots: number of different adapters in a batch.
    keep: number of re-readable adapters to keep in host memory.

  Raises:
    UserError: a number is below 1, or targets match nothing or experts.
  """
  for name, value in dict(slots=slots, rank=rank, keep=keep).items():
    if value < 1:
      raise UserError(f"pool: {name} is {value}, expected at least 1")
  wrapped = slots_of.add_slots(
    params, slots=slots, rank=rank, dtype=model.dtype, targets=targets
  )
  return Pool(wrapped, model, rank, (None,) * slots, keep=keep, read=read)


def from_directories(
  params: Params,
  model: Transformer,
  directories: Mapping[str, str | os.PathLike],
  read: Reader,
) -> Pool:
  """Returns a pool sized for the given adapters, all in host memory.

  Its slots, rank and target matrices are the smallest that fit them.
  """
  factors = {
    name: read(pathlib.Path(place), params, model, MAX_RANK)
    for name, place in directories.items()
  }
  matrices = sorted({path for adapter in factors.values() for path in adapter})
  pool = create(
    params,
    model,
    slots=len(factors),
    rank=max(
      len(a) for adapter in factors.values() for a, _ in adapter.values()
    ),
    targets="|".join(map(re.escape, matrices)),
    read=read,
  )
  for name, adapter in factors.items():
    _check_name(name)
    pool = _put(pool, name, adapter)
  return pool


def add(pool: Pool, name: str, directory: str | os.PathLike) -> Pool:
  """Returns the pool with an adapter read from PEFT's or llama.cpp's format.

  Args:
    pool: the pool; an adapter of the same name is replaced.
    name: the adapter's name, not `BASE`.
    directory: PEFT's directory or a .gguf file, see
      `interop.adapters.load_adapter`.

  Raises:
    UserError: the adapter is damaged, does not fit, replaces whole weights
      (modules_to_save), or is not low-rank (`row_factors.extract`).
  """
  _check_name(name)
  place = pathlib.Path(directory)
  pool = _put(pool, name, _read_adapter(pool, place))
  return _trimmed(
    dataclasses.replace(pool, directories={**pool.directories, name: place})
  )


def add_tree(pool: Pool, name: str, params: Params) -> Pool:
  """Returns the pool with an adapter from a parameter tree.

  Host memory always keeps it, since it cannot be read again.

  Args:
    pool: as for `add`.
    params: parameters with the adapter, as `adapt.Adapt` or training returns.
  """
  _check_name(name)
  return _put(remove(pool, name), name, row_factors.extract(params, pool.rank))


def remove(pool: Pool, name: str) -> Pool:
  """Returns the pool without an adapter; frees its slot."""
  return dataclasses.replace(
    _without_slot(pool, name),
    host={k: v for k, v in pool.host.items() if k != name},
    directories={k: v for k, v in pool.directories.items() if k != name},
  )


def use(pool: Pool, names: Sequence[str]) -> tuple[Pool, Int[Array, "B"]]:
  """Returns the pool with these adapters in slots, and the rows' ids.

  Adapters already in slots cost nothing. Others are written to free slots or
  replace the least recently used ones; nothing is compiled.

  Args:
    pool: the pool; the memory of its slots is donated.
    names: an adapter's name or `BASE` for each row of a batch.

  Raises:
    UserError: an adapter is unknown, or there are more of them than slots.
  """
  wanted = [name for name in dict.fromkeys(names) if name != BASE]
  for name in wanted:
    if name not in pool.names:
      known = ", ".join((BASE, *pool.names))
      raise UserError(f"no adapter is called {name!r}; there are {known}")
  if len(wanted) > len(pool.slots):
    raise UserError(
      f"a batch of {len(wanted)} adapters, expected at most "
      f"{len(pool.slots)}, the pool's slots"
    )
  absent = [name for name in wanted if name not in pool.slots]
  # Read all before writing any, so that a failure leaves `pool` usable.
  for name in absent:
    if name not in pool.host:
      pool = _put(pool, name, _read_adapter(pool, pool.directories[name]))
  for name in absent:
    pool = _placed(pool, name, wanted)
  recent = [name for name in pool.recent if name not in wanted] + wanted
  host = {k: v for k, v in pool.host.items() if k not in wanted}
  host |= {k: pool.host[k] for k in wanted if k in pool.host}
  pool = dataclasses.replace(pool, recent=tuple(recent), host=host)
  rows = [NONE if n == BASE else pool.slots.index(n) for n in names]
  return _trimmed(pool), jnp.asarray(rows, jnp.int32)


def _check_name(name: str) -> None:
  if name == BASE or not name:
    raise UserError(f"an adapter cannot be called {name!r}: choose another")


def _without_slot(pool, name):
  return dataclasses.replace(
    pool,
    slots=tuple(None if n == name else n for n in pool.slots),
    recent=tuple(n for n in pool.recent if n != name),
  )


def _put(pool, name, adapter):
  sizes = slots_of.sizes(pool.params)
  for path, (a, b) in adapter.items():
    if path not in sizes:
      raise UserError(
        f"adapter {name!r}: changes {path}, expected only matrices that the "
        "pool was made for"
      )
    if (a.shape[1], b.shape[1]) != sizes[path]:
      raise UserError(
        f"adapter {name!r}: {path} is {a.shape[1]} x {b.shape[1]}, expected "
        f"{sizes[path][0]} x {sizes[path][1]}"
      )
  host = {k: v for k, v in pool.host.items() if k != name}
  return dataclasses.replace(
    _without_slot(pool, name), host={**host, name: adapter}
  )


def _trimmed(pool):
  again = [name for name in pool.host if name in pool.directories]
  out = set(again[: max(0, len(again) - pool.keep)])
  host = {k: v for k, v in pool.host.items() if k not in out}
  return dataclasses.replace(pool, host=host)


def _read_adapter(pool, place):
  if pool.read is None:
    raise UserError(
      f"{place}: the pool was created without `read`, which reads directories"
    )
  return pool.read(place, slots_of.base(pool.params), pool.model, pool.rank)


def _placed(pool, name, wanted):
  """Writes an adapter to a slot without one of `wanted`; returns the pool."""
  if None in pool.slots:
    slot = pool.slots.index(None)
  else:
    oldest = next(n for n in pool.recent if n not in wanted)
    slot = pool.slots.index(oldest)
    pool = _without_slot(pool, oldest)
  slots = list(pool.slots)
  slots[slot] = name
  return dataclasses.replace(
    pool,
    params=slots_of.write(pool.params, pool.host[name], slot),
    slots=tuple(slots),
    recent=(*pool.recent, name),
  )
