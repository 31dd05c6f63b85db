"""Parameter leaves: plain arrays or `Weight`s (quantized, adapted, ...).

A parameter leaf is a `jax.Array` or a `Weight`: a small frozen dataclass,
registered as a pytree, that represents an array, such as `AdaptedTensor` or
`QTensor`. This is the only module that dispatches on the type of a leaf:
modules, trainers, samplers and checkpoints call the functions below instead.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from kernels_pallas import dense_matmul, grouped_matmul
from research import tree
from research.typing import Array, Float, Int, Params, PRNGKey, Shaped

AnyWeight = Any
"""A `jax.Array`, or a `Weight`."""


class Weight:
  """Base class of leaves that represent an array without being one.

  Subclasses are frozen dataclasses, registered as pytrees. They define `shape`,
  `dtype`, `dense` and `axes`. All other methods have defaults, which multiply
  by the dense array.
  """

  format = None
  """The quantization format of a packed weight, else None."""
  is_adapter = False
  """Whether this is an adapter: a trained change of another weight, `w`."""
  is_renewable = False
  """Whether training updates the stored codes directly; see `Int8Tensor`."""
  token_wise = False
  """Whether the output for a token depends on that token only."""
  row_wise = True
  """Whether the product for a row of `x` depends on that row only."""
  per_row = False
  """Whether its arrays have an axis of a batch's rows, such as their images."""
  row_count: int | None = None
  """How many rows that axis has."""
  extra_ids: tuple[int, ...] = ()
  """Ids that `take` accepts besides those of the table's rows."""

  @property
  def ndim(self) -> int:
    """Returns the number of logical axes."""
    return len(self.shape)

  def dense(self) -> Shaped[Array, "..."]:
    """Returns the logical array."""
    raise NotImplementedError

  def axes(self, names: tuple[str | None, ...]) -> Any:
    """Returns the logical axis names of its arrays; see `axes`."""
    raise NotImplementedError

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `einsum(eq, x, w)` in the dtype of `x`."""
    return einsum(eq, x, self.dense())

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns embedding rows `ids`."""
    return take(self.dense(), ids)

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    """Returns each row of `x` times its expert's matrix; see `ragged_dot`."""
    return ragged_dot(x, self.dense(), sizes)

  def bind(self, *, key: PRNGKey | None, ids: Int[Array, "B"] | None) -> Any:
    """Returns the weight bound to a batch; see `bind`. Default: unchanged."""
    return self

  def scaled_bias(self, b: Float[Array, "... O"]) -> Float[Array, "... O"]:
    """Returns bias `b`, scaled if this weight scales whole outputs."""
    return b

  def map_inner(self, f: Callable[[Any], Any]) -> Any:
    """Applies `f` to the weight that multiplies the input; see `map_inner`."""
    return f(self)

  def with_tokens(
    self, tokens: Int[Array, "B T"], segments: Int[Array, "B T"] | None
  ) -> Any:
    """Returns the weight bound to the input tokens; see `with_tokens`."""
    return self

  def select_tokens(self, keep: Int[Array, "B N"]) -> Any:
    """Returns the weight bound to selected tokens; see `select_tokens`."""
    return self

  def take_rows(self, rows: Int[Array, " N"]) -> Any:
    """Returns the weight of chosen rows of a batch; see `take_rows`."""
    return self

  def count(self) -> int:
    """Returns the number of parameters it represents; see `count`."""
    # If its arrays live in another tree (they are None here), it has no shape.
    return math.prod(self.shape) if jax.tree.leaves(self) else 0


class WrappedWeight(Weight):
  """A weight that wraps another one, `w`, and has its shape and dtype."""

  @property
  def shape(self) -> tuple[int, ...]:
    """Returns the logical shape."""
    return self.w.shape

  @property
  def dtype(self) -> Any:
    """Returns the logical dtype."""
    return self.w.dtype

  def bind(self, *, key: PRNGKey | None, ids: Int[Array, "B"] | None) -> Any:
    """Returns the weight with `w` bound to a batch; see `bind`."""
    w = self.w.bind(key=key, ids=ids) if is_weight(self.w) else self.w
    return dataclasses.replace(self, w=w)

  def scaled_bias(self, b: Float[Array, "... O"]) -> Float[Array, "... O"]:
    """Returns the bias, scaled if `w` scales whole outputs."""
    return scaled_bias(self.w, b)

  def count(self) -> int:
    """Returns the number of parameters of `w` and of the wrapper itself."""
    wrapper = dataclasses.replace(self, w=None)
    return count(self.w) + sum(map(_count, jax.tree.leaves(wrapper)))


def is_weight(x: Any) -> bool:
  """Whether `x` is a `Weight`, not an array or a tree."""
  return isinstance(x, Weight)


def unwrap(w: AnyWeight) -> AnyWeight | None:
  """Returns the weight that `w` wraps, or None if it wraps none."""
  return w.w if isinstance(w, WrappedWeight) else None


def nested(w: AnyWeight) -> Iterator[AnyWeight]:
  """Yields `w`, the weight that it wraps, and so on down to the innermost."""
  below = w
  while below is not None:
    yield below
    below = unwrap(below)


def is_packed(w: AnyWeight) -> bool:
  """Whether `w` is a packed (quantized) weight without a wrapper."""
  return is_weight(w) and w.format is not None


def is_adapter(w: AnyWeight) -> bool:
  """Whether `w` is an adapter that wraps another weight."""
  return is_weight(w) and w.is_adapter


def is_renewable(w: AnyWeight) -> bool:
  """Whether training updates the stored codes of `w` directly."""
  return is_weight(w) and w.is_renewable


def named_weights(params: Any) -> list[tuple[str, AnyWeight]]:
  """Returns a `(path, weight)` pair for each leaf of a parameter tree."""
  found, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_weight)
  return [(tree.path_name(path), w) for path, w in found]


def einsum(
  eq: str, x: Float[Array, "..."], w: AnyWeight
) -> Float[Array, "..."]:
  """Returns `einsum(eq, x, w)` in the dtype of `x`.

  Args:
    eq: an einsum of two operands; the letters of `w` are its logical axes, e.g.
      `"...d,df->...f"`, or `"...d,vd->...v"` for a tied head.
    x: activations; their dtype is the compute dtype.
    w: any weight; plain arrays are cast to the dtype of `x`.
  """
  if is_weight(w):
    return w.einsum(eq, x)
  return dense_matmul.einsum(eq, x, jnp.asarray(w).astype(x.dtype))


def take(w: AnyWeight, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
  """Returns rows `ids` of an embedding table `w [V, D]`."""
  if is_weight(w):
    return w.take(ids)
  return jnp.take(w, ids, axis=0)


def extra_ids(params: Params) -> tuple[int, ...]:
  """Returns a network's ids that are no rows of its embedding, if any."""
  table = params.get("embed")
  return table.extra_ids if is_weight(table) else ()


def ragged_dot(
  x: Float[Array, "T I"], w: AnyWeight, sizes: Int[Array, "E"]
) -> Float[Array, "T O"]:
  """Returns each row of `x` times its expert's matrix.

  Args:
    x: rows sorted by expert.
    w: `[E, in, out]`, any weight.
    sizes: the number of rows of each expert; their sum is at most `T`.
  """
  if is_weight(w):
    return w.ragged_dot(x, sizes.astype(jnp.int32))
  return grouped_matmul.matmul(x, w.astype(x.dtype), sizes)


def dense(w: AnyWeight) -> Shaped[Array, "..."]:
  """Returns the dense array that `w` represents."""
  return w.dense() if is_weight(w) else jnp.asarray(w)


def scaled_bias(
  w: AnyWeight, b: Float[Array, "... O"]
) -> Float[Array, "... O"]:
  """Returns the bias to add after multiplying by `w`, whose stored bias is `b`.

  That is `b`, unless `w` scales its whole output including the bias, as (IA)^3
  does.

  Args:
    w: any weight `[..., in, out]`.
    b: `[..., out]`, with the same leading axes.
  """
  return w.scaled_bias(b) if is_weight(w) else b


def bias_path(path: str) -> str | None:
  """Returns the path where the bias of the matrix at `path` is stored, if any.

  Returns None for a router, whose bias is not added to its output: it only
  affects the choice of experts.
  """
  *above, name = path.split("/")
  if name == "router":
    return None
  if name == "matrix":  # of a convolution's kernel
    return "/".join([*above[:-1], "bias"])
  return f"{path}_bias"


def axes(w: AnyWeight, names: Sequence[str | None]) -> Any:
  """Returns the logical axis names of each array in `w`, in `w`'s structure.

  Args:
    w: a weight whose trailing axes are `names`. Leading axes, such as the
      layers of a scanned run, get no name. None (a leaf that another tree
      holds) stays None.
    names: one logical name (or None) per trailing axis.
  """
  if w is None:
    return None
  if is_weight(w):
    return w.axes(tuple(names))
  return (None,) * (w.ndim - len(names)) + tuple(names)


def map_inner(w: AnyWeight, f: Callable[[AnyWeight], AnyWeight]) -> AnyWeight:
  """Replaces the weight that multiplies the input, inside `w`, by `f` of it.

  That is `w` itself, unless `w` transforms the input first, for example rounds
  or rotates it. Then the inner weight is the one that is quantized and whose
  inputs are measured.
  """
  return w.map_inner(f) if is_weight(w) else f(w)


def inner(w: AnyWeight) -> AnyWeight:
  """Returns the weight inside `w` that multiplies inputs; see `map_inner`."""
  found = []
  map_inner(w, lambda x: found.append(x) or x)
  return found[0]


def count(params: Any) -> int:
  """Returns the number of parameters that a tree represents.

  A packed weight counts its logical elements, however they are stored. An
  adapted weight counts those of its base and of its adapter.

  Args:
    params: any subtree of weights or of their shapes; None where another tree
      holds the arrays.
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
  """Binds weights to a batch: dropout keys and the adapter of each row.

  Args:
    params: any tree of weights.
    key: dropout key; each leaf derives its own from its position in the tree.
    ids: the adapter that each row of the batch uses.

  Returns:
    `params` with these values inside the leaves that use them.
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
  """Binds weights to the input tokens.

  Changes only leaves that override `Weight.with_tokens`: adapters that are
  activated by certain tokens. An adapter that a prompt has activated stays
  active while the prompt is continued token by token.

  Args:
    params: any tree of weights, or a single weight.
    tokens: complete rows; padding is -1, or has segment -1.
    segments: the document of each token, -1 for padding; by default each row is
      one document.
  """

  def one(w):
    return w.with_tokens(tokens, segments) if is_weight(w) else w

  return jax.tree.map(partial(map_inner, f=one), params, is_leaf=is_weight)


def token_wise(params: Any) -> bool:
  """Whether the output for a token depends on that token only.

  True for arrays; any other weight declares it by `Weight.token_wise`.

  Args:
    params: any tree of weights.
  """
  leaves = jax.tree.leaves(params, is_leaf=is_weight)
  return all(not is_weight(w) or w.token_wise for w in leaves)


def row_wise(params: Any) -> bool:
  """Whether products for some rows of `x` are the same without the others.

  True, unless a weight says otherwise (`Weight.row_wise`), as one that rounds
  with a scale that all rows share. Weights that are bound to tokens need
  `select_tokens` besides.

  Args:
    params: any tree of weights.
  """
  leaves = filter(is_weight, jax.tree.leaves(params, is_leaf=is_weight))
  return all(x.row_wise for w in leaves for x in nested(w) if is_weight(x))


def select_tokens(params: Any, keep: Int[Array, "B N"]) -> Any:
  """Restricts weights that are bound to tokens to selected tokens.

  Args:
    params: weights, whether `with_tokens` changed them or not.
    keep: indices of the selected tokens in each row.
  """

  def one(w):
    return w.select_tokens(keep) if is_weight(w) else w

  return jax.tree.map(partial(map_inner, f=one), params, is_leaf=is_weight)


def weight(
  module: nn.Module,
  name: str,
  init: Callable[..., Any],
  shape: tuple[int, ...] = (),
) -> AnyWeight:
  """Returns the stored parameter `name`, or creates it by `init(key, shape)`.

  Linen's `param` rejects a stored value of another shape, which every packed
  leaf has. This function uses whatever the parameter tree stores.
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
    module: the Linen module that owns parameters `name` and `name_bias`; call
      this inside its `__call__`.
    x: activations.
    name: name of the weight.
    size: output width `O`.
    bias: whether to add a bias.
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
  """Returns `project` for each name, by a single product if they are fused.

  Args:
    module: as for `project`. Its parameters may contain `fused_name(names)`,
      the matrices concatenated along the output, instead of the single names.
    x: activations.
    sizes: name -> output width.
    bias: whether to add biases, which are stored under each single name.
  """
  name = fused_name(sizes)
  # The fused name of a single matrix is its own.
  if len(sizes) == 1 or not module.has_variable("params", name):
    return [project(module, x, n, size, bias) for n, size in sizes.items()]
  # Only packed weights are fused, and no adapter wraps them.
  y = einsum("...d,df->...f", x, module.get_variable("params", name))
  ends = np.cumsum(list(sizes.values()))[:-1]
  return [
    _biased(module, part, n, bias, None)
    for n, part in zip(sizes, jnp.split(y, ends, axis=-1), strict=True)
  ]


def fused_name(names: Iterable[str]) -> str:
  """Returns the parameter name of the fused matrix of `names`."""
  return "_".join(names)


def _biased(module, y, name, bias, w):
  if not bias:
    return y
  zeros = nn.initializers.zeros
  b = weight(module, f"{name}_bias", zeros, y.shape[-1:])
  return y + scaled_bias(w, b).astype(y.dtype)


def take_rows(params: Any, rows: Int[Array, " N"]) -> Any:
  """Returns a tree in which weights of rows (`per_row`) have chosen rows."""
  leaves, treedef = jax.tree.flatten(params, is_leaf=is_weight)
  found = [w.take_rows(rows) if is_weight(w) else w for w in leaves]
  return jax.tree.unflatten(treedef, found)
