"""Reward models as sources of an experiment: new ones, and those in files."""

import dataclasses
import pathlib
from typing import Any

import jax

from research.interop import load
from research.interop.hf import rewards
from research.interop.loaded import Loaded, Source
from research.io import unread
from research.nn.transformer import Transformer
from research.prm.heads import Head, LinearHead
from research.prm.model import (
  GenerativeReward,
  Readout,
  RewardModel,
  probability,
)
from research.typing import UserError
from research.vlm.masks import Causal
from research.vlm.model import VisionLanguageModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithHead:
  """A language model with a new scalar head in place of its vocabulary's.

  Attributes:
    backbone: where the language model comes from, such as a trained policy; of
      a vision language model, whose language model gets the head.
    head: of hidden states; its weights are random.
    readout: logits -> score, see `prm.RewardModel`.
    seed: of the head.
  """

  backbone: Source
  head: Head = LinearHead()
  readout: Readout = probability
  seed: int = 0

  def load(self, shardings: unread.Shardings | None = None) -> Loaded:
    """Returns the reward model, its weights, and the backbone's tokenizer.

    Raises:
      UserError: the backbone is no language model, or its texts or prompts are
        not causal.
    """
    loaded = self.backbone.load()
    if loaded.diffusion is not None:
      raise UserError(
        "WithHead.backbone: found a model of masked diffusion, expected one"
        " that predicts the next token: reward models learn and score causal"
        " texts"
      )
    if isinstance(loaded.model, VisionLanguageModel):
      if loaded.model.mask != Causal():
        raise UserError(
          "WithHead.backbone: found a model whose prompts have the mask"
          f" {type(loaded.model.mask).__name__}, expected Causal: reward models"
          " learn and score causal texts, and a search would read others"
        )
      own = self._of(
        dataclasses.replace(
          loaded,
          model=loaded.model.language,
          params=loaded.params["language"],
        )
      )
      made = dataclasses.replace(
        loaded,
        model=dataclasses.replace(loaded.model, language=own.model),
        params={**loaded.params, "language": own.params},
      )
    else:
      made = self._of(loaded)
    if shardings is None:
      return made
    params = unread.moved(made.params, shardings)
    return dataclasses.replace(made, params=params)

  def _of(self, loaded: Loaded) -> Loaded:
    if not isinstance(loaded.model, Transformer):
      raise UserError(
        f"WithHead.backbone: found a {type(loaded.model).__name__}, expected a"
        " language model"
      )
    # No logits of words are computed, so a head that is not tied is not kept.
    backbone = loaded.model.clone(tied=True)
    model = RewardModel(backbone=backbone, head=self.head, readout=self.readout)
    body = {k: v for k, v in loaded.params.items() if k != "head"}
    params = model.with_new_head(body, jax.random.key(self.seed))
    return dataclasses.replace(loaded, model=model, params=params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedReward:
  """A reward model in a directory.

  Attributes:
    name: a run's working directory that trained one, or a directory in Hugging
      Face's format, see `hf.rewards`.
    dtype: of computation and of the body's weights.
    readout: logits -> score.
  """

  name: str
  dtype: str = "float32"
  readout: Readout = probability

  def load(self, shardings: unread.Shardings | None = None) -> Loaded:
    path: Any = load.locate(self.name)
    model, params, source = rewards.load_reward_model(
      pathlib.Path(path), self.dtype, shardings
    )
    model = dataclasses.replace(model, readout=self.readout)
    return Loaded(model, params, load.tokenizer(path), source)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithWords:
  """A language model whose logits of two words are the score of a step.

  Math-Shepherd's and RLHFlow's are; `prm.conventions` has what they read.

  Attributes:
    backbone: where the language model comes from.
    right, wrong: words that are one token each, as they begin a text: behind a
      space where the tokenizer puts one before texts, as Mistral's does.
    readout: logits -> score.
  """

  backbone: Source
  right: str = "+"
  wrong: str = "-"
  readout: Readout = probability

  def load(self, shardings: unread.Shardings | None = None) -> Loaded:
    """Returns the reward model, its weights and its tokenizer.

    Raises:
      UserError: the backbone is no language model that predicts next tokens, or
        a word is not one of its tokens.
    """
    loaded = self.backbone.load(shardings)
    known = isinstance(loaded.model, Transformer) and loaded.tokenizer
    if not known or loaded.diffusion is not None:
      raise UserError(
        f"WithWords.backbone: found a {type(loaded.model).__name__}, expected a"
        " language model that predicts the next token, and its tokenizer"
      )
    model = GenerativeReward(
      backbone=loaded.model,
      right=self._id(loaded.tokenizer, "right"),
      wrong=self._id(loaded.tokenizer, "wrong"),
      readout=self.readout,
    )
    return dataclasses.replace(loaded, model=model)

  def _id(self, tokenizer: Any, field: str) -> int:
    ids = tokenizer.encode(getattr(self, field))
    if len(ids) != 1:
      raise UserError(
        f"WithWords.{field}: found {getattr(self, field)!r}, which is the"
        f" tokens {list(ids)}, expected a word that is one token"
      )
    return ids[0]
