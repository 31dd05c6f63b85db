"""The images of a batch, as a weight: keys and values of one layer."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.masks import Mask, latest_image
from research import weights
from research.typing import Array, Float, Int, UserError


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("keys", "values", "sizes", "bounds"),
  meta_fields=("token",),
)
@dataclasses.dataclass(frozen=True)
class Media(weights.Weight):
  """Keys and values that a layer's tokens attend to: those of the latest image.

  It stands in the parameter tree, since objectives, samplers and caches
  multiply by weights and need not know. `with_tokens` says which image each
  token sees; a generated token sees what the prompt's last token saw.

  Attributes:
    keys, values: `[B, S, N, H]`, one image after the other. Several layers of a
      run have one more leading axis, here as elsewhere.
    sizes: `[B, M]`, keys of each image, 0 for none.
    token: id of the token that stands for an image; it sees the image itself.
    bounds: `[B, 2, T]`, first and one past the last key that each token sees,
      or None before `with_tokens`.
  """

  per_row = True

  keys: Float[Array, "*L B S N H"]
  values: Float[Array, "*L B S N H"]
  sizes: Int[Array, "*L B M"]
  token: int
  bounds: Int[Array, "*L B 2 T"] | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Returns the shape of the keys."""
    return self.keys.shape

  @property
  def dtype(self) -> Any:
    """Returns the keys' dtype."""
    return self.keys.dtype

  def dense(self) -> Float[Array, "..."]:
    """Returns the keys."""
    return self.keys

  def axes(self, names: tuple[str | None, ...]) -> "Media":
    """Returns the logical axis names of its arrays."""
    del names
    heads = ("batch", None, "heads", None)
    return dataclasses.replace(
      self,
      keys=heads,
      values=heads,
      sizes=("batch", None),
      bounds=("batch", None, None),
    )

  def count(self) -> int:
    """Returns 0: these are activations."""
    return 0

  @property
  def row_count(self) -> int:
    """Returns the number of rows."""
    return self.keys.shape[-4]

  def take_rows(self, rows: Int[Array, " N"]) -> "Media":
    """Returns the media of chosen rows."""
    bounds = self.bounds
    return dataclasses.replace(
      self,
      keys=jnp.take(self.keys, rows, axis=-4),
      values=jnp.take(self.values, rows, axis=-4),
      sizes=jnp.take(self.sizes, rows, axis=-2),
      bounds=None if bounds is None else jnp.take(bounds, rows, axis=-3),
    )

  def with_tokens(
    self, tokens: Int[Array, "B T"], segments: Int[Array, "B T"] | None
  ) -> "Media":
    """Returns the media of these tokens; documents do not see each other's."""
    sizes = self.sizes.reshape(-1, *self.sizes.shape[-2:])[0]
    marks = tokens == self.token
    bounds = latest_image(marks, sizes).bounds
    if segments is not None:
      count = jnp.cumsum(marks, axis=1)
      begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
      before = jnp.where(begins, count - marks, 0)
      in_document = count > jax.lax.cummax(before, axis=1)
      bounds = jnp.where((in_document & (segments >= 0))[:, None], bounds, 0)
    lead = self.sizes.shape[:-2]
    bounds = jnp.broadcast_to(bounds, (*lead, *bounds.shape))
    return dataclasses.replace(self, bounds=bounds)

  def mask(self, length: int) -> Mask:
    """Returns what `length` tokens of a layer see.

    Raises:
      UserError: `with_tokens` has not been called, or with other tokens.
    """
    if self.bounds is None:
      raise UserError(
        "cross-attention: which image each token attends to is not set; call"
        " weights.with_tokens(params, tokens) before the model"
      )
    bounds = self.bounds
    if length == 1:
      bounds = bounds[..., -1:]
    if bounds.shape[-1] != length:
      raise UserError(
        f"cross-attention: found {length} tokens, expected the"
        f" {bounds.shape[-1]} that weights.with_tokens was called with"
      )
    return Mask.intervals(bounds, offset=0)
