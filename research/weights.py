"""Weights are values: the only place that knows how a leaf is multiplied.

A parameter leaf is a `jax.Array`, or a `Weight`: a small frozen dataclass,
registered as a pytree, that stands for one: `AdaptedTensor`, `QTensor`, and
whatever comes. JAX's registration is the only one; no module, trainer, sampler
or checkpoint asks for a type.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from kernels_pallas import grouped_matmul
from kernels_pallas.common import target_platform
from research import tree
from research.typing import Array, Float, Int, Params, PRNGKey, Shaped

AnyWeight = Any
"""A `jax.Array`, or a `Weight`."""


class Weight:
  """A leaf that stands for an array, by what it answers.

  Subclasses are frozen dataclasses, registered as pytrees, with `shape`,
  `dtype`, `dense` and `axes`; the rest has defaults, which decode.
  """

  format = None
  """What says how its parts are read, if it is packed."""
  is_adapter = False
  """Whether it changes another weight, `w`, as it is trained to."""
  is_renewable = False
  """Whether it is trained as the codes it is stored in: see `Int8Tensor`."""
  token_wise = False
  """Whether what it makes of a token depends on that token alone."""

  @property
  def ndim(self) -> int:
    """Returns the number of logical axes."""
    return len(self.shape)

  def dense(self) -> Shaped[Array, "..."]:
    """Returns the logical array."""
    raise NotImplementedError

  def axes(self, names: tuple[str | None, ...]) -> Any:
    """Returns its parts' logical axis names, for sharding; see `axes`."""
    raise NotImplementedError

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `einsum(eq, x, w)` in the dtype of `x`."""
    return einsum(eq, x, self.dense())

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns rows, of an embedding."""
    return take(self.dense(), ids)

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    """Returns each row of `x` times its expert's matrix, rows by expert."""
    return ragged_dot(x, self.dense(), sizes)

  def bind(self, *, key: PRNGKey | None, ids: Int[Array, "B"] | None) -> Any:
    """Returns itself with what depends on the batch: nothing, by default."""
    return self

  def bias_of(self, b: Float[Array, "... O"]) -> Float[Array, "... O"]:
    """Returns the bias behind it: another one if it scales whole outputs."""
    return b

  def within(self, f: Callable[[Any], Any]) -> Any:
    """Returns itself with `f` of the weight that multiplies; see `within`."""
    return f(self)

  def with_tokens(
    self, tokens: Int[Array, "B T"], segments: Int[Array, "B T"] | None
  ) -> Any:
    """Returns itself knowing the tokens that come next; see `with_tokens`."""
    return self

  def of_tokens(self, keep: Int[Array, "B N"]) -> Any:
    """Returns itself knowing some of the tokens it knew; see `of_tokens`."""
    return self

  def count(self) -> int:
    """Returns how many parameters it stands for; see `count`."""
    # Without its arrays, which another tree has, it has no shape.
    return math.prod(self.shape) if jax.tree.leaves(self) else 0


class WrappedWeight(Weight):
  """A weight around another one, `w`, whose shape and type are its own."""

  @property
  def shape(self) -> tuple[int, ...]:
    """Returns the logical shape."""
    return self.w.shape

  @property
  def dtype(self) -> Any:
    """Returns the logical type."""
    return self.w.dtype

  def bind(self, *, key: PRNGKey | None, ids: Int[Array, "B"] | None) -> Any:
    """Returns itself with what depends on the batch in `w`."""
    w = self.w.bind(key=key, ids=ids) if is_weight(self.w) else self.w
    return dataclasses.replace(self, w=w)

  def bias_of(self, b: Float[Array, "... O"]) -> Float[Array, "... O"]:
    """Returns the bias behind `w`."""
    return bias_of(self.w, b)

  def count(self) -> int:
    """Returns the parameters of `w`, and of what is around it."""
    beside = dataclasses.replace(self, w=None)
    return count(self.w) + sum(map(_count, jax.tree.leaves(beside)))


def is_weight(x: Any) -> bool:
  """Whether `x` is a leaf that answers by its own methods."""
  return isinstance(x, Weight)


def wrapped(w: AnyWeight) -> AnyWeight | None:
  """Returns the weight that `w` is around, or None if it is around none."""
  return w.w if isinstance(w, WrappedWeight) else None


def is_packed(w: AnyWeight) -> bool:
  """Whether `w` is parts that a format reads, and nothing around them."""
  return is_weight(w) and w.format is not None


def is_adapter(w: AnyWeight) -> bool:
  """Whether `w` is an adapter around another weight."""
  return is_weight(w) and w.is_adapter


def is_renewable(w: AnyWeight) -> bool:
  """Whether `w` is trained as the codes it is stored in."""
  return is_weight(w) and w.is_renewable


def named(params: Any) -> list[tuple[str, AnyWeight]]:
  """Returns each leaf of a tree of weights, by its path."""
  found, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_weight)
  return [(tree.path_name(path), w) for path, w in found]


def einsum(
  eq: str, x: Float[Array, "..."], w: AnyWeight
) -> Float[Array, "..."]:
  """Returns `einsum(eq, x, w)` in the dtype of `x`.

  Args:
    eq: two operands; `w`'s letters are its logical axes, e.g.
      `"...d,df->...f"`, or `"...d,vd->...v"` for a tied head.
    x: activations; their dtype is the compute dtype.
    w: any weight; arrays are cast to the dtype of `x`.
  """
  if is_weight(w):
    return w.einsum(eq, x)
  w = jnp.asarray(w).astype(x.dtype)
  if eq.startswith("...") and _is_row(x):
    # The platform is that of the program, which may be compiled for another
    # one than this process runs on.
    return jax.lax.platform_dependent(
      x, w, cpu=partial(_doubled, eq), default=partial(jnp.einsum, eq)
    )
  return _flatly(eq, x, w)


def _flatly(eq: str, x: Float[Array, "..."], w: Float[Array, "..."]):
  """Returns `einsum(eq, x, w)` with the leading axes of `x` as one.

  The gradient of `w` is then a sum over a single axis. Over two, XLA's CPU
  backend transposes what went in: that took longer than the product, and twice
  the whole backward pass of a layer.
  """
  rows = x.ndim + len("...") - eq.index(",")
  # Rows of a batch and tokens of a row may both be cut; flat they cannot.
  if not eq.startswith("...") or rows < 2 or target_platform.is_cut():
    return jnp.einsum(eq, x, w)
  y = jnp.einsum(eq, x.reshape(-1, *x.shape[rows:]), w)
  return y.reshape(*x.shape[:rows], *y.shape[1:])


def _is_row(x: Float[Array, "..."]) -> bool:
  """Whether `x` is a single row in bf16, as in decoding."""
  return x.dtype == jnp.bfloat16 and x.ndim > 1 and x.size == x.shape[-1]


def _doubled(eq: str, x: Float[Array, "..."], w: Float[Array, "..."]):
  """Returns `einsum(eq, x, w)` as the first of two equal rows.

  XLA's CPU backend has bf16 kernels for matrices only, and would convert the
  whole weight for a single row; two are 16 times faster (SmolLM2's head: 2
  against 32 ms).
  """
  # The leading axis is one of the dots, first in the output too.
  return jnp.einsum(eq, jnp.concatenate([x, x]), w)[:1]


def take(w: AnyWeight, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
  """Returns rows `ids` of an embedding `w [V, D]`."""
  if is_weight(w):
    return w.take(ids)
  return jnp.take(w, ids, axis=0)


def ragged_dot(
  x: Float[Array, "T I"], w: AnyWeight, sizes: Int[Array, "E"]
) -> Float[Array, "T O"]:
  """Returns each row of `x` times its expert's matrix.

  Args:
    x: rows sorted by expert.
    w: `[E, in, out]`, any weight.
    sizes: how many rows belong to each expert; their sum is at most `T`.
  """
  if is_weight(w):
    return w.ragged_dot(x, sizes)
  return grouped_matmul.matmul(x, w.astype(x.dtype), sizes)


def dense(w: AnyWeight) -> Shaped[Array, "..."]:
  """Returns the logical array that `w` stands for."""
  return w.dense() if is_weight(w) else jnp.asarray(w)


def bias_of(w: AnyWeight, b: Float[Array, "... O"]) -> Float[Array, "... O"]:
  """Returns what is added to products with `w` whose bias is `b`.

  That is `b`, unless `w` scales its outputs as wholes, as (IA)^3 does.

  Args:
    w: any weight `[..., in, out]`.
    b: `[..., out]`, with the same leading axes.
  """
  return w.bias_of(b) if is_weight(w) else b


def bias_path(path: str) -> str | None:
  """Returns the path of the bias of the matrix at `path`; it may have none.

  A router's is none of its outputs: it counts in the choice of experts alone.
  """
  *above, name = path.split("/")
  if name == "router":
    return None
  if name == "matrix":  # of a convolution's kernel
    return "/".join([*above[:-1], "bias"])
  return f"{path}_bias"


def axes(w: AnyWeight, names: Sequence[str | None]) -> Any:
  """Returns logical axis names for each array in `w`, in `w`'s structure.

  Args:
    w: a weight whose trailing axes are `names`; leading ones, such as the
      layers of a scanned run, have no name. None, a part that another tree
      has, stays None.
    names: one logical name (or None) per trailing axis.
  """
  if w is None:
    return None
  if is_weight(w):
    return w.axes(tuple(names))
  return (None,) * (w.ndim - len(names)) + tuple(names)


def within(w: AnyWeight, f: Callable[[AnyWeight], AnyWeight]) -> AnyWeight:
  """Returns `w` with `f` of the weight that multiplies, in place of that one.

  Those are the same, unless `w` changes the inputs first: rounds or rotates
  them, say. What is measured of inputs, and packed, is what stands inside.
  """
  return w.within(f) if is_weight(w) else f(w)


def inner(w: AnyWeight) -> AnyWeight:
  """Returns the weight that multiplies within `w`, see `within`."""
  found = []
  within(w, lambda x: found.append(x) or x)
  return found[0]


def count(params: Any) -> int:
  """Returns how many parameters a tree stands for, packed or not.

  Of a packed weight those are its logical elements, whatever it is stored in;
  of an adapted one its base's and its adapter's.

  Args:
    params: any part of a tree of weights, or their shapes; parts that another
      tree has are None.
  """
  return sum(map(_count, jax.tree.leaves(params, is_leaf=is_weight)))


def _count(w: Any) -> int:
  return w.count() if is_weight(w) else math.prod(w.shape)


def bind(
  params: Params,
  *,
  key: PRNGKey | None = None,
  ids: Int[Array, "B"] | None = None,
) -> Params:
  """Returns `params` whose leaves carry what depends on this batch.

  Args:
    params: any tree of weights.
    key: dropout key; each leaf derives its own by its position in the tree.
    ids: which adapter each row of the batch uses.
  """
  leaves, treedef = jax.tree.flatten(params, is_leaf=is_weight)
  bound = [
    w.bind(key=None if key is None else jax.random.fold_in(key, i), ids=ids)
    if is_weight(w)
    else w
    for i, w in enumerate(leaves)
  ]
  return jax.tree.unflatten(treedef, bound)


def with_tokens(
  params: Any,
  tokens: Int[Array, "B T"],
  segments: Int[Array, "B T"] | None = None,
) -> Any:
  """Returns `params` whose leaves know the tokens that come next.

  Only leaves that answer `with_tokens(tokens, segments)` change: adapters that
  act behind some tokens alone. Those that a prompt has called stay so while
  it is continued token by token.

  Args:
    params: any tree of weights, or one.
    tokens: of the whole rows; padding is -1, or has no segment.
    segments: document of each token, -1 for padding; by default one a row.
  """

  def one(w):
    return w.with_tokens(tokens, segments) if is_weight(w) else w

  return jax.tree.map(partial(within, f=one), params, is_leaf=is_weight)


def token_wise(params: Any) -> bool:
  """Whether what weights make of a token depends on that token alone.

  Arrays do so; other weights have to say it, by `token_wise`.

  Args:
    params: any tree of weights.
  """
  leaves = jax.tree.leaves(params, is_leaf=is_weight)
  return all(not is_weight(w) or w.token_wise for w in leaves)


def of_tokens(params: Any, keep: Int[Array, "B N"]) -> Any:
  """Returns `params` whose leaves know some of the tokens they knew.

  Args:
    params: what `with_tokens` returned, or what it has not changed.
    keep: the tokens of each row that come next, by their index.
  """

  def one(w):
    return w.of_tokens(keep) if is_weight(w) else w

  return jax.tree.map(partial(within, f=one), params, is_leaf=is_weight)


def weight(
  module: nn.Module,
  name: str,
  init: Callable[..., Any],
  shape: tuple[int, ...] = (),
) -> AnyWeight:
  """Returns the stored parameter `name`, or makes it with `init(key, shape)`.

  Linen's own `param` rejects a stored value of another shape, which every
  packed leaf has; here what the tree holds is what the module uses.
  """
  if module.has_variable("params", name):
    return module.get_variable("params", name)
  return module.param(name, init, shape)


def project(
  module: nn.Module,
  x: Float[Array, "*B I"],
  name: str,
  size: int,
  bias: bool = False,
) -> Float[Array, "*B O"]:
  """Returns `x` times `module`'s weight `name [in, size]`, plus its bias.

  Args:
    module: whose parameters `name` and `name_bias` are, inside its call.
    x: activations.
    name: of the weight.
    size: output width `O`.
    bias: whether there is one.
  """
  init = nn.initializers.lecun_normal()
  w = weight(module, name, init, (x.shape[-1], size))
  return _biased(module, einsum("...d,df->...f", x, w), name, bias, w)


def project_all(
  module: nn.Module,
  x: Float[Array, "*B I"],
  sizes: Mapping[str, int],
  bias: bool = False,
) -> list[Float[Array, "*B O"]]:
  """Returns `project` by each name; by one product if one matrix holds all.

  Args:
    module: as for `project`; a tree may hold `beside(names)` instead of the
      names, the matrices side by side.
    x: activations.
    sizes: name -> output width.
    bias: whether there are some, each under its own name.
  """
  name = fused_name(sizes)
  if not module.has_variable("params", name):
    return [project(module, x, n, size, bias) for n, size in sizes.items()]
  # Matrices side by side are packed, and no adapter is around them.
  y = einsum("...d,df->...f", x, module.get_variable("params", name))
  ends = np.cumsum(list(sizes.values()))[:-1]
  return [
    _biased(module, part, n, bias, None)
    for n, part in zip(sizes, jnp.split(y, ends, axis=-1), strict=True)
  ]


def fused_name(names: Iterable[str]) -> str:
  """Returns the name of one matrix that holds those of `names`."""
  return "_".join(names)


def _biased(module, y, name, bias, w):
  if not bias:
    return y
  zeros = nn.initializers.zeros
  b = weight(module, f"{name}_bias", zeros, y.shape[-1:])
  return y + bias_of(w, b).astype(y.dtype)
