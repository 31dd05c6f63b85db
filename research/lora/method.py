"""What a parameter-efficient method is: a value that changes one matrix.

A method never sees layers, stacks, meshes or files. It says which arrays it
has for one matrix `w [in, out]`, how they start, and what they add; everything
else (scanned stacks, experts, embeddings, packed bases, dropout, sharding,
merging) follows from that in `research.lora.adapted`.

A new method is one file in `research/lora/methods`: a frozen dataclass with
`start` and `delta`; `branch` or `einsum` where forming `delta` is wasteful.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from research import weights
from research.typing import Array, Bool, Float, Int, PRNGKey, UserError

Arrays = Any
"""A dict of a method's arrays by name; fp32 whatever the base is.

Not annotated as such: JAX builds trees of whatever it likes."""

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Place:
  """The matrix that a method starts on.

  Attributes:
    size_in, size_out: of `w`; an embedding is `[vocabulary, width]`.
    embedding: whether rows of `w` are looked up.
  """

  size_in: int
  size_out: int
  embedding: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """How a few trained arrays change a matrix `w [in, out]`.

  Attributes:
    rank: `r`, in the method's own sense.
    alpha: numerator of the method's scale, where it has one.
    dropout: rate on the input of what is added, in training.
  """

  rank: int = 8
  alpha: float = 16.0
  dropout: float = 0.0

  PEFT: ClassVar[str | None] = None
  """PEFT's `peft_type`; None where PEFT has no such method."""

  PEFT_FLAG: ClassVar[str | None] = None
  """The field that switches this method on among others of its type."""

  PEFT_SHARED: ClassVar[tuple[str, ...]] = ()
  """Tensors that a file holds once; a module has their first rows and columns.
  """

  VARIES: ClassVar[tuple[str, ...]] = ("rank", "alpha")
  """Fields that may differ between the modules of one adapter in a file."""

  PEFT_PATTERNS: ClassVar[Mapping[str, str]] = {}
  """PEFT's field for what differs between modules: of `rank`, of `alpha`."""

  PEFT_HARMLESS: ClassVar[tuple[str, ...]] = ()
  """PEFT's fields that do not change what a trained adapter computes."""

  GATED: ClassVar[bool] = False
  """Whether it acts at some positions only, which `active` finds."""

  DROPS: ClassVar[bool] = True
  """Whether something is added, whose input can be dropped."""

  PEFT_DEFAULTS: ClassVar[Mapping[str, Any]] = {}
  """What PEFT takes for fields that a file leaves out."""

  @property
  def starts_as_base(self) -> bool:
    """Whether a new adapter computes what its base does, but for rounding."""
    return True

  @property
  def pair_scale(self) -> float | None:
    """`s` where the matrix moves by `s aᵀ b` of the arrays a and b.

    None where it moves by anything else, whatever its arrays are called."""
    return None

  @property
  def output_gain(self) -> str | None:
    """The array `[out]` that outputs are multiplied by, a bias included.

    None where a bias stays as it is: what changes the matrix alone."""
    return None

  def __post_init__(self) -> None:
    name = type(self).__name__
    if self.rank < 1:
      raise UserError(f"{name}: rank is {self.rank}, expected at least 1")
    if not self.alpha > 0:
      raise UserError(f"{name}: alpha is {self.alpha}, expected more than 0")
    if not 0 <= self.dropout < 1:
      raise UserError(
        f"{name}: dropout is {self.dropout}, expected at least 0 and below 1"
      )
    if self.dropout and not self.DROPS:
      raise UserError(f"{name}: dropout is {self.dropout}, expected 0")

  def at(self, name: str, sizes: Mapping[str, tuple[int, int]]) -> "Method":
    """Returns the method for one matrix, where that matters.

    Args:
      name: `layers/3/mlp/down`, or PEFT's `model.layers.3.mlp.down_proj`.
      sizes: (in, out) of all matrices that are adapted, by such names.
    """
    return self

  def among(self, name: str, names: Sequence[str]) -> "Method":
    """Returns the method for one module of a file, where that matters.

    Args:
      name: `model.layers.3.mlp.down_proj`.
      names: of all modules that are adapted.
    """
    return self

  def settled(self) -> "Method":
    """Returns the method without what only its file needs."""
    return self

  def start(
    self, key: PRNGKey, place: Place, w: Any, seen: Any = None
  ) -> tuple[Arrays, Arrays]:
    """Returns (trained, fixed) arrays of one fresh adapter.

    Args:
      key: of this matrix alone.
      place: what is known of the matrix without reading it.
      w: the matrix, any weight; most methods do not look.
      seen: what was measured for this matrix, where a method needs that.
    """
    raise NotImplementedError

  def delta(self, p: Arrays, w: Any) -> Float[Array, "I O"]:
    """Returns what merging adds to `w`, in fp32.

    Args:
      p: all arrays, trained and fixed.
      w: the base, any weight.
    """
    raise NotImplementedError

  def active(
    self, tokens: Int[Array, "B T"], segments: Int[Array, "B T"] | None = None
  ) -> Bool[Array, "B T"]:
    """Returns where the method acts; only for those that are `GATED`.

    Args:
      tokens: of the batch that is multiplied next.
      segments: document of each token, -1 for padding; by default one a row.
    """
    raise NotImplementedError

  def branch(
    self, eq: str, x: Float[Array, "..."], p: Arrays, w: Any
  ) -> Float[Array, "..."]:
    """Returns what is added to `einsum(eq, x, w)`, in the dtype of `x`.

    By default through `delta`, which the backward pass forms again: what is
    kept for it are `x` and the arrays.
    """

    def product(x, p, w):
      return jnp.einsum(eq, x, self.delta(p, w).astype(x.dtype))

    return jax.checkpoint(product)(x, p, w)

  def einsum(
    self,
    eq: str,
    x: Float[Array, "..."],
    dropped: Float[Array, "..."],
    p: Arrays,
    w: Any,
  ) -> Float[Array, "..."]:
    """Returns `einsum(eq, x, changed w)`.

    Args:
      eq: contracts either axis of `w`, see `turned`.
      x: activations.
      dropped: `x` after dropout, for what is added.
      p: all arrays.
      w: the base.
    """
    return weights.einsum(eq, x, w) + self.branch(eq, dropped, p, w)

  def rows(self, ids: Any, p: Arrays, w: Any) -> Float[Array, "... O"]:
    """Returns what is added to rows `ids` of an embedding."""
    return jnp.take(self.delta(p, w), ids, axis=0)

  def ragged(
    self,
    x: Float[Array, "T I"],
    p: Arrays,
    w: Any,
    sizes: Int[Array, "E"],
  ) -> Float[Array, "T O"]:
    """Returns what is added to the experts' matmul, see `weights.ragged_dot`.

    Args:
      x: rows sorted by expert, after dropout.
      p: all arrays, experts in front.
      w: the base `[E, in, out]`.
      sizes: how many rows each expert has.
    """

    def product(x, p, w):
      delta = jax.vmap(self.delta)(p, w)
      return weights.ragged_dot(x, delta.astype(x.dtype), sizes)

    return jax.checkpoint(product)(x, p, w)

  def axes(self, names: Axes) -> Mapping[str, Axes]:
    """Returns the logical axes of every array; None is never cut.

    Args:
      names: of the matrix's input and output.
    """
    raise NotImplementedError

  def exported(self, p: Arrays) -> tuple["Method", Arrays]:
    """Returns the same update as a method that PEFT has, where there is one.

    Args:
      p: all arrays; leading axes may stand in front.
    """
    return self, p

  def idle(self, p: Arrays) -> bool:
    """Whether the arrays, of NumPy, plainly change nothing."""
    return False

  def shared_shapes(self) -> Mapping[str, tuple[int, ...]]:
    """Returns least shapes of `PEFT_SHARED`, where modules need less."""
    return {}

  def to_peft(self, p: Arrays, place: Place) -> dict[str, Any]:
    """Returns the tensors of one module by their names behind the module's.

    Args:
      p: all arrays.
      place: the matrix.
    """
    raise NotImplementedError

  def from_peft(
    self, tensors: Mapping[str, Any], place: Place, w: Any
  ) -> tuple[Arrays, Arrays]:
    """Returns (trained, fixed) from one module's tensors; inverts `to_peft`.

    Args:
      tensors: by their names behind the module's.
      place: the matrix.
      w: the matrix itself, any weight.
    """
    raise NotImplementedError

  def peft_fields(self, methods: Mapping[str, "Method"]) -> dict[str, Any]:
    """Returns the method's own fields of adapter_config.json.

    Args:
      methods: of each module, by PEFT's names.
    """
    raise NotImplementedError

  @classmethod
  def from_fields(cls, fields: Any) -> "Method":
    """Returns the method that a configuration describes.

    Args:
      fields: `research.io.fields.Fields`, with `PEFT_DEFAULTS`.
    """
    raise NotImplementedError


class DenseDelta(Method):
  """Methods that have nothing cheaper than the update itself.

  It is added to the matrix, so that an activation is multiplied once, and
  formed again in the backward pass, which then keeps no matrix.
  """

  def einsum(self, eq, x, dropped, p, w):
    # In 16 bits most of a small update would be lost in the sum; and what is
    # dropped for the update is not for the base.
    if dropped is not x or jnp.finfo(x.dtype).bits < 32:
      return super().einsum(eq, x, dropped, p, w)

    def product(x, p, w):
      changed = dense_fp32(w) + self.delta(p, w)
      return jnp.einsum(eq, x, changed.astype(x.dtype))

    return jax.checkpoint(product)(x, p, w)


def contracts_output(eq: str) -> bool:
  """Whether `eq` contracts the output axis of its weight, as a tied head does.

  Raises:
    ValueError: it does not contract exactly one of two axes.
  """
  _, right = eq.split(",")
  w, out = right.split("->")
  if len(w) != 2 or (w[0] in out) == (w[1] in out):
    raise ValueError(
      f"einsum {eq!r}: an adapted weight takes one contracted and one kept axis"
    )
  return w[0] in out


def dense_fp32(x: Any) -> Float[Array, "..."]:
  """Returns an array or a weight, dense, in fp32 (fp64 stays what it is)."""
  x = weights.dense(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def uniform(
  key: PRNGKey, shape: Sequence[int], bound: float
) -> Float[Array, "..."]:
  """Returns fp32 numbers, uniform within `bound` of 0."""
  return jax.random.uniform(key, tuple(shape), jnp.float32, -bound, bound)


def normal(
  key: PRNGKey, shape: Sequence[int], deviation: float = 1.0
) -> Float[Array, "..."]:
  """Returns fp32 normal numbers of that standard deviation."""
  return jax.random.normal(key, tuple(shape), jnp.float32) * deviation


def zeros(*shape: int) -> Float[Array, "..."]:
  """Returns fp32 zeros."""
  return jnp.zeros(shape, jnp.float32)
