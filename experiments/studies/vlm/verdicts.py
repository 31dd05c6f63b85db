"""What the rows of vision language models' arms say of the field's claims.

A score is the mean share of right answers over a study's groups of questions; a
verdict compares scores by seed.
"""

from experiments.core.stats import (
  Decision,
  Mean,
  above,
  below,
  every,
  mean,
  paired,
)
from experiments.studies.protocol import Rows, Verdict
from experiments.studies.vlm import arms

MARGIN = 0.25
"""Points above the best baseline that count as using the image."""
EQUAL = 0.02
"""Points within which two arms are alike."""


def _over_seeds(rows: Rows, arm: str, field: str, seeds: int) -> list[float]:
  return [rows[f"{arm}, seed {s}"][field] for s in range(seeds)]


def _apart(rows: Rows, one: str, other: str, seeds: int) -> Mean:
  return paired(*(_over_seeds(rows, x, "score", seeds) for x in (one, other)))


def alike(found: Mean, most: float = EQUAL) -> Decision:
  """Whether a difference lies within `most` of 0, or surely does not."""
  low, high = above(found, -most), below(found, most)
  if low and high:
    return True
  return False if low is False or high is False else None


def _points(found: Mean) -> str:
  return f"{found.times(100)} points"


def stages(rows: Rows, seeds: int) -> list[Verdict]:
  """Returns what one stage, two and none for alignment say."""
  margin = mean(_over_seeds(rows, arms.TWO, "margin", seeds))
  first = _apart(rows, arms.TWO, arms.FIRST, seeds)
  second = _apart(rows, arms.SECOND, arms.TWO, seeds)
  whole = _apart(rows, arms.ALL, arms.TWO, seeds)
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
      "a stage of alignment is optional: as many steps of the second one alone"
      " are within 2 points (Prismatic, arXiv:2402.07865)",
      _points(second),
      alike(second),
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

  def apart(one, other):
    return _apart(rows, arms.named(*one), arms.named(*other), seeds)

  out = []
  for kind, paper in (
    (arms.MLP, "PaliGemma, arXiv:2407.07726"),
    (arms.POOL, "MM1, arXiv:2403.09611"),
  ):
    found = {n: apart((kind, n), (arms.LINEAR, n)) for n in counts}
    out.append(
      Verdict(
        f"at equal tokens {kind} is within 2 points of linear ({paper})",
        ", ".join(f"{n} tokens: {_points(x)}" for n, x in found.items()),
        every(map(alike, found.values())),
      )
    )
  for kind in (arms.LINEAR, arms.MLP, arms.POOL):
    found = apart((kind, counts[0]), (kind, counts[-1]))
    out.append(
      Verdict(
        f"{kind}: {counts[0]} tokens are better than {counts[-1]} (MM1)",
        _points(found),
        above(found),
      )
    )
  return out


def masks(rows: Rows, seeds: int) -> list[Verdict]:
  """Returns what a prefix mask is worth."""
  found = _apart(rows, arms.PREFIX, arms.CAUSAL, seeds)
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
