"""What an image costs a model: views, tokens, FLOPs, bytes; before any compile.

FLOPs are those of `research.nn.flops`. Image tokens that see each other beside
a causal prompt (Gemma 3, Molmo 2) count as causal.
"""

import dataclasses
from collections.abc import Collection

import jax
import jax.numpy as jnp

from research.nn.block import Block
from research.nn.flops import Dense, count_flops, layer_cost, model_cost
from research.vlm.connectors.group_attention import GroupAttention
from research.vlm.cross_attention import LatestImage
from research.vlm.encoders.vit import CHANNELS
from research.vlm.encoders.windows import window_side
from research.vlm.images.plan import Plan
from research.vlm.images.preprocessor import describe
from research.vlm.images.prompts import token_count
from research.vlm.images.resize import Size
from research.vlm.masks import prompt_context
from research.vlm.model import VisionLanguageModel
from research.vlm.presets import Preset


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageCost:
  """What one image costs.

  Attributes:
    height, width: of the image, in pixels.
    views: how many images the encoder sees.
    patches: of a view, which the encoder reads.
    soft_tokens: positions that features take in the prompt.
    wrapper_tokens: positions of what stands around them; words do not count.
    text_tokens: of the question.
    total_tokens: all of them, which the language model reads.
    encoder_flops: of all views.
    connector_flops: of all views.
    language_flops: of the prompt's layers, without the head.
    head_flops: of the logits of one token.
    kv_bytes: keys and values of the prompt.
    media_tokens: what layers of cross-attention read of the image; 0 where its
      features stand in the prompt.
  """

  height: int
  width: int
  views: int
  patches: int
  soft_tokens: int
  wrapper_tokens: int
  text_tokens: int
  total_tokens: int
  encoder_flops: int
  connector_flops: int
  language_flops: int
  head_flops: int
  kv_bytes: int
  media_tokens: int = 0

  @property
  def encoder_share(self) -> float:
    rest = self.connector_flops + self.language_flops + self.head_flops
    return self.encoder_flops / (self.encoder_flops + rest)


def image_cost(
  preset: Preset, height: int, width: int, text: int = 0, kv_width: int = 2
) -> ImageCost:
  """Returns what an image of this size costs a published model.

  Args:
    height: of the image, upright, in pixels.
    text: tokens of the question.
    kv_width: bytes of a number in the cache of keys and values.

  Raises:
    UserError: the image is refused, see `Tiling.plan`.
  """
  plan = preset.preprocessor.plan(height, width)
  model = preset.model()
  pieces = preset.preprocessor.pieces(plan)
  tokens = token_count(pieces)
  total = tokens + text
  media, cost = media_tokens(model, plan), model_cost(model.language)
  context = prompt_context(model.mask, total)
  if preset.diffusion:
    context = Dense(total, total)
  return ImageCost(
    height=height,
    width=width,
    views=plan.views,
    patches=plan.patches[0] * plan.patches[1],
    soft_tokens=plan.soft_tokens,
    wrapper_tokens=tokens - plan.soft_tokens,
    text_tokens=text,
    total_tokens=total,
    encoder_flops=encoder_flops(model, plan),
    connector_flops=connector_flops(model, plan),
    language_flops=cost.forward(total, context, 0, media),
    head_flops=2 * cost.head,
    kv_bytes=kv_width * cost.cache(total, media),
    media_tokens=media,
  )


def media_tokens(model: VisionLanguageModel, plan: Plan) -> int:
  """Returns what layers of cross-attention read of an image, 0 without any."""
  if not isinstance(model.placement, LatestImage):
    return 0
  return plan.views * model.tokens_per_view(*plan.view)


def encoder_flops(model: VisionLanguageModel, plan: Plan) -> int:
  """Returns the FLOPs of encoding an image.

  Layers behind the last one that is a feature do not run.
  """
  return plan.views * _encoder_of_view(model, plan.patches)


def _encoder_of_view(model: VisionLanguageModel, grid: Size) -> int:
  vision = model.vision
  depth = max(
    x + vision.stack.depth + 1 if x < 0 else x for x in model.features.layers
  )
  n = grid[0] * grid[1]
  flops = 2 * n * vision.frames * vision.patch**2 * CHANNELS * vision.width
  n += vision.class_token
  for block in vision.stack.kinds()[:depth]:
    cost = layer_cost(block, vision.width)
    flops += 2 * n * cost.matrices
    flops += 4 * cost.heads_width * _pairs(block, grid, n)
  return flops


def _pairs(block: Block, grid: Size, tokens: int) -> int:
  """Returns how many pairs of an encoder's tokens see each other in a layer."""
  side = window_side(block)
  if not side:
    return tokens**2
  # Windows at the ends of an image are smaller.
  rows, columns = (
    sum(min(side, n - i) ** 2 for i in range(0, n, side)) for n in grid
  )
  return rows * columns


def connector_flops(model: VisionLanguageModel, plan: Plan) -> int:
  """Returns the FLOPs of the connector for an image, as traced."""
  if not isinstance(model.connector, GroupAttention):
    return plan.views * _connector(model, plan.patches)
  # Groups reach over views.
  groups = (1, plan.soft_tokens, model.connector.side**2)
  return _connector(
    model, plan.patches, plan.views, jax.ShapeDtypeStruct(groups, jnp.int32)
  )


def _connector(model, grid, views=1, groups=None) -> int:
  """Returns the FLOPs for one view of a grid, or for groups of several."""
  read = grid[0] * grid[1]
  read += model.vision.class_token and model.features.class_token
  size = len(model.features.layers) * model.vision.width
  features = jax.ShapeDtypeStruct((1, views * read, size), jnp.float32)
  params = jax.eval_shape(model.new_towers, jax.random.key(0))

  def connect(params, features, groups):
    if groups is None:
      return model.connect(params, features, grid)
    return model.connector.apply(
      {"params": params["connector"]}, features, groups, method="pool"
    )

  return int(count_flops(connect, params, features, groups))


def pixels_flops(
  model: VisionLanguageModel, shape: tuple[int, int, int, int]
) -> int:
  """Returns the FLOPs of making soft tokens of views of one size.

  Args:
    shape: of the pixels, `[V, H, W, 3]`.
  """
  views, height, width, _ = shape
  grid = model.grid(height, width)
  return views * (_encoder_of_view(model, grid) + _connector(model, grid))


def training_flops(
  model: VisionLanguageModel,
  plan: Plan,
  tokens: int,
  trained: Collection[str],
) -> dict[str, int]:
  """Returns the FLOPs of a training step for one row, by tower.

  A pass backward costs as much as one forward for gradients of activations, and
  again for those of weights. Nothing is recomputed. Logits are those of all
  tokens.

  Args:
    tokens: of the row, images included.
    trained: names of towers that have trained weights.
  """
  once = {
    "vision": encoder_flops(model, plan),
    "connector": connector_flops(model, plan),
    "language": model_cost(model.language).forward(
      tokens,
      prompt_context(model.mask, tokens),
      outputs=tokens,
      media=media_tokens(model, plan),
    ),
  }
  passes, through = {}, False
  for name in once:
    # Gradients go through what comes after something that is trained.
    passes[name] = 3 if name in trained else 1 + through
    through = through or name in trained
  return {name: passes[name] * flops for name, flops in once.items()}


def describe_cost(
  preset: Preset, cost: ImageCost, name: str = "image", kv_width: int = 2
) -> str:
  """Returns a text of what an image costs a model."""
  of_image = describe(preset.preprocessor, cost.height, cost.width, name)
  encoder, language = cost.encoder_flops / 1e12, cost.language_flops / 1e12
  read = f", {cost.media_tokens} of the image by cross-attention"
  lines = [
    of_image,
    f"  with a question of {cost.text_tokens} tokens: {cost.total_tokens}"
    + read * bool(cost.media_tokens),
    f"  encoder         {encoder:.3g} TFLOP, {cost.encoder_share:.0%} of all"
    " before the first token",
    f"  connector       {cost.connector_flops / 1e12:.3g} TFLOP",
    f"  language model  {language:.3g} TFLOP, and {cost.head_flops / 1e9:.3g}"
    " GFLOP for the logits of a token",
    f"  keys and values {cost.kv_bytes / 2**20:.4g} MiB at {kv_width} bytes a"
    " number",
  ]
  return "\n".join(lines)
