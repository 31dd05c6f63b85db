"""Many adapters over one base: slots in a compiled program, the rest on call.

A pool has a fixed number of slots of a fixed rank, so whatever adapters are
in them, a batch is the same program. Adapters wait in host memory, and those
not used for longest are read from their directories again.

  pool = pools.create(params, model, slots=4, rank=16, read=pool_reader.read)
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
"""In place of an adapter's name: none, as in PEFT's mixed batches."""


Reader = Callable[[pathlib.Path, Params, Transformer, int], Factors]
"""(directory or file, base, its model, largest rank) -> an adapter's factors;
`research.interop.peft.pool_reader.read` is one."""

LARGEST = 256
"""Rank up to which `fitted` takes adapters."""


@dataclasses.dataclass(frozen=True)
class Pool:
  """Adapters by name, and the base that they share.

  A value, but for the memory of its slots: what `use` returns has it, and the
  pool that it was given to must not be used again.

  Attributes:
    params: the base under `BatchedTensor`s, to be bound. May be laid out for
      decoding (`generate.prepare`) before or after adapters are in it.
    model: what computes with them.
    rank: of the slots.
    slots: whose adapter is in each, or None.
    recent: those names, least recently used first.
    host: adapters in host memory, least recently used first.
    places: directories of adapters that can be read again.
    keep: how many of those stay in host memory.
    read: of directories; None for a pool of trees alone.
  """

  params: Any
  model: Transformer
  rank: int
  slots: tuple[str | None, ...]
  recent: tuple[str, ...] = ()
  host: Mapping[str, Factors] = dataclasses.field(default_factory=dict)
  places: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)
  keep: int = 64
  read: Reader | None = None

  @property
  def names(self) -> tuple[str, ...]:
    """All adapters that can be used, sorted."""
    return tuple(sorted({*self.host, *self.places}))


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
    params: the base, packed or not.
    model: of it.
    slots: how many different adapters a batch can use.
    rank: the largest of any.
    keep: how many adapters that can be read again stay in host memory.
    targets: what adapters may change, see `adapt.Adapt`.
    read: what reads adapters' directories, see `Reader`.

  Raises:
    UserError: a number below 1, targets that match nothing, or experts.
  """
  for name, value in dict(slots=slots, rank=rank, keep=keep).items():
    if value < 1:
      raise UserError(f"pool: {name} is {value}, expected at least 1")
  wrapped = slots_of.around(
    params, slots=slots, rank=rank, dtype=model.dtype, targets=targets
  )
  return Pool(wrapped, model, rank, (None,) * slots, keep=keep, read=read)


def fitted(
  params: Params,
  model: Transformer,
  places: Mapping[str, str | os.PathLike],
  read: Reader,
) -> Pool:
  """Returns a pool with a slot for each of some adapters, and no room else.

  Args:
    params: the base, packed or not.
    model: of it.
    places: directories by name, see `add`.
    read: what reads them, see `Reader`.
  """
  held = {
    name: read(pathlib.Path(place), params, model, LARGEST)
    for name, place in places.items()
  }
  matrices = sorted({path for found in held.values() for path in found})
  pool = create(
    params,
    model,
    slots=len(held),
    rank=max(len(a) for found in held.values() for a, _ in found.values()),
    targets="|".join(map(re.escape, matrices)),
    read=read,
  )
  for name, found in held.items():
    _free(name)
    pool = _put(pool, name, found)
  return pool


def add(pool: Pool, name: str, directory: str | os.PathLike) -> Pool:
  """Returns the pool with an adapter in PEFT's format, or llama.cpp's.

  Args:
    pool: if it has one of that name, the new one takes its place.
    name: anything but `BASE`.
    directory: or a .gguf file, see `gguf_adapter.load_any`.

  Raises:
    UserError: it is damaged or does not fit, brings weights whole, or is no
      plain LoRA (`row_factors.of`).
  """
  _free(name)
  place = pathlib.Path(directory)
  pool = _put(pool, name, _again(pool, place))
  return _trimmed(
    dataclasses.replace(pool, places={**pool.places, name: place})
  )


def add_tree(pool: Pool, name: str, params: Params) -> Pool:
  """Returns the pool with an adapter of a tree, which always is kept.

  Args:
    pool: as for `add`.
    name: as for `add`.
    params: the base under the adapter, as `adapt.Adapt` or training left it.
  """
  _free(name)
  return _put(remove(pool, name), name, row_factors.of(params, pool.rank))


def remove(pool: Pool, name: str) -> Pool:
  """Returns the pool without an adapter; its slot is free."""
  return dataclasses.replace(
    _emptied(pool, name),
    host={k: v for k, v in pool.host.items() if k != name},
    places={k: v for k, v in pool.places.items() if k != name},
  )


def use(pool: Pool, names: Sequence[str]) -> tuple[Pool, Int[Array, "B"]]:
  """Returns the pool with these adapters in slots, and their ids.

  Adapters that are in slots already cost nothing; others take free slots, or
  those used the longest time ago, without any compilation.

  Args:
    pool: its slots' memory is used again.
    names: of each row of a batch, an adapter's or `BASE`.

  Raises:
    UserError: there is no such adapter, or more of them than slots.
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
  # All are read before the first is written: what fails leaves `pool` whole.
  for name in absent:
    if name not in pool.host:
      pool = _put(pool, name, _again(pool, pool.places[name]))
  for name in absent:
    pool = _placed(pool, name, wanted)
  recent = [name for name in pool.recent if name not in wanted] + wanted
  host = {k: v for k, v in pool.host.items() if k not in wanted}
  host |= {k: pool.host[k] for k in wanted if k in pool.host}
  pool = dataclasses.replace(pool, recent=tuple(recent), host=host)
  rows = [NONE if n == BASE else pool.slots.index(n) for n in names]
  return _trimmed(pool), jnp.asarray(rows, jnp.int32)


def _free(name: str) -> None:
  if name == BASE or not name:
    raise UserError(f"an adapter cannot be called {name!r}: choose another")


def _emptied(pool, name):
  """Returns the pool with no slot for `name`."""
  return dataclasses.replace(
    pool,
    slots=tuple(None if n == name else n for n in pool.slots),
    recent=tuple(n for n in pool.recent if n != name),
  )


def _put(pool, name, found):
  """Returns the pool with factors in host memory; checks that they fit."""
  sizes = slots_of.sizes(pool.params)
  for path, (a, b) in found.items():
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
  return dataclasses.replace(_emptied(pool, name), host={**host, name: found})


def _trimmed(pool):
  """Returns the pool with as many adapters in host memory as it keeps."""
  again = [name for name in pool.host if name in pool.places]
  out = set(again[: max(0, len(again) - pool.keep)])
  host = {k: v for k, v in pool.host.items() if k not in out}
  return dataclasses.replace(pool, host=host)


def _again(pool, place):
  """Returns the factors in a directory, for this pool."""
  if pool.read is None:
    raise UserError(
      f"{place}: the pool was created without `read`, which reads directories"
    )
  return pool.read(place, slots_of.base(pool.params), pool.model, pool.rank)


def _placed(pool, name, wanted):
  """Returns the pool with an adapter in some slot that is not `wanted`."""
  if None in pool.slots:
    slot = pool.slots.index(None)
  else:
    oldest = next(n for n in pool.recent if n not in wanted)
    slot = pool.slots.index(oldest)
    pool = _emptied(pool, oldest)
  slots = list(pool.slots)
  slots[slot] = name
  return dataclasses.replace(
    pool,
    params=slots_of.write(pool.params, pool.host[name], slot),
    slots=tuple(slots),
    recent=(*pool.recent, name),
  )
