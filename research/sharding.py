"""Sharding rules: parameter path -> logical axes, logical axis -> mesh axes.

Two tables decide all sharding; modules, optimizers and adapters contain none.
`AXES` names the axes of a parameter by its path. Optimizer moments, fp32 master
weights and moving averages have paths that end like their parameter's, so they
match the same row. A packed or adapted weight reports the names of its arrays
itself (`weights.axes`). `RULES` maps each logical name to the mesh axes that
shard it. Activations use the same names (`constrain`).

The mesh always has seven axes, most of them often of size 1:

  data      batch rows; weights are replicated
  fsdp      batch rows; weights are sharded and gathered layer by layer
  sequence  tokens of a row; attention gathers keys and values
  ring      tokens of a row; keys and values circulate among the devices
  ulysses   tokens of a row, within the shards of the two axes above; in
            attention each device has all tokens of some heads
  tensor    heads, hidden units, vocabulary
  expert    batch rows, and the experts of an MoE layer

Pipeline parallelism is out of scope: no mesh axis shards the layer stack.
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
"""A logical name, or None, for each of an array's trailing axes."""

Shardings = Any
"""A tree of `jax.sharding.Sharding` that matches a tree of arrays."""

AXES: tuple[tuple[str, Names], ...] = (
  (r"(^|/)embed$", ("vocab", "width")),
  (r"(^|/)head$", ("width", "vocab")),
  # A scalar head has one or two outputs.
  (r"(^|/)score/out$", ("width", None)),
  (r"attention/q$", ("width", "heads")),
  (r"attention/[kv]$", ("width", "kv_heads")),
  (r"attention/o$", ("heads", "width")),
  (r"attention/q_bias$", ("heads",)),
  (r"attention/[kv]_bias$", ("kv_heads",)),
  (r"/experts/(gate|up)$", ("expert", "width", "hidden")),
  (r"/experts/down$", ("expert", "hidden", "width")),
  (r"/(gate|up)$", ("width", "hidden")),
  (r"/down$", ("hidden", "width")),
  (r"/(gate|up)_bias$", ("hidden",)),
  (r"/router$", ("width", None)),
  # Vision encoders and connectors: inputs and outputs of their layers.
  (r"(^|/)patch_embed$|(^|/)positions(/table)?$", (None, "width")),
  (r"(^|/)(\w+_)?projection$|(^|/)project$", ("width", None)),
  (
    r"(^|/)(probe|latents|class_embed|padding)$|(^|/)logit_(scale|bias)$",
    (None,),
  ),
  (r"/(attention|mlp)_gate$|(^|/)temperature$", (None,)),
  # The timestep embedding and AdaLN weights are small.
  (r"_modulation/weight$|(^|/)clock/(enter|leave)$", (None, None)),
  # State of low-rank gradient projectors: small, in groups across both axes.
  (r"/(gap|first|cosines|made|codes|step|zero)$", (None,)),
  # One vector per layer costs little memory; gathering it would cost time.
  (r"(^|/)(scale|bias)$|_bias$", (None,)),
)
"""(regular expression, searched for in the parameter path; logical axes).

The first matching row applies. Leading axes without a name (the layers of a
run) are never sharded.
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
"""Logical axis -> the mesh axes that shard it."""

MESH_AXES = (
  "data",
  "fsdp",
  "sequence",
  "ring",
  "ulysses",
  "tensor",
  "expert",
)


def _short(sizes: Mapping[str, int]) -> dict[str, int]:
  """Returns the mesh axes that are not 1, for messages."""
  return {name: size for name, size in sizes.items() if size != 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """The sizes of the mesh axes, and the sharding rules.

  Attributes:
    data, fsdp, sequence, ring, ulysses, tensor, expert: mesh axis sizes. At
      most one is -1: it takes the devices that the others leave. `sequence` and
      `ring` are alternatives, so one of them must be 1.
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

    In a single process, a layout without -1 may leave devices unused.

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
        f"Layout: the mesh {_short(sizes)} needs {used} devices, found"
        f" {count}.\nThe product of the sizes must divide the number of"
        " devices."
      )
    if left:
      sizes = {k: count // used if v < 0 else v for k, v in sizes.items()}
    elif several and used != count:
      raise UserError(
        f"Layout: the mesh {_short(sizes)} uses {used} of {count} devices of"
        " several processes.\nIt must use all: give one axis the size -1."
      )
    else:
      devices = devices[:used]
    # jax.make_mesh splits a physical torus axis on some chips only and rejects
    # a 2 x 8 mesh on a 4 x 4 slice of the others.
    grid = mesh_utils.create_device_mesh(
      tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    automatic = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    return Mesh(grid, MESH_AXES, axis_types=automatic)

  def shardings(
    self, tree: Any, mesh: Mesh, counts: Mapping[str, int] | None = None
  ) -> Shardings:
    """Returns the sharding of each array of `tree`, in its structure.

    Args:
      tree: any tree whose arrays (or shapes) have paths that end like a
        parameter's: parameters, their trainable part, optimizer state, a
        TrainState. Scalars are replicated.
      mesh: from `mesh`.
      counts: logical axis -> number of indivisible units along it, such as
        heads; see `head_counts`. Mesh axes that do not divide it do not shard
        the axis.

    Raises:
      UserError: no row of `axes` matches an array.
    """
    return self._cut(tree, mesh, counts)[0]

  def undivided(
    self, tree: Any, mesh: Mesh, counts: Mapping[str, int] | None = None
  ) -> list[str]:
    """Describes the axes that `shardings` leaves unsharded despite the rules.

    Their mesh axes do not divide them. Returns one line per logical axis and
    size, with the path of an example array.
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
    names = logical_axes(path, self.axes)
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
    """Returns the sharding of batch arrays `[B, T]`."""
    return NamedSharding(
      mesh, PartitionSpec(self.rules["batch"], self.rules["length"])
    )


def logical_axes(
  path: str, axes: tuple[tuple[str, Names], ...] = AXES
) -> Names | None:
  """Returns the axis names of the first row matching `path`, or None."""
  found = (names for pattern, names in axes if re.search(pattern, path))
  return next(found, None)


def part_names(leaf: Any, names: Names) -> Any:
  """Returns the axis names of each array inside `leaf`, as tree leaves."""
  if weights.is_weight(leaf):
    found = weights.axes(leaf, names)
    # What is bound to a batch, such as a key of dropout, has no names.
    return jax.tree.map(lambda x, names: _Names(names or ()), leaf, found)
  # A factored moment has fewer axes than its parameter, namely the first ones.
  return _Names(names[: leaf.ndim])


@dataclasses.dataclass(frozen=True)
class _Names:
  """Wraps axis names so that JAX treats them as a leaf, not as a subtree."""

  names: Names


class _Cut:
  """Converts axis names to PartitionSpecs; records axes it cannot shard."""

  def __init__(self, rules, sizes, counts):
    self._rules, self._sizes, self._counts = rules, sizes, counts
    self._whole: dict[str, str] = {}

  def spec(
    self, shape: Sequence[int], names: _Names, path: str
  ) -> PartitionSpec:
    """Returns the spec of an array of `shape` with trailing axes `names`."""
    names = (None,) * (len(shape) - len(names.names)) + names.names
    axes = [
      self._axes(n, dim, path) for n, dim in zip(names, shape, strict=True)
    ]
    used = [a for axis in axes for a in axis]
    if len(used) != len(set(used)):
      raise UserError(
        f"{path}: {names} is sharded over {used}; a mesh axis can shard only"
        " one axis of an array.\nExpected other Layout.rules."
      )
    # Canonical form: a single mesh axis as a string, no trailing None.
    found = [(a[0] if len(a) == 1 else a) if a else None for a in axes]
    while found and found[-1] is None:
      found.pop()
    return PartitionSpec(*found)

  def _axes(self, name: str | None, dim: int, path: str) -> tuple[str, ...]:
    found = _mesh_axes(self._rules, name, self._sizes)
    pieces = math.gcd(dim, self._counts.get(name, dim))
    kept = dividing_axes(found, self._sizes, pieces)
    if kept != found:
      self._whole[f"{name} of {pieces}"] = path
    return kept

  def whole(self) -> list[str]:
    """Describes the axes that the rules shard but that could not be divided."""
    return [f"{what} ({path})" for what, path in self._whole.items()]


def _mesh_axes(rules, name, sizes) -> tuple[str, ...]:
  """Returns the mesh axes that shard `name`, those of size 1 left out."""
  found = rules.get(name) or ()
  found = (found,) if isinstance(found, str) else tuple(found)
  return tuple(a for a in found if sizes.get(a, 1) > 1)


def dividing_axes(
  axes: tuple[str, ...], sizes: Mapping[str, int], pieces: int
) -> tuple[str, ...]:
  """Returns the longest prefix of `axes` whose total size divides `pieces`."""
  while axes and pieces % math.prod(sizes[a] for a in axes):
    axes = axes[:-1]
  return axes


def head_counts(model: Any) -> dict[str, int]:
  """Returns the number of heads along `heads` and `kv_heads`.

  Sharding must not split a head, so only divisors of these counts may shard
  those axes. If layers differ, this is the greatest common divisor.

  Args:
    model: a `research.nn.transformer.Transformer`.
  """
  kinds = model.layer_kinds()
  found = [kind.attention for kind in kinds]
  crossing = [k.cross.attention for k in kinds if k.cross is not None]
  return {
    "heads": math.gcd(*(a.heads for a in (*found, *crossing))),
    "kv_heads": math.gcd(*(a.kv_heads for a in found)),
  }


def constrain(
  x: Shaped[Array, "..."], *names: str | None
) -> Shaped[Array, "..."]:
  """Constrains the sharding of activation `x` by `RULES` on the current mesh.

  Returns `x` unchanged without a mesh.

  Args:
    x: an activation.
    names: a logical name (or None) for each axis of `x`. Axes that their mesh
      axes do not divide stay unsharded; mesh axes of an enclosing `shard_map`
      are not used.
  """
  if not is_cut():
    return x
  return jax.lax.with_sharding_constraint(x, activation(x.shape, *names))


def unsharded(x: Shaped[Array, "..."], last: int = 1) -> Shaped[Array, "..."]:
  """Constrains `x` to be unsharded along its last axes.

  For operations that XLA cannot partition along those axes, or partitions
  wrongly. XLA decides about the other axes. Applies to the gradient as well.

  Args:
    x: any array.
    last: the number of trailing axes.
  """
  if not is_cut():
    return x
  free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - last)
  spec = PartitionSpec(*free, *(None,) * last)
  return jax.lax.with_sharding_constraint(x, spec)


is_cut = target_platform.may_be_sharded
"""Re-exported for callers that shard arrays."""


def activation(shape: Sequence[int], *names: str | None) -> PartitionSpec:
  """Returns the PartitionSpec that `constrain` uses for an array of `shape`."""
  cut = _Cut(RULES, target_platform.free_axes(), {})
  return cut.spec(shape, _Names(names), "activation")


def activation_axes(
  shape: Sequence[int], *names: str | None
) -> tuple[tuple[str, ...], ...]:
  """Returns the mesh axes that shard each axis of an activation of `shape`."""
  return spec_axes(activation(shape, *names), len(shape))


def spec_axes(spec: PartitionSpec, ndim: int) -> tuple[tuple[str, ...], ...]:
  """Returns the mesh axes in `spec` for each of an array's `ndim` axes."""
  found = (*spec, *(None,) * (ndim - len(spec)))
  return tuple((a,) if isinstance(a, str) else tuple(a or ()) for a in found)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that is replicated on every device."""
  return NamedSharding(mesh, PartitionSpec())


def bytes_per_device(tree: Any, shardings: Shardings) -> int:
  """Returns the bytes per device of `tree`'s arrays or shape structs."""
  sizes = jax.tree.map(trees.part_bytes, tree, shardings)
  return sum(jax.tree.leaves(sizes))
