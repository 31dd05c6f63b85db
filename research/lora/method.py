"""Base class of parameter-efficient fine-tuning (PEFT) methods.

A method defines, for one matrix `w [in, out]`, which arrays it has, how they
are initialised and which update they add. It knows nothing of layers, scanned
stacks, meshes or files: `research.lora.adapted` derives stacks, experts,
embeddings, packed bases, dropout, sharding and merging from these definitions.

A new method is one file in `research/lora/methods`: a frozen dataclass with
`init_arrays` and `delta`, and `branch` or `einsum` where forming `delta` is
wasteful.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from research import weights
from research.ranges import Decay, PositiveFloat, PositiveInt, Ranged
from research.typing import Array, Bool, Float, Int, PRNGKey, UserError

Arrays = Any
"""A dict of a method's arrays by name, fp32 for any dtype of the base.

Annotated as Any, since JAX rebuilds such trees with leaves of other types."""

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class MatrixSpec:
  """Shape and role of the matrix that a method adapts.

  Attributes:
    size_in, size_out: sizes of `w`; an embedding is `[vocabulary, width]`.
    embedding: whether the model looks up rows of `w`.
  """

  size_in: int
  size_out: int
  embedding: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(Ranged):
  """A parameter-efficient update of a matrix `w [in, out]`.

  Attributes:
    rank: `r`; each method defines its meaning.
    alpha: numerator of the method's scale, where it has one.
    dropout: rate on the adapter's input during training.
  """

  rank: PositiveInt = 8
  alpha: PositiveFloat = 16.0
  dropout: Decay = 0.0

  PEFT: ClassVar[str | None] = None
  """The `peft_type` of PEFT's adapter_config.json; None if PEFT lacks it."""

  PEFT_FLAG: ClassVar[str | None] = None
  """Field that selects this method among those with the same `peft_type`."""

  PEFT_SHARED: ClassVar[tuple[str, ...]] = ()
  """Tensors that a file stores once for all modules.

  A module uses their first rows and columns."""

  PER_MODULE: ClassVar[tuple[str, ...]] = ("rank", "alpha")
  """Fields that may differ between the modules of one adapter file."""

  PEFT_PATTERNS: ClassVar[Mapping[str, str]] = {}
  """`rank` or `alpha` -> PEFT's field with its values per module."""

  PEFT_IGNORED: ClassVar[tuple[str, ...]] = ()
  """PEFT's fields that do not change what a trained adapter computes."""

  GATED: ClassVar[bool] = False
  """Whether the method acts only at the positions that `active` returns."""

  SUPPORTS_DROPOUT: ClassVar[bool] = True
  """Whether the method adds a branch whose input dropout can act on."""

  PEFT_DEFAULTS: ClassVar[Mapping[str, Any]] = {}
  """PEFT's values for fields that a file omits."""

  @property
  def starts_as_base(self) -> bool:
    """Whether a new adapter leaves the model's outputs as they are.

    Up to rounding."""
    return True

  @property
  def pair_scale(self) -> float | None:
    """`s` if the method's update is `s aᵀ b` of its arrays a and b.

    None for any other update, whatever the method's arrays are called."""
    return None

  @property
  def output_gain(self) -> str | None:
    """Name of the array `[out]` that scales outputs, bias included.

    None if the method changes the matrix alone and no bias."""
    return None

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.dropout and not self.SUPPORTS_DROPOUT:
      name = type(self).__name__
      raise UserError(f"{name}.dropout: found {self.dropout}, expected 0")

  def for_matrix(
    self, name: str, sizes: Mapping[str, tuple[int, int]]
  ) -> "Method":
    """Returns the method with the fields that depend on the matrix set.

    Args:
      name: `layers/3/mlp/down`, or PEFT's `model.layers.3.mlp.down_proj`.
      sizes: (in, out) of all adapted matrices, by such names.
    """
    return self

  def for_module(self, name: str, names: Sequence[str]) -> "Method":
    """Returns the method with the fields that depend on PEFT's module set.

    Args:
      name: `model.layers.3.mlp.down_proj`.
    """
    return self

  def canonical(self) -> "Method":
    return self

  def init_arrays(
    self, key: PRNGKey, spec: MatrixSpec, w: Any, stats: Any = None
  ) -> tuple[Arrays, Arrays]:
    """Initialises one adapter and returns its (trained, fixed) arrays.

    Args:
      key: random key of this matrix alone.
      w: the matrix, any weight; most methods do not read it.
      stats: calibration statistics of this matrix, for methods that need them.
    """
    raise NotImplementedError

  def delta(self, p: Arrays, w: Any) -> Float[Array, "I O"]:
    """Returns the update that merging adds to `w`, in fp32."""
    raise NotImplementedError

  def active(
    self, tokens: Int[Array, "B T"], segments: Int[Array, "B T"] | None = None
  ) -> Bool[Array, "B T"]:
    """Returns at which positions a `GATED` method acts.

    Args:
      segments: document of each token, -1 for padding; None for one document
        per row.
    """
    raise NotImplementedError

  def branch(
    self, eq: str, x: Float[Array, "..."], p: Arrays, w: Any
  ) -> Float[Array, "..."]:
    """Returns the adapter's term of `einsum(eq, x, w + delta)`.

    The result has the dtype of `x`. The default forms `delta` and recomputes
    it in the backward pass, which then saves only `x` and the arrays.
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
    """Returns `einsum(eq, x, w + delta)`.

    Args:
      eq: contracts either axis of `w`, see `contracts_output`.
      dropped: `x` after dropout, the adapter's input.
    """
    return weights.einsum(eq, x, w) + self.branch(eq, dropped, p, w)

  def rows(self, ids: Any, p: Arrays, w: Any) -> Float[Array, "... O"]:
    return jnp.take(self.delta(p, w), ids, axis=0)

  def ragged(
    self,
    x: Float[Array, "T I"],
    p: Arrays,
    w: Any,
    sizes: Int[Array, "E"],
  ) -> Float[Array, "T O"]:
    """Returns the adapter's term of the experts' `weights.ragged_dot`.

    Args:
      x: rows sorted by expert, after dropout.
      p: all arrays, with a leading axis of experts.
      w: the base `[E, in, out]`.
      sizes: number of rows per expert.
    """

    def product(x, p, w):
      delta = jax.vmap(self.delta)(p, w)
      return weights.ragged_dot(x, delta.astype(x.dtype), sizes)

    return jax.checkpoint(product)(x, p, w)

  def axes(self, names: Axes) -> Mapping[str, Axes]:
    """Returns the logical axes of every array; None is not sharded.

    Args:
      names: logical axes of the matrix's input and output.
    """
    raise NotImplementedError

  def exported(self, p: Arrays) -> tuple["Method", Arrays]:
    """Returns the same update as a method that PEFT has, if there is one.

    Args:
      p: all arrays; may have leading axes.
    """
    return self, p

  def is_noop(self, p: Arrays) -> bool:
    """Whether the NumPy arrays certainly make an update of zero."""
    return False

  def shared_shapes(self) -> Mapping[str, tuple[int, ...]]:
    """Returns minimum shapes of `PEFT_SHARED`, where modules need less."""
    return {}

  def to_peft(self, p: Arrays, spec: MatrixSpec) -> dict[str, Any]:
    """Returns one module's tensors by name, without the module's prefix."""
    raise NotImplementedError

  def from_peft(
    self, tensors: Mapping[str, Any], spec: MatrixSpec, w: Any
  ) -> tuple[Arrays, Arrays]:
    """Returns (trained, fixed) from one module's tensors; inverts `to_peft`."""
    raise NotImplementedError

  def peft_fields(self, methods: Mapping[str, "Method"]) -> dict[str, Any]:
    """Returns the method's fields of PEFT's adapter_config.json.

    Args:
      methods: each module's method, by PEFT's names.
    """
    raise NotImplementedError

  @classmethod
  def from_fields(cls, fields: Any) -> "Method":
    """Returns the method that an adapter_config.json describes.

    Args:
      fields: `research.io.fields.Fields`, with `PEFT_DEFAULTS`.
    """
    raise NotImplementedError


class DenseDelta(Method):
  """Base class of methods whose update has no cheaper form than a matrix.

  `einsum` adds the update to the base and multiplies once. The backward pass
  forms the sum again, so that no matrix is saved for it.
  """

  def einsum(self, eq, x, dropped, p, w):
    # A sum in 16 bits would lose most of a small update; dropout acts on the
    # update's input alone, and operations of the base (rounding, dropout of an
    # adapter there) on its own: these cases take two products.
    plain = weights.unwrap(w) is None
    if not plain or dropped is not x or jnp.finfo(x.dtype).bits < 32:
      return super().einsum(eq, x, dropped, p, w)

    def product(x, p, w):
      changed = dense_fp32(w) + self.delta(p, w)
      return jnp.einsum(eq, x, changed.astype(x.dtype))

    return jax.checkpoint(product)(x, p, w)


def contracts_output(eq: str) -> bool:
  """Whether `eq` contracts the output axis of its weight, as a tied head does.

  Raises:
    ValueError: `eq` does not contract exactly one of the weight's two axes.
  """
  _, right = eq.split(",")
  w, out = right.split("->")
  if len(w) != 2 or (w[0] in out) == (w[1] in out):
    raise ValueError(
      f"einsum {eq!r}: an adapted weight takes one contracted and one kept axis"
    )
  return w[0] in out


def dense_fp32(x: Any) -> Float[Array, "..."]:
  """Returns an array or weight as a dense fp32 array; fp64 stays fp64."""
  x = weights.dense(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def uniform(
  key: PRNGKey, shape: Sequence[int], bound: float
) -> Float[Array, "..."]:
  """Returns fp32 samples, uniform in [-bound, bound)."""
  return jax.random.uniform(key, tuple(shape), jnp.float32, -bound, bound)


def normal(
  key: PRNGKey, shape: Sequence[int], deviation: float = 1.0
) -> Float[Array, "..."]:
  """Returns fp32 normal samples of mean 0 and that standard deviation."""
  return jax.random.normal(key, tuple(shape), jnp.float32) * deviation


def zeros(*shape: int) -> Float[Array, "..."]:
  """Returns fp32 zeros."""
  return jnp.zeros(shape, jnp.float32)
