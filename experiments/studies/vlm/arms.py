"""Arms of the studies of vision language models: what is trained, and of what.

Each function returns a study's arms, for a run file to bind.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from research.vlm.connectors.projections import Linear, Mlp, Squares
from research.vlm.connectors.resamplers import AttentionPool
from research.vlm.encoders.vit import Features
from research.vlm.masks import BidirectionalPrompt, Causal, PromptMask
from research.vlm.model import Connector

CONNECTOR = "^connector/"
LANGUAGE = "^(connector|language)/"
EVERYTHING = "."

TWO, FIRST, SECOND = "two stages", "stage 1 alone", "stage 2 alone"
ALL, BLIND = "everything", "everything, blind"
CAUSAL, PREFIX = "causal", "prefix"
LINEAR, MLP, POOL = "linear", "mlp", "attention pool"
LAST, BEFORE, CONCATENATED = "last layer", "layer before", "both layers"
UNNORMED = "last layer, no norm"
SIDES = (1, 2, 4)
"""Sides of the squares of patches that become a token."""


class Stage(NamedTuple):
  """Steps that train some paths, given by a regular expression."""

  trainable: str
  steps: int


def real(pixels: Any) -> Any:
  """Returns the pixels."""
  return pixels


def blind(pixels: Any) -> Any:
  """Returns black images."""
  return np.zeros_like(pixels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
  """A vision language model, and how it is trained from the base.

  Attributes:
    name: of the arm.
    stages: one after the other, each with an optimizer of its own.
    connector: between the towers.
    mask: what the tokens of a prompt see of each other.
    features: which activations of the encoder the connector gets.
    images: what training sees of them, `real` or `blind`.
  """

  name: str
  stages: tuple[Stage, ...]
  connector: Connector
  mask: PromptMask = Causal()
  features: Features = Features()
  images: Callable[[Any], Any] = real


def linear(side: int, width: int) -> Squares:
  """Returns squares of patches, and one matrix."""
  return Squares(side=side, inner=Linear(size=width))


def stages(steps: int = 2000, width: int = 64) -> tuple[Arm, ...]:
  """Returns one stage against two, and a model that never sees an image.

  Args:
    steps: of each arm, over all of its stages.
    width: of the language model.
  """
  half = steps // 2
  both = Stage(CONNECTOR, half), Stage(LANGUAGE, steps - half)
  arms = {
    TWO: both,
    FIRST: (Stage(CONNECTOR, steps),),
    SECOND: (Stage(LANGUAGE, steps),),
    ALL: (Stage(EVERYTHING, steps),),
  }
  shared = dict(connector=linear(1, width))
  made = [Arm(name=name, stages=x, **shared) for name, x in arms.items()]
  control = Arm(name=BLIND, stages=arms[ALL], images=blind, **shared)
  return (*made, control)


def connectors(
  steps: int = 2000, width: int = 64, patches: int = 16, heads: int = 4
) -> tuple[Arm, ...]:
  """Returns three connectors, each with three numbers of tokens.

  Args:
    steps: of each arm, in one stage that leaves the encoder as it is.
    width: of the language model.
    patches: of an image.
    heads: of the attention pool.
  """
  trained = (Stage(LANGUAGE, steps),)
  out = []
  for side in SIDES:
    count = patches // side**2
    made = {
      LINEAR: linear(side, width),
      MLP: Squares(side=side, inner=Mlp(size=width)),
      POOL: AttentionPool(size=width, queries=count, heads=heads),
    }
    out += [
      Arm(name=named(kind, count), stages=trained, connector=x)
      for kind, x in made.items()
    ]
  return tuple(out)


def named(kind: str, tokens: int) -> str:
  """Returns the name of an arm of `connectors`."""
  return f"{kind}, {tokens} tokens"


def masks(steps: int = 2000, width: int = 64) -> tuple[Arm, ...]:
  """Returns the same model with a causal and with a prefix mask.

  Args:
    steps: of both, in one stage that leaves the encoder as it is.
    width: of the language model.
  """
  shared = dict(stages=(Stage(LANGUAGE, steps),), connector=linear(1, width))
  return (
    Arm(name=CAUSAL, **shared),
    Arm(name=PREFIX, mask=BidirectionalPrompt(), **shared),
  )


def feature_layers(steps: int = 2000, width: int = 64) -> tuple[Arm, ...]:
  """Returns the same model with features of different layers of the encoder.

  Args:
    steps: of each arm, in one stage that leaves the encoder as it is.
    width: of the language model.
  """
  layers = {
    LAST: Features(),  # SigLIP's, as PaliGemma and SmolVLM have it
    UNNORMED: Features(normed=False),
    BEFORE: Features(layers=(-2,), normed=False),  # LLaVA
    CONCATENATED: Features(layers=(-1, -2), normed=False),  # Molmo
  }
  shared = dict(stages=(Stage(LANGUAGE, steps),), connector=linear(1, width))
  return tuple(
    Arm(name=name, features=x, **shared) for name, x in layers.items()
  )
