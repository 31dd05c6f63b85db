"""What tests of scenes share: whether answers are uniform, fake stamps."""

import collections
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image
from scipy import stats

from research.vlm.scenes import Sample, Task


def drawn(task: Task) -> list[Sample]:
  """Returns all samples of a task, without images."""
  return [task.drawn(i) for i in range(len(task))]


def conditional_p(samples: Iterable[Sample]) -> float:
  """Returns the p of Pearson's test that answers are uniform given the text."""
  counts, choices = collections.defaultdict(collections.Counter), {}
  for x in samples:
    counts[x.question][x.answer] += 1
    choices[x.question] = x.choices
    assert x.answer in x.choices
  statistic, freedom = 0.0, 0
  for text, found in counts.items():
    observed = np.array([found[answer] for answer in choices[text]])
    statistic += stats.chisquare(observed).statistic
    freedom += len(observed) - 1
  return float(stats.chi2.sf(statistic, freedom))


def accuracy(rule, samples: Sequence[Sample]) -> float:
  """Returns the share of answers of a rule that are right."""
  answers = rule(samples)
  return sum(
    a == x.answer for a, x in zip(answers, samples, strict=True)
  ) / len(samples)


def write_stamps(root) -> None:
  """Writes a tree like that of the stamps: 4 folders of 12 captions."""
  rng = np.random.default_rng(0)
  modes = ("RGBA", "LA", "P", "RGB")
  for i in range(48):
    folder = root / f"kind{i % 2}" / f"part{i % 4}"
    folder.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 255, (9 + i % 5, 12, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels).convert(modes[i % 4])
    picture.save(folder / f"stamp{i}.png")
    text = f"A  thing of number {i // 2 * 2}.\nde.utf8=Ein Ding.\n"
    (folder / f"stamp{i}.txt").write_text(text, "utf-8")
  Image.new("RGB", (4, 4)).save(root / "kind0" / "no_caption.png")
