"""Zero-shot classification: an image's class is that of the nearest text.

The texts are captions of the classes, in several templates, whose vectors are
averaged (Radford et al. 2021, arXiv:2103.00020, section 3.1.4).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research import tables
from research.typing import Array, Float, Int, Params, UInt8
from research.vlm.contrastive import data
from research.vlm.contrastive.dual_encoder import DualEncoder
from research.vlm.data import Prompt, batch_images
from research.vlm.encoders import native
from research.vlm.encoders.native import Patches
from research.vlm.evaluation import protocol, retrieval
from research.vlm.evaluation.report import Report
from research.vlm.images.normalise import HALF, Normalisation
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.scenes.sample import Sample
from research.vlm.scenes.task import Task

CHANCE = "chance"
"""In a report: what drawing one of the classes scores in the mean."""


@functools.partial(jax.jit, static_argnums=(0, 3))
def image_vectors(
  model: DualEncoder,
  params: Params,
  images: UInt8[Array, "B H W 3"] | Patches,
  normalise: Normalisation = HALF,
) -> Float[Array, "B E"]:
  """Returns the unit vectors of images, compiled for each shape.

  Args:
    images: one view an image; or patches of native resolution, one image a row.
  """
  if not isinstance(images, Patches):
    images = images[:, None]
  given = native.encoder_inputs(images, normalise, model.image)
  return model.apply({"params": params}, *given, method="embed_images")


@functools.partial(jax.jit, static_argnums=0)
def text_vectors(
  model: DualEncoder, params: Params, tokens: Int[Array, "C T"]
) -> Float[Array, "C E"]:
  """Returns the unit vectors of texts, compiled for each shape."""
  return model.apply({"params": params}, tokens, method="embed_texts")


class Classes(NamedTuple):
  """What a question's answer is one of.

  Attributes:
    names: of C classes.
    vectors: of each class's caption in each of M templates, [C, M, E].
  """

  names: tuple[str, ...]
  vectors: Float[np.ndarray, "C M E"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifier:
  """Classes as a function of images: a `protocol.AnswerFn`.

  Attributes:
    preprocessor: makes one view of an image.
    classes: by question.
    rows: a batch is padded to a multiple of so many images, so that few shapes
      are compiled.
  """

  model: DualEncoder
  params: Params
  preprocessor: Preprocessor
  classes: Mapping[str, Classes]
  rows: int = 1

  def __call__(
    self,
    images: Sequence[Sequence[UInt8[np.ndarray, "..."]]],
    questions: Sequence[str],
  ) -> list[str]:
    return self.choose(self.vectors(images), questions)

  def vectors(
    self, images: Sequence[Sequence[UInt8[np.ndarray, "..."]]]
  ) -> Float[np.ndarray, "B E"]:
    """Returns the images' unit vectors.

    Raises:
      UserError: an image has several views, or there are several.
    """
    rows = [Prompt.from_images(x, self.preprocessor, 1) for x in images]
    rows += rows[-1:] * (-len(rows) % self.rows)
    views = batch_images(rows)
    if not isinstance(views, Patches):
      views = views[:, 0]
    found = image_vectors(
      self.model, self.params, views, self.preprocessor.normalise
    )
    return np.asarray(found)[: len(images)]

  def choose(
    self,
    vectors: Float[np.ndarray, "B E"],
    questions: Sequence[str],
    templates: slice = slice(None),
  ) -> list[str]:
    """Returns the names of the classes that are nearest."""
    out = [""] * len(questions)
    for question in set(questions):
      asked = [i for i, x in enumerate(questions) if x == question]
      names, captions = self.classes[question]
      weights = retrieval.zero_shot_weights(captions[:, templates])
      best = retrieval.classify(vectors[asked], weights)
      for i, k in zip(asked, best, strict=True):
        out[i] = names[k]
    return out


@dataclasses.dataclass(frozen=True)
class ZeroShotReport:
  """The scores of a classifier, and of each template by itself.

  Attributes:
    report: with real, blind and shuffled images, of rules, and of chance.
    classes: number of classes, by question.
    alone: template -> share of right answers, by kind of question.
  """

  report: Report
  classes: Mapping[str, int]
  alone: Mapping[str, Mapping[str, float]]

  def __str__(self) -> str:
    """Returns the tables of scores, and one of templates, in per cent."""
    kinds = sorted({k for found in self.alone.values() for k in found})
    rows = [["one template alone", *kinds]]
    for template, found in self.alone.items():
      rows.append([template, *(f"{100 * found[k]:.1f}" for k in kinds)])
    more = tables.aligned(rows, right=range(1, len(kinds) + 1))
    return "\n\n".join([str(self.report), "\n".join(more)])

  def to_json(self) -> dict[str, Any]:
    found = {"classes": self.classes, "templates": self.alone}
    return self.report.to_json() | found


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroShot:
  """An evaluation: a dual encoder names what pictures show.

  The classes of a question are its samples' choices; where they have none, as
  captions, they are all answers to it, so that the score is the recall at 1
  among them.

  Attributes:
    captions: samples, whose answers are classes, with the templates of their
      captions.
    limit: samples at most, the first ones; None for all.
  """

  captions: data.Captions
  limit: int | None = None
  batch: int = 64
  seed: int = 0

  def __call__(self, loaded: Any) -> ZeroShotReport:
    """Returns the scores of a dual encoder.

    Args:
      loaded: has `model` (a `DualEncoder`), `params`, `tokenizer` and
        `preprocessor`.
    """
    task = self.captions.samples
    samples = task[: self.limit]
    classifier = Classifier(
      model=loaded.model,
      params=loaded.params,
      preprocessor=loaded.preprocessor,
      classes=self.classes(samples, loaded),
      rows=self.batch,
    )
    report = protocol.evaluate(
      samples,
      classifier,
      task.rules() if isinstance(task, Task) else {},
      parser=_as_is,
      batch=self.batch,
      seed=self.seed,
    )
    sizes = {q: len(x.names) for q, x in classifier.classes.items()}
    chance = np.array([1 / sizes[x.question] for x in samples])
    report = dataclasses.replace(
      report, scores={**report.scores, CHANCE: chance}
    )
    return ZeroShotReport(report, sizes, self._alone(samples, classifier))

  def classes(
    self, samples: Sequence[Sample], loaded: Any
  ) -> dict[str, Classes]:
    out = {}
    for question in sorted({x.question for x in samples}):
      asked = [x for x in samples if x.question == question]
      names = asked[0].choices or tuple(sorted({x.answer for x in asked}))
      texts = [t.format(n) for n in names for t in self.captions.templates]
      tokens = [
        data.caption_tokens(text, loaded.tokenizer, self.captions.length)
        for text in texts
      ]
      found = text_vectors(
        loaded.model, loaded.params, jnp.asarray(np.stack(tokens))
      )
      count = len(self.captions.templates)
      vectors = np.asarray(found).reshape(len(names), count, -1)
      out[question] = Classes(names, vectors)
    return out

  def _alone(
    self, samples: Sequence[Sample], classifier: Classifier
  ) -> dict[str, dict[str, float]]:
    starts = range(0, len(samples), self.batch)
    parts = [samples[i : i + self.batch] for i in starts]
    vectors = np.concatenate(
      [classifier.vectors([x.images for x in part]) for part in parts]
    )
    out = {}
    for i, template in enumerate(self.captions.templates):
      questions = [x.question for x in samples]
      found = classifier.choose(vectors, questions, slice(i, i + 1))
      right = np.array(
        [a == x.answer for a, x in zip(found, samples, strict=True)]
      )
      kinds = np.array([x.kind for x in samples])
      out[template] = {
        str(k): float(right[kinds == k].mean()) for k in np.unique(kinds)
      }
    return out


def _as_is(text: str, choices: Sequence[str]) -> str:
  """Returns the text: a classifier has no other answers than its classes."""
  del choices
  return text
