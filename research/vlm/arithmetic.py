"""What an image costs a model: views, tokens, FLOPs, bytes; before any compile.

A product of [n, a] and [a, b] is 2 n a b FLOPs. A layer's scores and their
product with values are 4 N H for each pair of a query and a key it sees. Norms,
activations and softmax are not counted.
"""

import dataclasses
import math
from collections.abc import Collection

import jax

from research import tree
from research.nn.attention import Attention
from research.nn.block import Block
from research.nn.cross_attention import GatedCrossAttention
from research.nn.mlp import Mlp, PlainMlp
from research.nn.moe import Moe
from research.nn.transformer import Transformer
from research.typing import UserError
from research.vlm.connectors.group_attention import GroupAttention
from research.vlm.connectors.qformer import QFormer
from research.vlm.connectors.resamplers import AttentionPool, PerceiverResampler
from research.vlm.connectors.square_attention import SquareAttention
from research.vlm.cross_attention import LatestImage
from research.vlm.encoders.vit import CHANNELS
from research.vlm.encoders.windows import window_side
from research.vlm.images.plan import Plan
from research.vlm.images.preprocessor import describe
from research.vlm.images.prompts import token_count
from research.vlm.images.resize import Size
from research.vlm.masks import BidirectionalPrompt
from research.vlm.model import VisionLanguageModel
from research.vlm.presets import Preset

_MATRICES = ("q", "k", "v", "o", "up", "down", "projection")
"""Names of the matrices of connectors with queries."""


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
  encoder_flops: float
  connector_flops: float
  language_flops: float
  head_flops: float
  kv_bytes: int
  media_tokens: int = 0

  @property
  def encoder_share(self) -> float:
    """The encoder's share of all FLOPs before the first token."""
    rest = self.connector_flops + self.language_flops + self.head_flops
    return self.encoder_flops / (self.encoder_flops + rest)


def image_cost(
  preset: Preset, height: int, width: int, text: int = 0, kv_width: int = 2
) -> ImageCost:
  """Returns what an image of this size costs a published model.

  Args:
    preset: the model.
    height: of the image, upright, in pixels.
    width: of the image.
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
  mask, media = model.mask, media_tokens(model, plan)
  both_ways = preset.diffusion or isinstance(mask, BidirectionalPrompt)
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
    language_flops=language_flops(
      model.language, total, both_ways=both_ways, media=media
    ),
    head_flops=2.0 * model.language.width * model.language.vocab_size,
    kv_bytes=kv_cache_bytes(model.language, total, kv_width, media),
    media_tokens=media,
  )


def media_tokens(model: VisionLanguageModel, plan: Plan) -> int:
  """Returns what layers of cross-attention read of an image, 0 without any.

  Args:
    model: the model.
    plan: of the image.
  """
  if not isinstance(model.placement, LatestImage):
    return 0
  return plan.views * model.tokens_per_view(*plan.view)


def encoder_flops(model: VisionLanguageModel, plan: Plan) -> float:
  """Returns the FLOPs of encoding an image.

  Layers behind the last one that is a feature do not run.

  Args:
    model: whose encoder it is.
    plan: of the image.
  """
  return plan.views * _encoder_of_view(model, plan.patches)


def _encoder_of_view(model: VisionLanguageModel, grid: Size) -> float:
  vision = model.vision
  depth = max(
    x + vision.stack.depth + 1 if x < 0 else x for x in model.features.layers
  )
  n = grid[0] * grid[1]
  flops = 2.0 * n * vision.frames * vision.patch**2 * CHANNELS * vision.width
  n += vision.class_token
  kinds = vision.stack.kinds()[:depth]
  flops += sum(_block(x, vision.width, n) for x in kinds)
  return flops + sum(_scores(x.attention, _pairs(x, grid, n)) for x in kinds)


def _pairs(block: Block, grid: Size, tokens: int) -> float:
  """Returns how many pairs of an encoder's tokens see each other in a layer."""
  side = window_side(block)
  if not side:
    return float(tokens) ** 2
  # Windows at the ends of an image are smaller.
  rows, columns = (
    sum(min(side, n - i) ** 2 for i in range(0, n, side)) for n in grid
  )
  return float(rows * columns)


def connector_flops(model: VisionLanguageModel, plan: Plan) -> float:
  """Returns the FLOPs of a connector of matrices, for an image.

  Args:
    model: whose connector multiplies each soft token by all of its matrices, as
      `connectors.projections` do; attends within squares or groups of patches,
      as Molmo's do; or has queries that attend to all patches of a view.
    plan: of the image.
  """
  if isinstance(model.connector, GroupAttention):  # groups reach over views
    return plan.soft_tokens * _connector_of_token(model)
  return plan.views * _connector_of_view(model, plan.patches)


def _connector_of_view(model: VisionLanguageModel, grid: Size) -> float:
  connector = model.connector
  if isinstance(connector, AttentionPool | PerceiverResampler | QFormer):
    return _queries_of_view(model, grid)
  return model.tokens_of(grid) * _connector_of_token(model)


def _queries_of_view(model: VisionLanguageModel, grid: Size) -> float:
  """Returns the FLOPs of queries that attend to a view's patches."""
  connector, flops = model.connector, 0.0
  queries = connector.queries
  read = grid[0] * grid[1]
  read += model.vision.class_token and model.features.class_token
  if isinstance(connector, PerceiverResampler):
    read += queries  # keys and values are also made of the queries
  reads = "cross_attention" if isinstance(connector, QFormer) else "attention"
  shapes = jax.eval_shape(model.new_towers, jax.random.key(0))["connector"]
  for path, x in tree.flatten_paths(shapes):
    *_, layer, name = "", *path.split("/")
    if name not in _MATRICES or layer == "text_mlp":
      continue
    keys = read if layer == reads else queries
    rows = keys if name in ("k", "v") else queries
    flops += 2.0 * rows * math.prod(x.shape)
    if name == "q":
      *layers, _, size = x.shape
      flops += 4.0 * queries * keys * math.prod(layers) * size
  return flops


def _connector_of_token(model: VisionLanguageModel) -> float:
  connector, patches = model.connector, 1
  flops = 0.0
  if isinstance(connector, SquareAttention | GroupAttention):
    patches = connector.side**2  # that one soft token attends to
    flops += 4.0 * connector.heads * connector.head_dim * patches
  shapes = jax.eval_shape(model.new_towers, jax.random.key(0))["connector"]
  for path, x in tree.flatten_paths(shapes):
    # What stands for absent patches is added.
    if x.ndim == 2 and path != "padding":
      times = patches if path in ("attention/k", "attention/v") else 1
      flops += 2.0 * times * math.prod(x.shape)
  return flops


def pixels_flops(
  model: VisionLanguageModel, shape: tuple[int, int, int, int]
) -> int:
  """Returns the FLOPs of making soft tokens of views of one size.

  Args:
    model: whose encoder and connector these are, as for `connector_flops`.
    shape: of the pixels, `[V, H, W, 3]`.
  """
  views, height, width, _ = shape
  grid = model.grid(height, width)
  soft = _connector_of_view(model, grid)
  return int(views * (_encoder_of_view(model, grid) + soft))


def language_flops(
  model: Transformer, tokens: int, *, both_ways: bool = False, media: int = 0
) -> float:
  """Returns the FLOPs of the layers for a prompt, without the head.

  Args:
    model: the language model.
    tokens: of the prompt.
    both_ways: whether its tokens see all of it; causal by default.
    media: what each token sees in layers of cross-attention.

  Raises:
    UserError: it has layers of experts.
  """
  flops = 0.0
  if model.per_layer is not None:
    # A projection for each layer of the input, and two matrices within it.
    each = model.width * model.per_layer.size
    flops += 2.0 * tokens * 3 * model.per_layer.depth * each
  for block in model.layer_kinds():
    if isinstance(block.mlp, Moe):
      raise UserError("language_flops: found layers of experts, expected none")
    pairs = float(tokens) ** 2
    if not both_ways:
      seen = min(block.attention.window or tokens, tokens)
      pairs = seen * (seen + 1) / 2 + (tokens - seen) * seen
    flops += _block(block, model.width, tokens)
    flops += _scores(block.attention, pairs)
    if block.cross is not None:
      flops += _cross(block.cross, model.width, tokens, media)
  return flops


def _cross(
  layer: GatedCrossAttention, width: int, tokens: int, media: int
) -> float:
  """Returns the FLOPs of a layer of cross-attention."""
  attention, matrices = layer.attention, _matrices(layer.mlp)
  size = attention.heads * attention.head_dim
  flops = 2.0 * tokens * width * matrices * layer.mlp.hidden
  if media:  # else its attention adds nothing
    flops += 4.0 * size * (tokens * (width + media) + media * layer.media_width)
  return flops


def training_flops(
  model: VisionLanguageModel,
  plan: Plan,
  tokens: int,
  trained: Collection[str],
) -> dict[str, float]:
  """Returns the FLOPs of a training step for one row, by tower.

  A pass backward costs as much as one forward for gradients of activations, and
  again for those of weights. Nothing is recomputed. Logits are those of all
  tokens.

  Args:
    model: the model.
    plan: of the row's images.
    tokens: of the row, images included.
    trained: names of towers that have trained weights.
  """
  both_ways = isinstance(model.mask, BidirectionalPrompt)
  language = language_flops(
    model.language, tokens, both_ways=both_ways, media=media_tokens(model, plan)
  )
  language += 2.0 * tokens * model.language.width * model.language.vocab_size
  once = {
    "vision": encoder_flops(model, plan),
    "connector": connector_flops(model, plan),
    "language": language,
  }
  passes, through = {}, False
  for name in once:
    # Gradients go through what comes after something that is trained.
    passes[name] = 3 if name in trained else 1 + through
    through = through or name in trained
  return {name: passes[name] * flops for name, flops in once.items()}


def kv_cache_bytes(
  model: Transformer, tokens: int, width: int = 2, media: int = 0
) -> int:
  """Returns the bytes of keys and values of a prompt.

  Args:
    model: the language model; layers with a window keep no more than it.
    tokens: of the prompt.
    width: bytes of a number.
    media: what layers of cross-attention read.
  """
  of_images = sum(
    2 * block.cross.attention.heads * block.cross.attention.head_dim
    for block in model.layer_kinds()
    if block.cross is not None
  )
  return of_images * media * width + sum(
    2
    * block.attention.kv_heads
    * block.attention.head_dim
    * min(block.attention.window or tokens, tokens)
    * width
    for block in model.layer_kinds()
    if block.attention.kv != "borrowed"
  )


def _block(block: Block, width: int, tokens: int) -> float:
  """Returns the FLOPs of a layer's matrices."""
  attention, mlp = block.attention, block.mlp
  of_keys = 2 if attention.values == "projected" else 1
  if attention.kv == "borrowed":
    of_keys = 0
  heads = 2 * attention.heads + of_keys * attention.kv_heads
  rows = heads * attention.head_dim + _matrices(mlp) * mlp.hidden
  return 2.0 * tokens * width * rows


def _matrices(mlp: Mlp | PlainMlp) -> int:
  return 3 if isinstance(mlp, Mlp) else 2


def _scores(attention: Attention, pairs: float) -> float:
  return 4.0 * attention.heads * attention.head_dim * pairs


def describe_cost(
  preset: Preset, cost: ImageCost, name: str = "image", kv_width: int = 2
) -> str:
  """Returns a text of what an image costs a model.

  Args:
    preset: the model.
    cost: of the image, from `image_cost`.
    name: of the preset, for the first line.
    kv_width: bytes of a number in the cache, as for `image_cost`.
  """
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
