"""What the rows of vision language models' arms say of the field's claims.

A score is the mean share of right answers over a study's groups of questions; a
verdict compares scores by seed.
"""

import numpy as np

from experiments.core.stats import (
  Mean,
  above,
  below,
  equivalent,
  every,
  mean,
  paired,
)
from experiments.studies.protocol import Rows, Verdict
from experiments.studies.vlm import arms
from experiments.studies.vlm import small_text as text

MARGIN = 0.25
"""Points above the best baseline that count as using the image."""
EQUAL = 0.02
"""Points within which two arms are equivalent."""


def _over_seeds(rows: Rows, arm: str, field: str, seeds: int) -> list[float]:
  return [rows[f"{arm}, seed {s}"][field] for s in range(seeds)]


def _paired_difference(rows: Rows, one: str, other: str, seeds: int) -> Mean:
  return paired(*(_over_seeds(rows, x, "score", seeds) for x in (one, other)))


def _points(found: Mean) -> str:
  return f"{found.times(100)} points"


def stages(rows: Rows, seeds: int) -> list[Verdict]:
  """Returns what one stage, two and none for alignment say."""
  margin = mean(_over_seeds(rows, arms.TWO, "margin", seeds))
  first = _paired_difference(rows, arms.TWO, arms.FIRST, seeds)
  both = _paired_difference(rows, arms.TWO, arms.SECOND, seeds)
  second = _paired_difference(rows, arms.SECOND, arms.TWO, seeds)
  whole = _paired_difference(rows, arms.ALL, arms.TWO, seeds)
  control = mean(_over_seeds(rows, arms.BLIND, "margin", seeds))
  return [
    Verdict(
      "after two stages the model uses the image: 25 points above the best of"
      " blind, shuffled and rules",
      _points(margin),
      above(margin, MARGIN),
    ),
    Verdict(
      "the connector alone does not do it: a second stage that trains the"
      " language model adds (LLaVA-1.5, arXiv:2310.03744)",
      _points(first),
      above(first),
    ),
    Verdict(
      "two stages are better than as many steps of the second one alone"
      " (LLaVA, arXiv:2304.08485)",
      _points(both),
      above(both),
    ),
    Verdict(
      "a stage of alignment is optional: as many steps of the second one alone"
      " are within 2 points (Prismatic, arXiv:2402.07865)",
      _points(second),
      equivalent(second, EQUAL),
    ),
    Verdict(
      "training the encoder as well adds (PaliGemma, arXiv:2407.07726)",
      _points(whole),
      above(whole),
    ),
    Verdict(
      "a model that was trained without images is above no baseline: texts do"
      " not give answers away",
      _points(control),
      below(control, EQUAL),
    ),
  ]


def connectors(rows: Rows, seeds: int) -> list[Verdict]:
  """Returns what kinds of connectors and numbers of tokens say."""
  counts = sorted({rows[arm]["tokens"] for arm in rows}, reverse=True)

  def difference(one, other):
    return _paired_difference(rows, arms.named(*one), arms.named(*other), seeds)

  out = []
  for kind, paper in (
    (arms.MLP, "PaliGemma, arXiv:2407.07726"),
    (arms.POOL, "MM1, arXiv:2403.09611"),
  ):
    found = {n: difference((kind, n), (arms.LINEAR, n)) for n in counts}
    out.append(
      Verdict(
        f"at equal tokens {kind} is within 2 points of linear ({paper})",
        ", ".join(f"{n} tokens: {_points(x)}" for n, x in found.items()),
        every(equivalent(x, EQUAL) for x in found.values()),
      )
    )
  for kind in (arms.LINEAR, arms.MLP, arms.POOL):
    found = difference((kind, counts[0]), (kind, counts[-1]))
    out.append(
      Verdict(
        f"{kind}: {counts[0]} tokens are better than {counts[-1]} (MM1)",
        _points(found),
        above(found),
      )
    )
  return out


def feature_layers(rows: Rows, seeds: int) -> list[Verdict]:
  """Returns what the layer before the last one is worth, and both together."""
  before = _paired_difference(rows, arms.BEFORE, arms.LAST, seeds)
  both = _paired_difference(rows, arms.CONCATENATED, arms.LAST, seeds)
  norm = _paired_difference(rows, arms.UNNORMED, arms.LAST, seeds)
  return [
    Verdict(
      "features of the layer before the last one are better than the last"
      " layer's (LLaVA, arXiv:2304.08485)",
      _points(before),
      above(before),
    ),
    Verdict(
      "features of both layers are better than the last layer's (Molmo,"
      " arXiv:2409.17146)",
      _points(both),
      above(both),
    ),
    Verdict(
      "the encoder's final norm does not matter: within 2 points without it",
      _points(norm),
      equivalent(norm, EQUAL),
    ),
  ]


def masks(rows: Rows, seeds: int) -> list[Verdict]:
  """Returns what a prefix mask is worth."""
  found = _paired_difference(rows, arms.PREFIX, arms.CAUSAL, seeds)
  margin = mean(_over_seeds(rows, arms.CAUSAL, "margin", seeds))
  return [
    Verdict(
      "tokens of image and question that see each other help (PaliGemma,"
      " arXiv:2407.07726)",
      _points(found),
      above(found),
    ),
    Verdict(
      "a causal mask is enough to use the image: 25 points above the best"
      " baseline",
      _points(margin),
      above(margin, MARGIN),
    ),
  ]


def small_text(rows: Rows, seeds: int) -> list[Verdict]:
  """Returns what pixels, soft tokens and tiles are worth for small text.

  Small text is of the two least heights, large text of the two greatest ones.
  """
  small, large = slice(2), slice(-2, None)

  def scores(arm, some=small):
    found = [rows[f"{arm}, seed {s}"]["heights"][some] for s in range(seeds)]
    return np.mean(found, axis=1)

  def gain(arm, some=small):
    return scores(arm, some) - scores(text.REDUCED, some)

  tiles, pixels = mean(gain(text.TILES)), mean(gain(text.FEW_TOKENS))
  focus = paired(gain(text.TILES), gain(text.TILES, large))
  tokens = mean(gain(text.MORE_TOKENS))
  ceiling = float(np.mean(rows[text.PAGE_READER]["heights"][small]))
  left = mean(scores(text.TILES) - ceiling)
  return [
    Verdict(
      "tiles beside the reduced page read more small text than the reduced page"
      " alone (LLaVA-NeXT, Idefics3)",
      _points(tiles),
      above(tiles),
    ),
    Verdict(
      "they add more to small text than to large text (PaliGemma,"
      " arXiv:2407.07726: resolution is for text)",
      _points(focus),
      above(focus),
    ),
    Verdict(
      "it is pixels: a whole page in as few soft tokens reads more small text",
      _points(pixels),
      above(pixels),
    ),
    Verdict(
      "it is not soft tokens: four times as many of the same pixels are within"
      " 2 points",
      _points(tokens),
      equivalent(tokens, EQUAL),
    ),
    Verdict(
      "tesseract is a ceiling: with tiles, no more small text is right than it"
      f" reads of the whole page ({100 * ceiling:.0f}%)",
      _points(left),
      below(left),
    ),
  ]
