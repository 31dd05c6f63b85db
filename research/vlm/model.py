"""A vision language model: encoder, connector, language model.

Its parameters are `{"vision": ..., "connector": ..., "language": ...}`. Images
become soft tokens (`encode`), which stand where the prompt has placeholders
(`research.vlm.splice`) or are attended to by layers of the language model
(`research.vlm.cross_attention`), which is of any kind.
"""

import dataclasses
import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from research.generation import generate
from research.nn import layers
from research.nn.block import Block
from research.nn.transformer import Transformer
from research.typing import (
  Array,
  Bool,
  Float,
  Int,
  Params,
  PRNGKey,
  UInt8,
  UserError,
)
from research.vlm.connectors.deep_stack import DeepStack
from research.vlm.connectors.group_attention import GroupAttention
from research.vlm.connectors.projections import (
  AveragePool,
  Grid,
  Linear,
  Mlp,
  Squares,
)
from research.vlm.connectors.qformer import QFormer
from research.vlm.connectors.resamplers import AttentionPool, PerceiverResampler
from research.vlm.connectors.square_attention import SquareAttention
from research.vlm.cross_attention import LatestImage
from research.vlm.encoders import native, vit
from research.vlm.encoders.grouped import GroupedViews
from research.vlm.encoders.native import Images, Patches
from research.vlm.encoders.vit import Features, VisionTransformer
from research.vlm.images.normalise import HALF, Normalisation
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.resize import Size
from research.vlm.masks import Causal, PromptMask
from research.vlm.splice import Splice

Connector = (
  Linear
  | Mlp
  | Squares
  | AveragePool
  | SquareAttention
  | GroupAttention
  | DeepStack
  | AttentionPool
  | PerceiverResampler
  | QFormer
)

TOWERS = ("vision", "connector", "language")

ANY_SIZE: Size = (64, 64)
"""Of an image, where what follows is the same for images of any size."""


@runtime_checkable
class WithBackbone(Protocol):
  """A Transformer under another head, such as a `prm.RewardModel`."""

  backbone: Transformer

  def init(self, key: PRNGKey) -> dict[str, Any]:
    """Returns new parameters."""

  def clone(self, *, remat: layers.Remat) -> Any:
    """Returns the model whose backward passes recompute what `remat` says."""

  def layer_kinds(self) -> tuple[Block, ...]:
    """Returns each layer's block, first to last."""

  @property
  def max_positions(self) -> int | None:
    """The context length."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionLanguageModel:
  """Three modules, and what happens between them.

  Attributes:
    connector: makes soft tokens of its features.
    language: the language model, or what reads its states, such as a reward
      model.
    features: which activations of the encoder the connector gets.
    image_token: id of the placeholder.
    normalise: of the pixels.
    mask: what the tokens of a prompt see of each other.
    scale: multiplies the soft tokens before the language model scales its
      embeddings: `1 / embed_scale` leaves them as the connector made them.
    placement: where the language model meets the soft tokens.
  """

  vision: VisionTransformer
  connector: Connector
  language: Transformer | WithBackbone
  features: Features = Features()
  image_token: int
  normalise: Normalisation = HALF
  mask: PromptMask = Causal()
  scale: float = 1.0
  placement: Splice | LatestImage = Splice()

  def init(self, key: PRNGKey) -> dict[str, Any]:
    key, own = jax.random.split(key)
    if isinstance(self.language, Transformer):
      tokens = jnp.zeros((1, 1), jnp.int32)
      language = self.language.init(own, tokens)["params"]
    else:
      language = self.language.init(own)
    return self.new_towers(key) | {"language": language}

  def new_towers(self, key: PRNGKey) -> dict[str, Any]:
    key, own = jax.random.split(key)
    side = self.square
    features = jnp.zeros(
      (1, side * side, len(self.features.layers) * self.vision.width)
    )
    connector = self.connector.init(own, features, (side, side))["params"]
    return dict(vision=vit.new_params(self.vision, key), connector=connector)

  @property
  def transformer(self) -> Transformer:
    """The language model's layers, whatever head is on them."""
    if isinstance(self.language, Transformer):
      return self.language
    return self.language.backbone

  def clone(self, *, remat: layers.Remat) -> "VisionLanguageModel":
    return dataclasses.replace(
      self,
      vision=self.vision.clone(remat=remat),
      language=self.language.clone(remat=remat),
    )

  def layer_kinds(self) -> tuple[Block, ...]:
    return (*self.vision.layer_kinds(), *self.language.layer_kinds())

  def grid(self, height: int, width: int) -> Grid:
    return height // self.vision.patch, width // self.vision.patch

  def tokens_per_view(self, height: int, width: int) -> int:
    """Returns the number of soft tokens of an image of so many pixels."""
    return self.tokens_of(self.grid(height, width))

  def tokens_of(self, grid: Grid) -> int:
    """Returns the number of soft tokens of a view of so many patches."""
    return self.connector.tokens(grid) + self.keeps_class_token

  @property
  def keeps_class_token(self) -> bool:
    """Whether the class token's feature becomes a soft token of its own."""
    read = self.vision.class_token and self.features.class_token
    return read and isinstance(self.connector, Linear | Mlp)

  @property
  def square(self) -> int:
    """The side, in patches, of the squares that the connector merges."""
    return self.connector.side if isinstance(self.connector, SQUARES) else 1

  def check_placeholders(self, preprocessor: Preprocessor) -> None:
    """Checks that an image has a placeholder for each of its soft tokens.

    With others, features would stand at the placeholders of other features.

    Raises:
      UserError: an image has more or fewer.
    """
    tiling, plan = preprocessor.tiling, preprocessor.plan(*ANY_SIZE)
    found: Any = plan.soft_tokens
    what = f"placeholders of {plan.views} views"
    if isinstance(self.placement, LatestImage):
      expected: Any = plan.views
    elif tiling.native_square is not None:
      found, what = (tiling.patch, tiling.native_square), "patches and squares"
      expected = self.vision.patch, self.square
    elif tiling.groups(plan) is not None:  # of any views' patches
      found, what = (tiling.patch, tiling.pool), "patches and squares"
      expected = self.vision.patch, getattr(self.connector, "side", 1)
    else:
      expected = plan.views * self.tokens_per_view(*plan.view)
    if found != expected:
      raise UserError(
        f"preprocessor: found {found} {what} ({type(tiling).__name__}),"
        f" expected {expected}, as encoder and connector make soft tokens; set"
        " the tiling's patch and pool, or class_token"
      )

  def encode(self, params: Params, images: Images) -> Float[Array, "B P D"]:
    """Returns the soft tokens of each row's images, one after the other.

    Args:
      params: of all three, or of vision and connector alone.
      images: V views a row. Of views of one size, P = V * tokens_per_view; of
        native resolution, each image has as many as its grid, and what comes
        after the last is of any value. Of groups of patches, one for each.

    Raises:
      UserError: images of native resolution, for a connector that reads whole
        views.
    """
    if isinstance(images, Patches):
      return self._encode_native(params, images)
    if isinstance(images, GroupedViews):
      return self._encode_groups(params, images)
    rows, views, height, width, _ = images.shape
    flat = images.reshape(-1, height, width, vit.CHANNELS)
    features = self.view_features(params, flat)
    soft = self.connect(params, features, self.grid(height, width))
    return soft.reshape(rows, views * soft.shape[1], soft.shape[2])

  def _encode_native(self, params, images):
    if not isinstance(self.connector, LOCAL):
      raise UserError(
        f"connector: found {type(self.connector).__name__}, which would read"
        " the padding of images of native resolution; expected one that reads"
        " each square of patches alone"
      )
    rows, views, count, _ = images.shape
    side = self.square
    patches = native.normalised(images, self.normalise)
    patches = patches.reshape(rows * views, count, -1)
    at = native.coordinates(images.grids.reshape(-1, 2), count, side)
    features = self.encode_patches(params, patches, at)
    # Squares that follow each other are a grid of the width of one.
    soft = self.connect(params, features, (count // side, side))
    soft = soft.reshape(rows, views, -1, soft.shape[-1])
    sizes = jnp.prod(self.soft_grids(images), axis=-1)
    return native.without_padding(soft, sizes)

  def _encode_groups(self, params, images):
    if not isinstance(self.connector, GroupAttention):
      raise UserError(
        f"connector: found {type(self.connector).__name__}, which reads each"
        " view alone; expected one that reads groups of patches of several"
      )
    rows, _, height, width, _ = images.shape
    flat = images.pixels.reshape(-1, height, width, vit.CHANNELS)
    features = self.view_features(params, flat)
    features = features.reshape(rows, -1, features.shape[-1])
    soft = self.connector.apply(
      {"params": params["connector"]}, features, images.groups, method="pool"
    )
    return soft if self.scale == 1.0 else soft * self.scale

  def soft_grids(self, images: Images) -> Int[Array, "B V 2"]:
    """Returns rows and columns of soft tokens of each view; zeros for none."""
    if isinstance(images, Patches):
      return images.grids // self.square
    if isinstance(images, GroupedViews):
      rows, count, _ = images.groups.shape
      return jnp.broadcast_to(jnp.array((1, count), jnp.int32), (rows, 1, 2))
    rows, views, height, width, _ = images.shape
    return self._soft_grids(rows, views, self.grid(height, width))

  def _soft_grids(self, rows, views, grid):
    soft = 1, self.tokens_of(grid)
    if isinstance(self.connector, LOCAL) and not self.keeps_class_token:
      soft = tuple(n // self.square for n in grid)
    return jnp.broadcast_to(jnp.array(soft, jnp.int32), (rows, views, 2))

  def view_features(
    self, params: Params, pixels: UInt8[Array, "B H W 3"]
  ) -> Float[Array, "B N C"]:
    """Returns what the connector gets of each view.

    Args:
      params: of all three, or of vision alone.

    Raises:
      UserError: the encoder's learned positions are of another grid.
    """
    patches, at = vit.view_patches(self.vision, pixels, self.normalise)
    return self.encode_patches(params, patches, at)

  def encode_patches(
    self,
    params: Params,
    patches: Float[Array, "B N X"],
    coordinates: Int[Array, "B N 2"],
    valid: Bool[Array, "B N"] | None = None,
  ) -> Float[Array, "B M C"]:
    return self.vision.apply(
      {"params": params["vision"]}, patches, coordinates, valid, self.features
    )

  def connect(
    self, params: Params, features: Float[Array, "B N C"], grid: Grid
  ) -> Float[Array, "B S D"]:
    """Returns soft tokens of features on a grid of patches.

    Raises:
      UserError: the connector reads patches one by one, and there are features
        beside theirs.
    """
    of_patches = isinstance(self.connector, (*LOCAL, GroupAttention))
    expected = grid[0] * grid[1] + self.keeps_class_token
    if of_patches and features.shape[1] != expected:
      raise UserError(
        f"connector: found {features.shape[1]} features of {grid[0]} x"
        f" {grid[1]} patches, expected one of each: this connector reads"
        " squares of patches; leave the class token out (Features.class_token)"
      )
    soft = self.connector.apply({"params": params["connector"]}, features, grid)
    return soft if self.scale == 1.0 else soft * self.scale

  def with_images(
    self, params: Params, images: Images, pool: int = 1
  ) -> dict[str, Any]:
    """Returns the language model's parameters, which see these images.

    Args:
      images: as for `encode`; row i of a batch of tokens sees row i.
      pool: consecutive rows of tokens that share a row of images.
    """
    soft, grids = self.encode(params, images), self.soft_grids(images)
    return self._placed(params["language"], soft, grids, pool)

  def with_features(
    self, params: Params, features: Float[Array, "G V R S C"], pool: int = 1
  ) -> dict[str, Any]:
    """Returns `with_images` of images that are encoded already.

    Args:
      features: `view_features` of each row's views, R rows and S columns of
        patches, padded at the end.
      pool: as for `with_images`.
    """
    rows, views, height, width, size = features.shape
    flat = features.reshape(-1, height * width, size)
    soft = self.connect(params, flat, (height, width))
    soft = soft.reshape(rows, views * soft.shape[1], soft.shape[2])
    grids = self._soft_grids(rows, views, (height, width))
    return self._placed(params["language"], soft, grids, pool)

  def with_images_compiled(
    self, params: Params, images: Images
  ) -> dict[str, Any]:
    towers = {k: params[k] for k in ("vision", "connector")}
    soft = _encode(self, towers, images)
    return self._placed(params["language"], soft, self.soft_grids(images))

  def _placed(self, language, soft, grids, pool=1):
    return self.placement(
      self.transformer, language, soft, grids, self.image_token, pool
    )

  def token_source(self) -> generate.TokenSource:
    """Returns what generates tokens after prompts that have this mask."""
    return functools.partial(generate.chunks, mask=self.mask)

  @property
  def max_positions(self) -> int | None:
    return self.language.max_positions


@functools.partial(jax.jit, static_argnums=0)
def _encode(model, params, images):
  return model.encode(params, images)


SQUARES = (Squares, AveragePool, SquareAttention, DeepStack)
"""Connectors that need whole squares of patches."""

LOCAL = (*SQUARES, Linear, Mlp)
"""Connectors whose soft tokens depend on one square of patches each."""
