"""Sharding as two short tables: path -> logical axes, logical -> mesh axes.

Nothing in a module, an optimizer or an adapter says how it is sharded. `AXES`
names the axes of a parameter by its path; optimizer moments, masters and
averages have paths that end like their parameter's, so the same row finds
them; a packed or adapted weight says itself (`weights.axes`) which of those
names its parts carry. `RULES` says over which axes of the mesh each name is
cut. Activations use the same names (`constrain`).

The mesh always has seven axes, most of them often of size 1:

  data      rows of the batch; weights are copied
  fsdp      rows of the batch; weights are cut, and gathered layer by layer
  sequence  tokens of a row; attention gathers keys and values
  ring      tokens of a row; keys and values pass by all devices
  ulysses   tokens of a row, of what the two above leave; in attention a device
            has all tokens of some heads
  tensor    heads, hidden units, vocabulary
  expert    rows of the batch, and the experts of a mixture

Pipeline parallelism is out of scope: no axis cuts the stack of layers.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.common import target_platform
from research import tree as trees
from research import weights
from research.typing import Array, Shaped, UserError

Names = tuple[str | None, ...]
"""A logical name, or None, for each of an array's last axes."""

Shardings = Any
"""A tree of `jax.sharding.Sharding`, one for each array of another tree."""

AXES: tuple[tuple[str, Names], ...] = (
  (r"(^|/)embed$", ("vocab", "width")),
  (r"(^|/)head$", ("width", "vocab")),
  (r"/attention/q$", ("width", "heads")),
  (r"/attention/[kv]$", ("width", "kv_heads")),
  (r"/attention/o$", ("heads", "width")),
  (r"/attention/q_bias$", ("heads",)),
  (r"/attention/[kv]_bias$", ("kv_heads",)),
  (r"/experts/(gate|up)$", ("expert", "width", "hidden")),
  (r"/experts/down$", ("expert", "hidden", "width")),
  (r"/(gate|up)$", ("width", "hidden")),
  (r"/down$", ("hidden", "width")),
  (r"/(gate|up)_bias$", ("hidden",)),
  (r"/router$", ("width", None)),
  # What the time changes is small.
  (r"_modulation/weight$|(^|/)clock/(enter|leave)$", (None, None)),
  # What projectors are kept as: small, and in groups across both axes.
  (r"/(gap|first|cosines|made|codes|step|zero)$", (None,)),
  # A vector a layer costs nothing; gathering it would.
  (r"(^|/)scale$|_bias$", (None,)),
)
"""Regular expression, searched for in a parameter's path -> logical axes.

The first row that matches counts. Axes in front of those named (a run's
layers) are never cut.
"""

RULES: Mapping[str, str | tuple[str, ...]] = {
  "batch": ("data", "fsdp", "expert"),
  "length": ("sequence", "ring", "ulysses"),
  "width": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "hidden": "tensor",
  "vocab": "tensor",
  "expert": "expert",
}
"""Logical axis -> the mesh axes that cut it."""

MESH_AXES = (
  "data",
  "fsdp",
  "sequence",
  "ring",
  "ulysses",
  "tensor",
  "expert",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """A mesh, and what is cut along its axes.

  Attributes:
    data, fsdp, sequence, ring, ulysses, tensor, expert: sizes; at most one is
      -1, for whatever the number of devices leaves. `sequence` and `ring` are
      two ways for the same, so one of them is 1.
    axes: path -> logical axes, see `AXES`.
    rules: logical axis -> mesh axes, see `RULES`.
  """

  data: int = -1
  fsdp: int = 1
  sequence: int = 1
  ring: int = 1
  ulysses: int = 1
  tensor: int = 1
  expert: int = 1
  axes: tuple[tuple[str, Names], ...] = dataclasses.field(
    default_factory=lambda: AXES
  )
  rules: Mapping[str, str | tuple[str, ...]] = dataclasses.field(
    default_factory=lambda: RULES
  )

  def __post_init__(self):
    sizes = self._sizes()
    for name, size in sizes.items():
      if size < 1 and size != -1:
        raise UserError(
          f"Layout.{name}: found {size}, expected at least 1, or -1 for"
          " whatever the other axes leave."
        )
    if list(sizes.values()).count(-1) > 1:
      raise UserError(f"Layout: found {sizes}, expected at most one -1.")
    if self.sequence != 1 and self.ring != 1:
      raise UserError(
        f"Layout: found sequence {self.sequence} and ring {self.ring}, expected"
        " one of them\nto be 1: attention gathers keys and values, or passes"
        " them around."
      )

  def _sizes(self) -> dict[str, int]:
    return {name: getattr(self, name) for name in MESH_AXES}

  def mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh over `devices`, by default all of them.

    A layout without a -1 may leave devices of a single process unused.

    Raises:
      UserError: the sizes do not fit the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = self._sizes()
    used = math.prod(size for size in sizes.values() if size > 0)
    left = -1 in sizes.values()
    count = len(devices)
    several = len({d.process_index for d in devices}) > 1
    if used > count or (left or several) and count % used:
      raise UserError(
        f"Layout: {sizes} is {used} devices; there are {count}.\n"
        "Expected sizes whose product divides that."
      )
    if left:
      sizes = {k: count // used if v < 0 else v for k, v in sizes.items()}
    elif several and used != count:
      raise UserError(
        f"Layout: {sizes} is {used} of {count} devices of several processes.\n"
        "Expected all of them: give one axis the size -1."
      )
    else:
      devices = devices[:used]
    # jax.make_mesh splits an axis of a pod's torus on some chips only, and
    # refuses 2 x 8 devices of 4 x 4 on the others.
    grid = mesh_utils.create_device_mesh(
      tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    automatic = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    return Mesh(grid, MESH_AXES, axis_types=automatic)

  def shardings(
    self, tree: Any, mesh: Mesh, counts: Mapping[str, int] | None = None
  ) -> Shardings:
    """Returns a sharding for each array of `tree`, in its structure.

    Args:
      tree: anything whose arrays (or shapes) have paths that end like a
        parameter's: params, their trainable part, an optimizer's state, a
        TrainState. Scalars are replicated.
      mesh: from `mesh`.
      counts: logical axis -> pieces that stay whole, see `counts`; a mesh axis
        that does not divide that number does not cut the axis.

    Raises:
      UserError: no row of the table matches an array.
    """
    return self._cut(tree, mesh, counts)[0]

  def uncut(
    self, tree: Any, mesh: Mesh, counts: Mapping[str, int] | None = None
  ) -> list[str]:
    """Returns, in words, what `shardings` leaves whole against the rules.

    Those are axes that their mesh axes do not divide: one line a name and
    size, with an array that has it.
    """
    return self._cut(tree, mesh, counts)[1]

  def _cut(self, tree, mesh, counts) -> tuple[Shardings, list[str]]:
    cut = _Cut(self.rules, dict(mesh.shape), counts or {})

    def one(path: str, leaf: Any) -> Any:
      names = part_names(leaf, self._names(path, leaf))
      return jax.tree.map(
        lambda x, names: NamedSharding(mesh, cut.spec(x.shape, names, path)),
        leaf,
        names,
      )

    return trees.map_paths(one, tree, is_leaf=weights.is_weight), cut.whole()

  def _names(self, path: str, leaf: Any) -> Names:
    names = names_of(path, self.axes)
    if names is not None:
      return names
    if not weights.is_weight(leaf) and leaf.ndim == 0:
      return ()
    raise UserError(
      f"{path}: no row of Layout.axes matches this array of shape"
      f" {tuple(leaf.shape)}.\nExpected one that names its axes, such as"
      ' (r"/gate$", ("width", "hidden")).'
    )

  def batch(self, mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch's arrays `[B, T]`."""
    return NamedSharding(
      mesh, PartitionSpec(self.rules["batch"], self.rules["length"])
    )


def names_of(
  path: str, axes: tuple[tuple[str, Names], ...] = AXES
) -> Names | None:
  """Returns the names in the first row that matches `path`, None without."""
  found = (names for pattern, names in axes if re.search(pattern, path))
  return next(found, None)


def part_names(leaf: Any, names: Names) -> Any:
  """Returns `names` for each array of `leaf`, as leaves of its structure."""
  if weights.is_weight(leaf):
    found = weights.axes(leaf, names)
    return jax.tree.map(lambda x, names: _Names(names), leaf, found)
  # A factored moment has fewer axes than its parameter: the first ones'.
  return _Names(names[: leaf.ndim])


@dataclasses.dataclass(frozen=True)
class _Names:
  """Names as a leaf: a tuple would be a tree."""

  names: Names


class _Cut:
  """Turns names into specs, and remembers what could not be cut."""

  def __init__(self, rules, sizes, counts):
    self._rules, self._sizes, self._counts = rules, sizes, counts
    self._whole: dict[str, str] = {}

  def spec(
    self, shape: Sequence[int], names: _Names, path: str
  ) -> PartitionSpec:
    """Returns how an array of `shape` is cut whose last axes are `names`."""
    names = (None,) * (len(shape) - len(names.names)) + names.names
    axes = [
      self._axes(n, dim, path) for n, dim in zip(names, shape, strict=True)
    ]
    used = [a for axis in axes for a in axis]
    if len(used) != len(set(used)):
      raise UserError(
        f"{path}: {names} is cut over {used}; a mesh axis cuts one axis of an"
        " array.\nExpected other Layout.rules."
      )
    # A spec with one axis as a string, and nothing behind the last cut.
    found = [(a[0] if len(a) == 1 else a) if a else None for a in axes]
    while found and found[-1] is None:
      found.pop()
    return PartitionSpec(*found)

  def _axes(self, name: str | None, dim: int, path: str) -> tuple[str, ...]:
    found = _mesh_axes(self._rules, name, self._sizes)
    pieces = math.gcd(dim, self._counts.get(name, dim))
    kept = dividing(found, self._sizes, pieces)
    if kept != found:
      self._whole[f"{name} of {pieces}"] = path
    return kept

  def whole(self) -> list[str]:
    """Returns what stayed whole that the rules would cut."""
    return [f"{what} ({path})" for what, path in self._whole.items()]


def _mesh_axes(rules, name, sizes) -> tuple[str, ...]:
  """Returns the mesh axes of more than one device that `name` goes over."""
  found = rules.get(name) or ()
  found = (found,) if isinstance(found, str) else tuple(found)
  return tuple(a for a in found if sizes.get(a, 1) > 1)


def dividing(
  axes: tuple[str, ...], sizes: Mapping[str, int], pieces: int
) -> tuple[str, ...]:
  """Returns the first of `axes` whose sizes together divide `pieces`."""
  while axes and pieces % math.prod(sizes[a] for a in axes):
    axes = axes[:-1]
  return axes


def counts(model: Any) -> dict[str, int]:
  """Returns how many pieces of `model`'s axes must stay whole: heads.

  Args:
    model: a `research.nn.transformer.Transformer`; the layers may differ.
  """
  found = [kind.attention for kind in model.layer_kinds()]
  return {
    "heads": math.gcd(*(a.heads for a in found)),
    "kv_heads": math.gcd(*(a.kv_heads for a in found)),
  }


def constrain(
  x: Shaped[Array, "..."], *names: str | None
) -> Shaped[Array, "..."]:
  """Returns `x`, cut by `RULES` over the mesh that is set; else as it is.

  Args:
    x: an activation.
    names: one for each axis of `x`. An axis that its mesh axes do not divide
      stays whole, and so do mesh axes of a surrounding `shard_map`.
  """
  if not is_cut():
    return x
  return jax.lax.with_sharding_constraint(x, activation(x.shape, *names))


def whole(x: Shaped[Array, "..."], last: int = 1) -> Shaped[Array, "..."]:
  """Returns `x`, whole along its last axes on each device of a mesh.

  For what XLA cannot cut along them, or cuts wrongly. Over the other axes it
  decides; a gradient is kept as whole.

  Args:
    x: any array.
    last: how many axes.
  """
  if not is_cut():
    return x
  free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - last)
  spec = PartitionSpec(*free, *(None,) * last)
  return jax.lax.with_sharding_constraint(x, spec)


is_cut = target_platform.is_cut
"""Here, too: who cuts arrays asks it."""


def activation(shape: Sequence[int], *names: str | None) -> PartitionSpec:
  """Returns the spec that `constrain` would give an array of `shape`."""
  cut = _Cut(RULES, target_platform.free_axes(), {})
  return cut.spec(shape, _Names(names), "activation")


def cuts(
  shape: Sequence[int], *names: str | None
) -> tuple[tuple[str, ...], ...]:
  """Returns the mesh axes in `activation`'s spec, for each axis of `shape`."""
  return spec_axes(activation(shape, *names), len(shape))


def spec_axes(spec: PartitionSpec, ndim: int) -> tuple[tuple[str, ...], ...]:
  """Returns the mesh axes that cut each of an array's `ndim` axes."""
  found = (*spec, *(None,) * (ndim - len(spec)))
  return tuple((a,) if isinstance(a, str) else tuple(a or ()) for a in found)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of what every device has whole."""
  return NamedSharding(mesh, PartitionSpec())


def bytes_per_device(tree: Any, shardings: Shardings) -> int:
  """Returns the bytes of `tree`'s arrays, or shapes, on each device."""
  sizes = jax.tree.map(trees.part_bytes, tree, shardings)
  return sum(jax.tree.leaves(sizes))
