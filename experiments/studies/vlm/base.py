"""What all arms of a seed start from: small towers that know something.

No package brings an image encoder, so one is trained here from scratch: it
learns to caption scenes (CapPa, arXiv:2306.07915), with a language model that
is then dropped. The language model that stays has read questions and answers,
without images. So "frozen" means something in the arms, and what they have to
learn is to connect the two.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.core.from_scratch import FromScratch
from experiments.studies.vlm.arms import EVERYTHING, Stage
from research.data import bpe
from research.data.examples import Example
from research.interop.loaded import Loaded
from research.interop.vision.source import Assembled
from research.nn import presets
from research.optim import optim
from research.training import state, step
from research.training.objectives.objective import (
  Batch,
  NextToken,
  Objective,
)
from research.typing import Params
from research.vlm import data
from research.vlm.encoders.presets import EncoderSizes, siglip
from research.vlm.encoders.vit import Features
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.tiling.square import Square
from research.vlm.masks import Causal, PromptMask
from research.vlm.model import Connector
from research.vlm.objective import WithImages
from research.vlm.scenes.sample import Sample
from research.vlm.scenes.task import Task


@dataclasses.dataclass(frozen=True)
class Known:
  """A tokenizer that is there already, as a source of one."""

  tokenizer: Any

  def load(self) -> Any:
    """Returns it."""
    return self.tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny:
  """Sizes of encoder and language model, and how they are trained.

  Attributes:
    width, depth, heads: of both; feed-forwards are twice as wide.
    size, patch: of images and patches, in pixels along each side.
    vocab: ids of the tokenizer.
    text: tokens of a question and its answer, beside those of the image.
    caption: tokens of a caption and its question.
    batch: rows of a step.
    rate: of Adam, at its peak, then half a cosine; the same for all arms.
    base_rate: of the towers' training before: at 3e-3 some seeds learn no
      shapes from captions (`runs/vlm/shapes.gin`).
    warmup: steps.
    every: steps of a compiled piece of training.
  """

  width: int = 64
  depth: int = 2
  heads: int = 4
  size: int = 32
  patch: int = 8
  vocab: int = 400
  text: int = 12
  caption: int = 40
  batch: int = 32
  rate: float = 2e-3
  base_rate: float = 1e-3
  warmup: int = 50
  every: int = 100

  @property
  def grid(self) -> int:
    """Patches along each side of an image."""
    return self.size // self.patch

  @property
  def views(self) -> int:
    """Views of an image."""
    return 1

  def tokens(self, connector: Connector) -> int:
    """Returns the number of soft tokens of an image."""
    return connector.tokens((self.grid, self.grid))

  def load(
    self,
    connector: Connector,
    tokenizer: Any,
    seed: int,
    mask: PromptMask = Causal(),
    features: Features = Features(),
  ) -> Loaded:
    """Returns a new model of three towers."""
    sizes = dict(
      width=self.width,
      depth=self.depth,
      heads=self.heads,
      hidden=2 * self.width,
    )
    text = presets.Sizes(
      vocab=self.vocab,
      kv_heads=self.heads,
      head_dim=self.width // self.heads,
      tied=True,
      max_positions=max(self.text, self.caption) + self.tokens(connector),
      **sizes,
    )
    encoder = EncoderSizes(patch=self.patch, grid=self.grid, **sizes)
    return Assembled(
      language=FromScratch(sizes=text, tokenizer=Known(tokenizer), seed=seed),
      vision=siglip(encoder),
      connector=connector,
      image_token=self.vocab,
      preprocessor=self.preprocessor(connector),
      mask=mask,
      features=features,
      seed=seed,
    ).load()

  def preprocessor(self, connector: Connector) -> Preprocessor:
    """Returns what makes one view of an image, with the connector's tokens."""
    pool = self.grid // math.isqrt(self.tokens(connector))
    return Preprocessor(Square(tile=self.size, patch=self.patch, pool=pool))

  def questions(
    self, connector: Connector, samples: Sequence[Sample], text: int = 0
  ) -> data.ImageQuestions:
    """Returns samples as rows for a connector.

    Args:
      connector: which makes an image's soft tokens.
      samples: questions, or captions.
      text: tokens beside these; 0 for those of questions.
    """
    return data.ImageQuestions(
      samples=samples,
      preprocessor=self.preprocessor(connector),
      image_token=self.vocab,
      length=(text or self.text) + self.tokens(connector),
      views=self.views,
      batch_size=self.batch,
    )

  def tokenizer(self, task: Task) -> Any:
    """Returns a tokenizer of the task's texts."""
    texts = data.Texts(samples=dataclasses.replace(task, count=2000))
    words = bpe.Bpe(documents=texts, size=self.vocab, add_bos=False)
    return words.load()

  def trained(
    self,
    objective: Objective,
    params: Params,
    pool: Batch,
    stage: Stage,
    seed: int,
  ) -> tuple[Params, float]:
    """Returns trained weights, and the mean loss of the last piece of steps.

    Args:
      objective: with its model.
      params: at the start, of which `stage.trainable` is in the optimizer.
      pool: rows to draw batches from, a batch of all of them.
      stage: what is trained, and for how many steps.
      seed: of the order.
    """
    begin, piece = _compiled(objective, self, stage)
    now, key, done, loss = begin(params), jax.random.key(seed), 0, math.nan
    while done < stage.steps:
      count = min(self.every, stage.steps - done)
      now, losses = piece(now, pool, key, count)
      done, loss = done + count, float(losses.mean())
    return now.params, loss


@functools.lru_cache(maxsize=16)
def _compiled(objective: Objective, tiny: Tiny, stage: Stage):
  """Returns (weights -> state, state after `count` steps and their losses)."""
  tx = optim.adamw(
    optim.cosine(tiny.rate, stage.steps, min(tiny.warmup, stage.steps // 2))
  )
  update = step.make_train_step(objective, tx)

  def begin(params):
    return state.create(params, stage.trainable, tx)

  @functools.partial(jax.jit, static_argnums=3)
  def piece(now, pool, key, count):
    total = pool["tokens"].shape[0]

    def one(now, _):
      at = jax.random.fold_in(jax.random.fold_in(key, 1), now.step)
      chosen = jax.random.randint(at, (tiny.batch,), 0, total)
      batch = {name: x[chosen] for name, x in pool.items()}
      now, metrics = update(now, batch, key)
      return now, metrics["loss"]

    return jax.lax.scan(one, now, length=count)

  return begin, piece


def pool_of(rows: Sequence[Batch]) -> dict[str, Any]:
  """Returns rows as one batch on the device."""
  return {
    name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]
  }


def text_rows(task: Task, tokenizer: Any, length: int) -> list[Batch]:
  """Returns the task's questions and answers, every token of them learned."""
  texts = data.Texts(samples=task)
  out = []
  for i in range(len(texts)):
    ids = [*tokenizer.encode(texts[i]), *tokenizer.stop[:1]]
    tokens = np.asarray(ids, np.int32)
    example = Example(tokens, np.ones(len(ids), bool))
    out.append(data.row_of([example], length))
  return out


def base_towers(
  tiny: Tiny,
  connector: Connector,
  task: Task,
  captions: Sequence[Sample],
  tokenizer: Any,
  steps: int,
  seed: int,
) -> tuple[dict[str, Params], dict[str, float]]:
  """Returns a trained encoder and a trained language model, and their losses.

  Args:
    tiny: their sizes.
    connector: of the encoder's training.
    task: whose texts the language model reads.
    captions: what the encoder learns from.
    tokenizer: of all models.
    steps: of either.
    seed: of weights and order.
  """
  tiny = dataclasses.replace(tiny, rate=tiny.base_rate)
  everything = Stage(EVERYTHING, steps)
  loaded = tiny.load(connector, tokenizer, seed)
  questions = tiny.questions(connector, captions, tiny.caption)
  rows = questions.rows(tokenizer)
  pool = pool_of([rows[i] for i in range(len(rows))])
  sees = WithImages(model=loaded.model)
  seeing, caption = tiny.trained(sees, loaded.params, pool, everything, seed)
  texts = pool_of(text_rows(task, tokenizer, tiny.text))
  reads = NextToken(model=loaded.model.language)
  start = loaded.params["language"]
  language, text = tiny.trained(reads, start, texts, everything, seed)
  towers = {"vision": seeing["vision"], "language": language}
  return towers, {"captions": caption, "texts": text}
