"""Evaluation with its baselines: blind, shuffled images, and rules.

A score says that a model uses the image only where it is above what the same
model scores without one (zeros) and with another sample's, and above every rule
that ignores a part of the question, on the same samples.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from research.typing import UInt8, UserError
from research.vlm.evaluation.parsers import Parser, exact_choice
from research.vlm.evaluation.report import BLIND, REAL, SHUFFLED, Report
from research.vlm.evaluation.scores import Score, exact_match
from research.vlm.scenes.rules import Rule
from research.vlm.scenes.sample import Sample

Images = tuple[UInt8[np.ndarray, "..."], ...]
"""The images of a sample, each `[H, W, 3]`."""

AnswerFn = Callable[[Sequence[Images], Sequence[str]], Sequence[str]]
"""(images of each sample, questions) -> the model's texts."""


def evaluate(
  samples: Sequence[Sample],
  answer: AnswerFn,
  rules: Mapping[str, Rule],
  *,
  score: Score = exact_match,
  parser: Parser = exact_choice,
  batch: int = 64,
  seed: int = 0,
) -> Report:
  """Returns the scores of a model and of its baselines.

  Args:
    samples: read twice in order, and once shuffled; two at least.
    rules: of the task, such as `Shapes().rules()`.
    score: of a parsed answer.
    parser: of the model's texts; an invalid answer scores 0.
    seed: of the shuffled images.

  Raises:
    UserError: there are fewer than two samples, or a call has not returned a
      text for each question.
  """
  known, pictures = [], []
  for x in samples:
    pictures.append(_digest(x.images) if x.images else len(known))
    known.append(dataclasses.replace(x, images=()))
  order = shuffled_images(known, seed, pictures)
  texts = collections.defaultdict(list)
  for start in range(0, len(known), batch):
    part = range(start, min(start + batch, len(known)))
    questions = [known[i].question for i in part]
    real = [samples[i].images for i in part]
    inputs = {
      REAL: real,
      BLIND: [tuple(map(np.zeros_like, images)) for images in real],
      SHUFFLED: [samples[order[i]].images for i in part],
    }
    for name, images in inputs.items():
      texts[name] += _answers(answer, images, questions)
  scores, parsed = {}, {}
  for name, found in texts.items():
    parsed[name] = [
      parser(text, x.choices) for text, x in zip(found, known, strict=True)
    ]
    scores[name] = _scores(score, parsed[name], known, invalid=0.0)
  for name, rule in rules.items():
    scores[name] = _scores(score, rule(known), known, invalid=np.nan)
  return Report(known, dict(texts), parsed, scores)


def _answers(answer: AnswerFn, images, questions: list[str]) -> list[str]:
  found = list(answer(images, questions))
  if len(found) != len(questions):
    raise UserError(
      f"evaluate: found {len(found)} answers to {len(questions)} questions,"
      " expected one each."
    )
  return found


def _scores(score: Score, answers, samples, invalid: float) -> np.ndarray:
  return np.array(
    [
      invalid if found is None else score(found, x.answer)
      for found, x in zip(answers, samples, strict=True)
    ]
  )


def _digest(images: Images) -> bytes:
  """Returns what is equal for equal images alone."""
  made = hashlib.blake2b(digest_size=16)
  for image in images:
    made.update(repr(image.shape).encode())
    made.update(np.ascontiguousarray(image))
  return made.digest()


def shuffled_images(
  samples: Sequence[Sample],
  seed: int = 0,
  pictures: Sequence[Hashable] | None = None,
) -> list[int]:
  """Returns the sample whose images each sample gets; never its own.

  They are exchanged among samples with the same question, in one cycle: then
  what the image has in common with others of the question stays. A question
  that occurs once exchanges with others of its kind. Who would get an equal
  picture, of another question about it, swaps with somebody else, of the same
  question if possible; it always is where at most half of the samples have it.

  Args:
    samples: two at least.
    pictures: equal for samples of equal images; None if all differ.

  Raises:
    UserError: there are fewer than two samples.
  """
  if len(samples) < 2:
    raise UserError(
      f"evaluate: found {len(samples)} samples, expected two at least: one has"
      " no other's image."
    )
  by_text = collections.defaultdict(list)
  for i, x in enumerate(samples):
    by_text[x.kind, x.question].append(i)
  groups = [found for found in by_text.values() if len(found) > 1]
  singles = collections.defaultdict(list)
  for (kind, _), found in by_text.items():
    if len(found) == 1:
      singles[kind] += found
  for kind, found in singles.items():
    if len(found) > 1:
      groups.append(found)
      continue
    # One alone joins another group, of its kind if there is one.
    same = [g for g in groups if samples[g[0]].kind == kind] or groups
    if same:
      same[0].append(found[0])
    else:
      groups.append(found)
  if len(groups[-1]) == 1:
    groups = [[i for group in groups for i in group]]
  rng = np.random.default_rng(seed)
  order = [0] * len(samples)
  for group in groups:
    cycle = rng.permutation(group).tolist()
    for i, j in zip(cycle, cycle[1:] + cycle[:1], strict=True):
      order[i] = j
  if pictures is not None:
    kinds = collections.defaultdict(list)
    for i, x in enumerate(samples):
      kinds[x.kind].append(i)
    for group in (*groups, *kinds.values(), range(len(samples))):
      _part(order, group, pictures)
  return order


def _part(
  order: list[int], group: Sequence[int], pictures: Sequence[Hashable]
) -> None:
  """Swaps what samples of a group get, where it is their own picture."""
  for i in group:
    own = pictures[i]
    if pictures[order[i]] != own:
      continue
    for j in group:
      if own not in (pictures[j], pictures[order[j]]):
        order[i], order[j] = order[j], order[i]
        break
